"""Tags of words or classes of texts, by a trained model, line by line: dllm predict MODEL FILE."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from .. import cli
from ..comm import runtime
from ..comm.node_info import find_node, leader_first
from ..errors import DONE, UserError
from ..files import telling
from ..inference.labelling import words_in

if TYPE_CHECKING:
    from mpi4py import MPI

    from ..inference.answering import Answer
    from ..inference.loaded_model import LoadedModel
    from ..kernels.types import Array

EPILOG = """
examples
  python -m dllm.tools.predict RUN sentences.txt                 a word, a tab and its tag a line; an empty line behind each
  echo "a fine film" | python -m dllm.tools.predict RUN -        the class, a tab and how probable it is
  mpirun -n 8 python -m dllm.tools.predict RUN reviews.txt --out classes.txt --json

RUN is that of a tagger or a classifier, FILE has a sentence or a text a line, - is standard input. A sentence's words are what
is between white space. With --json each line is an object: {"words", "tags", "probabilities"}, or {"label", "probabilities":
{label: probability}}. An empty line has no tags, and the label null. Of a model that hears, FILE is a recording: printed
is what is said in it, or its class; with --json {"text"} or {"label", "probabilities"}.
"""
TOGETHER = 32  # texts of a batch; what is said of one does not depend on the others


def main(argv: list[str] | None = None) -> int:
    """The command. Returns its exit code."""
    return cli.collective(predict, argv, product=True)


def predict(argv: list[str], comm: MPI.Comm) -> int:
    """Print what a model says of each line of a file. Collective. Raises UserError."""
    parser = cli.Parser("tools.predict", __doc__, EPILOG, comm.rank)
    parser.add_argument("model", metavar="RUN", help="folder of a run, or of a model made by dllm export; or ipfs://CID")
    parser.add_argument("file", metavar="FILE", help="a sentence or a text a line; -: standard input")
    parser.add_argument("--out", metavar="FILE", help="write it to a file")
    parser.add_argument("--json", action="store_true", help="one JSON object a line, with probabilities")
    parser.add_argument("--checkpoint", choices=("best", "last"), default="best", help="of a run; default: best")
    with runtime.together(comm):
        options = parser.parse_args(argv)
    runtime.check_same(comm, vars(options))
    node = find_node(comm)

    from ..data.tokenizers import UnknownUnitError
    from ..inference import labelling, source_files
    from ..inference.loaded_model import LoadedModel
    from ..kernels.team import Team
    from ..model.encoder_model import EncoderModel
    from ..runs.gathering import gather_run
    from ..training.warmup import warm_up

    say = cli.warn_once(comm)
    gather_run(comm, options.model, say, options.checkpoint == "best")
    model = runtime.agree(comm, LoadedModel.open, options.model, options.checkpoint == "best")
    runtime.check_same(comm, {"model": model.fingerprint})
    for warning in model.warnings:
        say(warning)
    if model.tokenizer.bands:
        return _of_recording(comm, options, model)
    labels = runtime.agree(comm, labelling.labels_of, model, options.model)
    with runtime.together(comm):
        source_files.check_place("--out", options.out)
    lines = source_files.read_lines(comm, options.file)
    texts, classes = [], model.config.kind == "classifier"
    with runtime.together(comm):
        for number, line in enumerate(lines, 1):
            try:
                words = [labelling.text_of(model.tokenizer, line)] if classes else labelling.words_of(model.tokenizer, line)
            except UnknownUnitError as error:
                raise error.within(f"{options.file} line {number}") from None
            if not classes and not all(map(len, words)):
                raise UserError(f"{options.file} line {number} has a word of which the vocabulary has nothing")
            texts.append(words)
        window, lanes = (model.window, TOGETHER) if classes else windows_of(texts, model.window, options.file)
        network = model.network(window, lanes, Team(node.threads))
    with leader_first(node):
        warm_up(model.settings)
    assert isinstance(network, EncoderModel)  # as `labels_of` has seen
    said = labelling.say_labels(comm, network, labels, texts)
    with runtime.together(comm):
        if comm.rank == 0:
            _tell(
                options.out,
                as_json(lines, said, labels, classes, _ascii(options)) if options.json else as_text(lines, said, classes),
            )
    runtime.finish(comm)
    return DONE


def windows_of(texts: Sequence[Sequence[Array]], window: int, name: str) -> tuple[int, int]:
    """Steps and lanes of windows that hold any of some sentences, and no more than TOGETHER windows of training do.

    texts : tokens of each word of each sentence
    name : of their file

    Raises UserError where one sentence alone is longer.
    """
    lengths, most = [sum(map(len, words)) for words in texts], TOGETHER * window
    longest = max(1, *lengths)
    if longest > most:
        where = f"{name} line {lengths.index(longest) + 1}"
        raise UserError(f"{where} has {longest:,} tokens, which is no sentence: at most {most:,} are read at once")
    return longest, min(TOGETHER, most // longest)


def _tell(out: str | None, shown: str) -> None:
    """Write what is said to a file, or to standard output. Raises UserError."""
    from ..inference import source_files

    if out:
        source_files.write("--out", out, shown)
    else:
        sys.stdout.write(shown)
        sys.stdout.flush()


def _of_recording(comm: MPI.Comm, options: argparse.Namespace, model: LoadedModel) -> int:
    """Print what is said in a recording, or its class."""
    from ..inference import source_files
    from ..inference.speech import of_recording

    with runtime.together(comm):
        source_files.check_place("--out", options.out)
        if options.file == "-":
            raise UserError(f"{options.model} hears recordings, which are files: give the path of one in place of -")
        if comm.rank == 0:
            found = of_recording(model, options.file)
            label = found.get("label")
            shown = found["text"] if label is None else f"{label}\t{found['probabilities'][label]:.4f}"
            _tell(options.out, (json.dumps(found, ensure_ascii=_ascii(options)) if options.json else shown) + "\n")
    runtime.finish(comm)
    return DONE


def as_text(lines: Sequence[str], said: Sequence[Answer], classes: bool) -> str:
    """A word, a tab and its tag a line, an empty line behind each sentence; or a class, a tab and its probability a line."""
    if classes:
        return "".join(f"{found[0]}\t{max(values):.4f}\n" if found else "\t\n" for found, values in said)
    parts = [zip(words_in(line), tags, strict=True) for line, (tags, _) in zip(lines, said, strict=True)]
    return "".join("".join(f"{word}\t{tag}\n" for word, tag in part) + "\n" for part in parts)


def _ascii(options: argparse.Namespace) -> bool:
    """Whether what is written has to do without other letters."""
    return not (options.out or telling.has_all_letters())


def as_json(
    lines: Sequence[str], said: Sequence[Answer], labels: Sequence[str], classes: bool, ascii_only: bool = False
) -> str:
    """The same with probabilities, an object a line."""
    rows: list[dict[str, object]] = []
    for line, (found, values) in zip(lines, said, strict=True):
        if classes:
            label = found[0] if found else None
            rows.append({"label": label, "probabilities": dict(zip(labels, values, strict=True)) if found else {}})
        else:
            rows.append({"words": words_in(line), "tags": found, "probabilities": values})
    return "".join(json.dumps(row, ensure_ascii=ascii_only) + "\n" for row in rows)


if __name__ == "__main__":
    sys.exit(main())
