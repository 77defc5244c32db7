"""Classes of film reviews (Pang and Lee 2005), in ten folds: preset classifier from scratch, and begun with a language model.

The language model reads WikiText-2 in both directions, in small letters, as the reviews are, and as words of the reviews. Their
vocabulary is that of all reviews (Kim 2014 has it so as well): a word that is in no review to learn from begins with what
WikiText-2 says of it.
"""

import argparse
import functools
import pathlib
import random
import statistics
import sys
from collections.abc import Iterable
from typing import NamedTuple

from dllm.kernels.processor import BF16

from .results import Measured, Table, bars
from .runs import last_json, run, train

FOLDS, LABELS = 10, ("neg", "pos")
WAYS = "from scratch", "from a language model"
WIKI = {
    "model.kind": "bilm", "model.embedding": 256, "model.hidden": 256, "model.tied": "true", "model.dropout": 0.3,
    "train.lr": 0.004, "train.epochs": 5, "train.max_steps": 0, "train.precision": "bf16" if BF16 else "fp32",
}  # fmt: skip
CLASSES = {"model.dropout": 0.6, "train.lr": 0.003, "train.smoothing": 0.2}  # beside those of the preset


class Review(NamedTuple):
    """A line of a class's file, and which fold it is tested in."""

    fold: int
    label: str
    text: str


def reviews(options: argparse.Namespace) -> Measured:
    """Classes of film reviews: tests of ten folds, from scratch and from a language model of WikiText-2."""
    if options.data is None:
        sys.exit("say where the texts are: --data FOLDER, with movie-reviews/ and wikitext-2/ in it")
    every, work = read(options.data / "movie-reviews"), options.work
    parent = language_model(every, options.data / "wikitext-2", work, options.ranks, steps(options))
    columns = [("fold", 6), *((way, 24) for way in WAYS)]
    table, data = Table(f"Right, in % of the reviews of a fold, {options.ranks} ranks", columns), {way: [] for way in WAYS}
    for fold in range(1 if options.quick else FOLDS):
        folder = work / f"fold-{fold}"
        folder.mkdir()
        for split, chosen in (("train", False), ("test", True)):
            rows = [one for one in every if (one.fold == fold) is chosen]
            write(folder / f"{split}.tsv", (f"{one.label}\t{one.text}" for one in rows))
        pieces = "--tokenizer", "bpe", "--vocab-size", 8000
        data[WAYS[0]].append(accuracy(folder / "pieces", pieces, options.ranks, steps(options)))
        words = "--tokenizer-from", work / "words"
        data[WAYS[1]].append(accuracy(folder / "words", words, options.ranks, steps(options), "--init-from", parent))
        table.row(fold, *(f"{data[way][-1]:.1f}" for way in WAYS))
    means = {way: statistics.fmean(data[way]) for way in WAYS}
    table.row("mean", *(f"{mean:.1f}" for mean in means.values()))
    return table, data, functools.partial(bars, "right, % of the reviews", {"mean": means})


def steps(options: argparse.Namespace) -> tuple[object, ...]:
    """What limits a run of --quick."""
    return ("--max-steps", 20) if options.quick else ()


def read(folder: pathlib.Path) -> list[Review]:
    """The reviews in an order of chance, a tenth of each class in each fold."""
    chance, found = random.Random(1), list[Review]()
    for label in LABELS:
        lines = (folder / f"{label}.txt").read_text(encoding="utf-8").split("\n")
        texts = [line.strip().replace("\t", " ") for line in lines if line.strip()]
        chance.shuffle(texts)
        found += [Review(number % FOLDS, label, text) for number, text in enumerate(texts)]
    chance.shuffle(found)
    return found


def write(path: pathlib.Path, lines: Iterable[str]) -> None:
    """A text of lines."""
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def prepare(out: pathlib.Path, *arguments: object) -> pathlib.Path:
    """The folder of a corpus that is made."""
    run([sys.executable, "-m", "dllm.prepare", *arguments, "--out", out])
    return out


def language_model(
    every: list[Review], wiki: pathlib.Path, work: pathlib.Path, ranks: int, limit: tuple[object, ...]
) -> pathlib.Path:
    """The run of a model of WikiText-2 whose words are those of the reviews; `work`/words has them."""
    write(work / "all.txt", (one.text for one in every))
    words = prepare(work / "words", "--train", work / "all.txt", "--tokenizer", "word", "--vocab-size", 12000)
    write(work / "wiki.txt", (wiki / "train.txt").read_text(encoding="utf-8").lower().split("\n"))
    corpus = prepare(work / "wiki", "--train", work / "wiki.txt", "--tokenizer-from", words)
    train(ranks, work / "wiki-lm", "--data", corpus, *limit, settings=WIKI)
    return work / "wiki-lm"


def accuracy(
    out: pathlib.Path, tokenizer: tuple[object, ...], ranks: int, limit: tuple[object, ...], *arguments: object
) -> float:
    """What a classifier of a fold, whose files are beside the corpus `out`, has right of its test, in %."""
    tables = "--classes", out.parent / "train.tsv", "--test-classes", out.parent / "test.tsv"
    corpus, model = prepare(out, *tables, *tokenizer), out.with_name(f"{out.name}-run")
    settings = CLASSES if arguments else {}
    train(ranks, model, "--preset", "classifier", "--data", corpus, *arguments, *limit, settings=settings)
    return float(last_json(run([sys.executable, "-m", "dllm.evaluate", model, "--split", "test"]))["accuracy"])
