"""Targets for the lines of a file, in order, by all ranks together."""

from __future__ import annotations

import json
import pathlib
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from ..comm.messages import broadcast
from ..comm.runtime import together
from ..data.lines import Lines
from ..data.text import TextFile
from ..data.tokenizers import Tokenizer, UnknownUnitError
from ..errors import UserError, reason
from ..files import storage
from ..kernels.types import Array
from ..model.base import Model
from .answering import Answer, Answering, in_batches
from .generation import streams_of

if TYPE_CHECKING:
    from mpi4py import MPI

INPUT = "standard input"
LONGEST_LINE = 1 << 20  # bytes
EVERY = 5.0  # seconds between lines of progress


class Target(NamedTuple):
    """A text that the model gives to a line."""

    text: str
    score: float
    logprob: float


def read_lines(comm: MPI.Comm, path: str) -> list[str]:
    """The lines of a file that rank 0 sees, or of its standard input ("-"), on all ranks. Collective. Raises UserError."""
    lines = list[str]()
    with together(comm):
        if comm.rank == 0:
            lines = _lines_of_input() if path == "-" else _lines_of(TextFile(path, path))
            if not lines:
                raise UserError(f"{INPUT if path == '-' else path} is empty")
    return broadcast(comm, lines, list[str])


def _lines_of_input() -> list[str]:
    with tempfile.NamedTemporaryFile() as file:
        shutil.copyfileobj(sys.stdin.buffer, file)
        file.flush()
        return _lines_of(TextFile(file.name, INPUT))


def _lines_of(file: TextFile) -> list[str]:
    lines, texts = Lines(file), list[str]()
    for number in range(len(lines)):
        if len(lines[number]) > LONGEST_LINE:
            raise UserError(f"{lines.place(number)} has over {LONGEST_LINE:,} bytes, which is no sentence: cut it into lines")
        try:
            texts.append(lines[number].decode())
        except UnicodeDecodeError:
            raise UserError(f"{lines.not_utf8(number)}; convert it") from None
    return texts


def tokens_of(tokenizer: Tokenizer, lines: Sequence[str], name: str, longest: int, say: Callable[[str], None]) -> list[Array]:
    """Tokens (n,) of lines, at most `longest` of each, which is told of; none of an empty one. Raises UserError.

    name : of their file
    longest : 0: as many as there are
    """
    found, long = list[Array](), list[int]()
    for number, line in enumerate(lines, 1):
        try:
            text = line.encode()
            tokens = tokenizer.encode(text if text.strip() else b"", False)
        except UnknownUnitError as error:
            raise error.within(f"{name} line {number}") from None
        if 0 < longest < len(tokens):
            long.append(number)
            tokens = tokens[:longest]
        found.append(tokens)
    if long:
        say(
            f"{len(long):,} of {len(lines):,} lines are longer than the model's window, the first is line {long[0]}: "
            f"their first {longest} tokens are read, the rest is left out"
        )
    return found


def translate(
    comm: MPI.Comm, model: Model, how: Answering, lines: Sequence[str], sources: Sequence[Array], say: Callable[[str], None]
) -> list[list[Target]]:
    """The best targets of each line, whose tokens are `sources`, the best first; none of one without tokens. Collective.

    say : told now and then how many are done
    """
    some = [number for number, source in enumerate(sources) if len(source)]
    with together(comm):
        streams = streams_of(model, how.tokenizer, how.lanes * how.beam.width, how.precision)
    last = time.monotonic()

    def work(places: Sequence[int]) -> list[Answer]:
        numbers = [some[place] for place in places]
        answers = list[Answer]()
        for number, found in zip(numbers, how.search(streams, [sources[number] for number in numbers]), strict=True):
            units = how.units(lines[number])
            answers.append(([how.text(one, units) for one in found], [x for one in found for x in (one.score, one.logprob)]))
        return answers

    def progress(done: int) -> None:
        nonlocal last
        if time.monotonic() - last > EVERY:
            last = time.monotonic()
            say(f"{done:,} of {len(some):,} lines")

    answered = in_batches(comm, [len(sources[number]) for number in some], how.lanes, work, progress)
    targets: list[list[Target]] = [[] for _ in lines]
    for number, (texts, values) in zip(some, answered, strict=True):
        targets[number] = [Target(*one) for one in zip(texts, values[::2], values[1::2], strict=True)]
    return targets


def as_lines(targets: Sequence[Sequence[Target]], as_json: bool, ascii_only: bool = False) -> str:
    """What is written: a text a line, or a JSON object {"line", "text", "score", "logprob"} for each target."""
    if not as_json:
        return "".join((found[0].text if found else "") + "\n" for found in targets)
    every = list[dict[str, Any]]()
    for number, found in enumerate(targets, 1):
        every += [{"line": number, **one._asdict()} for one in found]
        every += [] if found else [{"line": number, "text": "", "score": None, "logprob": None}]
    return "".join(json.dumps(one, ensure_ascii=ascii_only) + "\n" for one in every)


def check_place(option: str, path: str | None) -> None:
    """Raise UserError where a file that an option names could not be written: before the work that it is for."""
    if path is None:
        return
    target = pathlib.Path(path)
    problem = "Is a directory" if target.is_dir() else "" if target.absolute().parent.is_dir() else "No such file or directory"
    if problem:
        raise UserError(f"cannot write {option} {path}: {problem}")


def write(option: str, path: str, text: str) -> None:
    """Write a text to the file that an option names, whole or not at all. Raises UserError."""
    try:
        storage.write_text(path, text)
    except OSError as error:
        raise UserError(f"cannot write {option} {path}: {reason(error)}") from None
