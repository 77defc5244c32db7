"""Tasks of pairs by commands: prepared, trained, evaluated and served, whatever the number of ranks; a translation learnt."""

import json
import pathlib
import re
import sys

import numpy as np
import pytest
from helpers.launch import REFUSED, complaint, mpirun, train_arguments, write_pairs
from helpers.run_files import arrays, metrics, same_losses
from helpers.server import Server
from helpers.several_commands import run_several

from dllm.data.corpus import Corpus
from dllm.inference import answering
from dllm.model.precision import products_of

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))
from benchmarks import translation


def prepare_arguments(folder, out, *options, kind="word", splits=("train", "valid", "test")):
    arguments = ["-m", "dllm.prepare", "--tokenizer", kind, "--out", out, *options]
    for split in splits:
        name = "--pairs" if split == "train" else f"--{split}-pairs"
        arguments += [name, folder / f"{split}.src", folder / f"{split}.tgt"]
    return arguments


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A folder with the files of 300 numbers, and a corpus of them."""
    folder = tmp_path_factory.mktemp("small")
    translation.write(folder, 300, spaced=True)
    mpirun(0, *prepare_arguments(folder, folder / "corpus"), check=True)
    return folder


SMALL = (
    "train.carry=window",
    "train.window=16",
    "train.lanes=10",
    "train.precision=fp64",
    "train.lr=0.01",
    "model.dropout=0.2",
)


@pytest.fixture(scope="module")
def straight(small):
    """70 steps of 3 ranks, and beside it the run `resumed`, 31 steps; an epoch of 10 lanes has 54."""
    commands = [
        train_arguments(small / "corpus", small / name, *SMALL, extra=("--max-steps", steps))[1:]
        for name, steps in (("straight", 70), ("resumed", 31))
    ]
    run_several(small / "out", 3, commands, check=True)
    return small / "straight"


def test_any_number_of_ranks_prepares_the_same_corpus_of_all_pairs(small, tmp_path):
    mpirun(3, *prepare_arguments(small, tmp_path / "same"), check=True)
    corpora = [Corpus(folder) for folder in (small / "corpus", tmp_path / "same")]
    assert corpora[0].hash == corpora[1].hash
    lines = sorted(zip(*((small / f"train.{suffix}").read_text().splitlines() for suffix in ("src", "tgt")), strict=True))
    for corpus in corpora:
        pairs_of_split = answering.read_split(corpus, "train")
        text = [tuple(answering.as_text(corpus.tokenizer, side).strip() for side in pair[:2]) for pair in pairs_of_split]
        assert sorted(text) == lines


def test_one_rank_has_the_losses_of_three(small, straight):
    mpirun(1, *train_arguments(small / "corpus", small / "one-rank", *SMALL, extra=("--max-steps", 70)), check=True)
    same_losses(small / "one-rank", straight)


def test_a_resumed_run_is_the_uninterrupted_one_to_the_bit(small, straight):
    run = small / "resumed"
    mpirun(3, "-m", "dllm.train", "--resume", run, "--max-steps", 70, "--progress", "none", check=True)
    expected, scalars = arrays(straight, 70)
    found, others = arrays(run, 70)
    assert others == scalars
    for name, array in expected.items():
        np.testing.assert_array_equal(found[name], array)
    assert metrics(run, "train") == metrics(straight, "train")


def last_line(done):
    return json.loads(done.stdout.splitlines()[-1])


def test_the_losses_of_a_split_count_targets_alone_and_are_those_of_each_pair_by_itself(small, straight):
    plain = last_line(mpirun(1, "-m", "dllm.evaluate", straight, "--lanes", 7, check=True))
    targets = (small / "test.tgt").read_text().splitlines()
    assert plain["tokens"] == sum(len(target.split()) + 1 for target in targets)
    alone = last_line(mpirun(1, "-m", "dllm.evaluate", straight, "--pairs", check=True))
    np.testing.assert_allclose(alone["loss"], plain["loss"], rtol=1e-10)
    training = metrics(straight, "train")
    assert training[0]["loss"] == pytest.approx(np.log(Corpus(small / "corpus").vocabulary), rel=0.05)


PREPARE = "dllm.prepare --tokenizer char --out new"
TRAIN = "dllm.train --data corpus --out new --progress none --set train.carry=window"
REFUSALS = {  # command: what the message says
    "lines differ": (f"{PREPARE} --pairs two one", "two has 2 lines, one has 1: line i of one"),
    "no lines": (f"{PREPARE} --pairs none none", "there are no pairs in none"),
    "a side always empty": (f"{PREPARE} --pairs one blank", "there are no pairs in one, blank"),
    "no UTF-8": (f"{PREPARE} --pairs two latin", "latin line 2 is not UTF-8; convert it, or"),
    "no file": (f"{PREPARE} --pairs two three", "cannot read three: No such file"),
    "all too long": (f"{PREPARE} --pairs two two --longest 3", "no pair of the train files is short enough"),
    "both kinds": (f"{PREPARE} --pairs two two --train one", "give either --train or --pairs"),
    "neither kind": (PREPARE, "give either --train or --pairs"),
    "kinds mixed": (f"{PREPARE} --pairs two two --valid one", "--valid goes with --train, which is not given"),
    "dealt out": (f"{PREPARE}{{rank}} --pairs two two --deal evenly", "--deal is for text"),
    "one folder": (f"{PREPARE} --pairs {{rank}} two", "so --out must have it too"),
    "states carried": (f"{TRAIN} --set train.carry=epoch", "--preset pairs, or --set train.carry=window"),
    "narrow": (f"{TRAIN} --set train.window=10", "has a pair of 11 tokens and a window must hold it: --set train.window=11"),
    "many lanes": (f"{TRAIN} --set train.lanes=600", "has 540 pairs: too few for 600 lanes"),
    "one file": ("dllm.evaluate straight --pairs one", "it takes SRC and TGT, or nothing"),
    "write what": ("dllm.evaluate straight --write file", "--write goes with --pairs"),
    "an empty line": ("dllm.evaluate straight --pairs gap gap", "gap is empty at line 2: take the line out of both"),
    "an unknown word": ("dllm.evaluate straight --pairs one one", "one line 1 has a word that is not among the vocabulary's"),
    "no folder to write to": ("dllm.evaluate straight --pairs --write no/file", "cannot write --write no/file: No such"),
    "float64": (
        "dllm.evaluate straight --pairs --precision int8",
        "straight has parameters of float64: --precision int8 is",
    ),
    "prompt for pairs": ("dllm.generate straight --prompt a", "straight was trained on pairs: give --source"),
    "text and pairs": ("dllm.generate straight --prompt a --source b", "give either --prompt or --source"),
    "what cuts words": ("dllm.evaluate straight --bleu-tokenize zh", "--bleu-tokenize goes with --pairs"),
    "no sources": ("dllm.generate straight --source-file three", "cannot read three: No such file"),
    "sources without a line": ("dllm.generate straight --source-file none", "none is empty"),
    "sources of another encoding": ("dllm.generate straight --source-file latin", "latin line 2 is not UTF-8; convert it"),
    "sources of unknown words": ("dllm.generate straight --source-file one", "one line 1 has a word that is not among"),
    "targets nowhere": ("dllm.generate straight --source-file gap --out no/file", "cannot write --out no/file: No such file"),
    "more than are kept": ("dllm.generate straight --source-file gap --beam 2 --n-best 3", "--n-best 3 takes --beam 3"),
    "out of nothing": ("dllm.generate straight --source en --out file", "--out goes with --source-file"),
    "a penalty of no search": ("dllm.generate straight --source en --length-penalty 1", "go with --beam"),
    "no attention": ("dllm.generate straight --source en --attention a.png", "--attention needs attention, which straight"),
    "covered by nothing": ("dllm.evaluate straight --pairs --beam 2 --coverage 1", "--coverage needs attention"),
}


@pytest.fixture(scope="module")
def refused(small, straight, tmp_path_factory):
    """case -> how two ranks ended, and whether something was made; all cases in one start."""
    files = {"two": b"a\nb\n", "one": b"a\n", "none": b"", "blank": b" \n", "latin": b"a\n\xff\n", "gap": b"en\n\nde\n"}
    for name, data in files.items():
        (small / name).write_bytes(data)
    folder, before = tmp_path_factory.mktemp("refused"), set(small.iterdir())
    ends = run_several(folder / "out", 2, [command.split() for command, _ in REFUSALS.values()], cwd=small)
    return dict(zip(REFUSALS, ends, strict=True)), set(small.iterdir()) == before


@pytest.mark.parametrize("case", REFUSALS)
def test_what_does_not_suit_pairs_is_refused_in_one_line(refused, case):
    end = refused[0][case]
    text = "".join(end.texts if "generate" not in REFUSALS[case][0] else end.texts[:1])  # generate knows nothing of ranks
    lines = [line for line in text.splitlines() if not re.match("reading|counting|building|encoding|.* are left out", line)]
    assert len(lines) == 1
    assert REFUSALS[case][1] in lines[0]
    assert end.codes == {REFUSED}


def test_nothing_is_left_of_what_was_refused(refused):
    assert refused[1]


def test_a_model_of_text_has_no_pairs(world):
    for command, message in (
        ("evaluate run --pairs", "run was not trained on pairs"),
        ("generate run --source a", "give --prompt"),
    ):
        done = mpirun(0, "-m", *f"dllm.{command}".split(), cwd=world)
        assert done.returncode == REFUSED
        assert message in complaint(done)


def test_pairs_with_an_empty_side_and_long_ones_are_left_out_and_told_of(tmp_path):
    examples = [("a b", "c"), ("", "d"), ("e", "  "), ("f\r", "g"), ("h " * 9, "i")]
    write_pairs(tmp_path, examples)
    done = mpirun(0, *prepare_arguments(tmp_path, tmp_path / "out", "--longest", 9, splits=["train"]), check=True)
    assert f"2 of 5 pairs are left out, since a side is empty, the first at {tmp_path}/train.src line 2" in done.stdout
    assert "1 of 3 train pairs are left out: they have more than 9 tokens" in done.stdout
    corpus = Corpus(tmp_path / "out")
    assert (corpus.split("train")["pairs"], corpus.split("train")["longest"]) == (2, 5)
    assert sorted(pair[2].strip() for pair in answering.read_split(corpus, "train")) == ["c", "g"]


def test_each_rank_may_have_pairs_of_its_own(tmp_path):
    for rank in range(2):
        (tmp_path / str(rank)).mkdir()
        write_pairs(tmp_path / str(rank), [(f"a{number}", f"b{number % 3}") for number in range(10 * rank, 10 * rank + 12)])
    out = tmp_path / "corpus{rank}"
    mpirun(2, *prepare_arguments(tmp_path / "{rank}", out, "--share-vocabulary", splits=["train"]), check=True)
    assert [Corpus(tmp_path / f"corpus{rank}").split("train")["pairs"] for rank in range(2)] == [12, 12]
    mpirun(2, *train_arguments(out, tmp_path / "run", *SMALL, extra=("--max-steps", 4)), check=True)
    assert len(metrics(tmp_path / "run", "train")) == 4


def test_numbers_are_spelt_in_two_languages_as_well_as_anybody_could_and_on_any_number_of_ranks_alike(tmp_path):
    translation.write(tmp_path, 10000, spaced=True)
    mpirun(2, *prepare_arguments(tmp_path, tmp_path / "corpus"), check=True)
    size = "model.embedding=64", "model.hidden=128", "train.lanes=64", "train.epochs=6", "train.lr=0.01"
    settings = [part for setting in size for part in ("--set", setting)]
    run = tmp_path / "run"
    training = ["-m", "dllm.train", "--preset", "pairs", "--data", tmp_path / "corpus", "--out", run, "--progress", "plain"]
    done = mpirun(2, *training, *settings, timeout=250, check=True)
    assert re.search(r"\| (en|de)( \d)+  -> \w+", done.stdout)
    results = []
    for ranks in (1, 3):
        files = tmp_path / "test.src", tmp_path / "test.tgt"
        options = "--pairs", *(files if ranks == 3 else ()), "--lanes", 64 * ranks, "--write", tmp_path / f"said-{ranks}"
        results.append(last_line(mpirun(ranks, "-m", "dllm.evaluate", run, *options, check=True)))
    assert [result.pop("split") for result in results] == ["test", str(files[0])]
    assert results[0] == results[1]
    said, wanted = ((tmp_path / name).read_text().splitlines() for name in ("said-3", "test.tgt"))
    assert len(said) == len(wanted) == results[0]["pairs"] == 1000
    assert (tmp_path / "said-1").read_text() == (tmp_path / "said-3").read_text()  # a split is shuffled
    assert results[0]["exact_match"] == pytest.approx(sum(map(str.__eq__, said, wanted)) / 10)
    assert results[0]["exact_match"] >= 99
    assert "|tok:13a|" in results[0]["bleu_signature"]
    mpirun(2, "-m", "dllm.generate", run, "--source-file", files[0], "--out", tmp_path / "lines", "--beam", 1, check=True)
    assert (tmp_path / "lines").read_text().splitlines() == said
    assert min(results[0]["bleu"], results[0]["rougeL"]) >= 99
    int8 = last_line(mpirun(2, "-m", "dllm.evaluate", run, "--pairs", "--precision", "int8", check=True))
    assert int8["precision"] == products_of("int8", np.float32)
    assert int8["exact_match"] >= 99
    assert int8["perplexity"] == pytest.approx(results[0]["perplexity"], rel=0.01)
    spoken = mpirun(0, "-m", "dllm.generate", run, "--source", "de 4 0 7 1", check=True).stdout
    assert spoken.split() == ["vier", "tausend", "ein", "und", "siebzig"]
    sources = files[0].read_text().splitlines()[:50]
    with Server(run, ranks=1) as server:
        answer = server.complete(sources, max_tokens=64, temperature=0).json()
    assert [" ".join(choice["text"].split()) for choice in answer["choices"]] == said[:50]
    assert {choice["finish_reason"] for choice in answer["choices"]} == {"stop"}
