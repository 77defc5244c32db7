"""Text files of any size as pieces of about a MiB that end with a line, grouped into shards; text dealt out over ranks."""

from __future__ import annotations

import codecs
import dataclasses
import os
import pathlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import BinaryIO, NamedTuple, TypeVar

import numpy as np

from ..errors import UserError, reason
from ..files import storage
from ..kernels.types import Array
from .tokenizers import Tokenizer, UnknownUnitError

PIECE = 1 << 20  # bytes read at a time
LINE = 1 << 20  # bytes of a line whose units are an example
SHARD = 8 << 20  # bytes of text whose tokens share a file
UTF16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
_SEARCH = 1 << 16  # how far behind the wanted place a cut looks for the end of a line
Path = str | os.PathLike[str]
T = TypeVar("T")


class TextFile(NamedTuple):
    """A plain file of text."""

    path: str
    name: str  # what the user calls it
    exact: bool = False  # its bytes are kept as they are, whichever tokenizer reads them


class Span(NamedTuple):
    """Bytes [start, stop) of a file."""

    file: TextFile
    start: int
    stop: int


class Encoded(NamedTuple):
    """A piece of a split as tokens."""

    tokens: Array  # (n,) int64
    size: int  # bytes of the text that they say
    left_out: tuple[int, ...] = ()  # places in the piece of records that are too long
    figures: tuple[int, int] = (0, 0)  # how many records, tokens of the longest
    ends: Array | None = None  # (r,) int64, behind the last token of each record, of those with labels
    labels: Array | None = None  # int32, of each token (-1: none) or of each record


@dataclass(frozen=True)
class TextPiece:
    """Bytes [start, stop) of a file. `last`: the file ends here; `before`: and another one follows.

    All tokenizers but that of bytes read text: without a byte-order mark, with one kind of line end, and each file begins on a
    line of its own.
    """

    file: TextFile
    start: int
    stop: int
    last: bool
    before: bool = False

    @property
    def size(self) -> int:
        """Bytes of the file."""
        return self.stop - self.start

    def count(self, tokenizer: type[Tokenizer]) -> Counter[str]:
        """Counter of the units. Raises UserError."""
        return self._apply(tokenizer.count, self._text(tokenizer))

    def lines(self, tokenizer: type[Tokenizer]) -> list[bytes]:
        """Its lines without their ends; the last, maybe an empty one, goes on in the next piece. Raises UserError."""

        def lines(data: bytes, end: bool) -> list[bytes]:
            data.decode()  # fails with its place
            return data.split(b"\n")

        return self._apply(lines, self._text(tokenizer))

    def encode(self, tokenizer: Tokenizer) -> Encoded:
        """Its tokens. Raises UserError."""
        data = self._text(type(tokenizer))
        try:
            return Encoded(self._apply(tokenizer.encode, data), len(data))
        except UnknownUnitError as error:
            raise error.within(self.file.name) from None

    def _text(self, tokenizer: type[Tokenizer]) -> bytes:
        data = self.read()
        if self.file.exact or tokenizer.exact:
            return data
        if self.start == 0:
            data = data.removeprefix(codecs.BOM_UTF8)
        if b"\r\n" in data:  # no cut is between the two
            data = data.replace(b"\r\n", b"\n")
        return data + b"\n" if self.before and data and not data.endswith(b"\n") else data

    def _apply(self, function: Callable[[bytes, bool], T], data: bytes) -> T:
        """function(data, end); text that is not UTF-8 is a UserError with its place."""
        try:
            return function(data, self.last)
        except UnicodeDecodeError as error:
            raise UserError(f"{self.file.name} {self._not_utf8(error)}; convert it, or use --tokenizer byte") from None

    def _not_utf8(self, error: UnicodeDecodeError) -> str:
        data = self.read()
        if self.start == 0 and data.startswith(UTF16):
            return "begins with the byte-order mark of UTF-16, and is not UTF-8"
        try:
            data.decode()
        except UnicodeDecodeError as there:  # at its place in the file, from which marks and CRs are not yet gone
            error = there
        return f"is not UTF-8 at byte {self.start + error.start}"

    def read(self) -> bytes:
        """The bytes as they are in the file. Raises UserError."""
        try:
            with open(self.file.path, "rb") as file:
                file.seek(self.start)
                return file.read(self.stop - self.start)
        except OSError as error:
            raise UserError(f"cannot read {self.file.name}: {reason(error)}") from None


def as_file(path: Path | TextFile) -> TextFile:
    """The file at a path."""
    return path if isinstance(path, TextFile) else TextFile(str(path), str(path))


def examples_of_text(pieces: Iterable[TextPiece], tokenizer: type[Tokenizer]) -> Iterator[set[str]]:
    """The distinct units of each line of pieces in order, of long lines those of the first `LINE` bytes. Raises UserError.

    They depend on the line alone, not on where pieces are cut, which other lines decide.
    """

    def units(line: bytes) -> set[str]:
        return set(tokenizer.count(line[:LINE].decode(errors="ignore").encode(), False))

    begun = b""
    for piece in pieces:
        first, *others = piece.lines(tokenizer)
        begun = (begun + first)[:LINE]
        if others:
            yield units(begun)
            yield from map(units, others[:-1])
            begun = others[-1]
        if piece.last and begun:
            yield units(begun)
            begun = b""


def plan_text(parts: Iterable[Path | TextFile | Span]) -> list[list[TextPiece]]:
    """Lists of pieces, one list a shard, of files and Spans of files. Every rank plans the same. Raises UserError."""
    shards: list[list[TextPiece]] = [[]]
    size = 0
    for part in parts:
        for piece in _pieces(*part) if isinstance(part, Span) else _pieces(as_file(part)):
            if shards[-1] and shards[-1][-1].last:
                shards[-1][-1] = dataclasses.replace(shards[-1][-1], before=True)
            if size >= SHARD:
                shards.append([])
                size = 0
            shards[-1].append(piece)
            size += piece.size
    return [pieces for pieces in shards if pieces]


def _pieces(text: TextFile, start: int = 0, end: int | None = None) -> Iterator[TextPiece]:
    try:
        storage.check_regular(text.path)
        with open(text.path, "rb") as file:
            length = os.fstat(file.fileno()).st_size
            end = length if end is None else end
            while start < end:
                stop = min(end, _cut(file, start + PIECE))
                yield TextPiece(text, start, stop, stop == length)
                start = stop
    except OSError as error:
        raise UserError(f"cannot read {text.name}: {reason(error)}") from None


def deal(
    splits: Mapping[str, Sequence[Path | TextFile]], ranks: int, how: str, alpha: float, seed: int
) -> list[dict[str, list[Span]]]:
    """For each rank {split: Spans}: "evenly", by "files" or "dirichlet"; all but train always evenly. Raises UserError."""
    dealt = {}
    for name, paths in splits.items():
        if name != "train" or how == "evenly":
            shares = evenly(paths, ranks)
        elif how == "files":
            shares = by_file(paths, ranks)
        else:
            shares = by_dirichlet(paths, ranks, alpha, seed)
        dealt[name] = deal_out(paths, shares)
        empty = next((rank for rank, spans in enumerate(dealt[name]) if not spans), None)
        if empty is not None:
            hint = {"evenly": "", "files": ", or more files", "dirichlet": ", or a larger --alpha"}[how]
            raise UserError(f"rank {empty} of {ranks} gets no {name} text: take fewer ranks{hint}")
    return [{name: parts[rank] for name, parts in dealt.items()} for rank in range(ranks)]


def deal_out(paths: Sequence[Path | TextFile], shares: Array) -> list[list[Span]]:
    """For each rank the Spans (a list) of files that are its own: cut at ends of lines, one rank's part after another's.

    shares : (files, ranks) float64, rows add up to 1
    """
    dealt: list[list[Span]] = [[] for _ in range(shares.shape[1])]
    for whole, places in zip(map(as_file, paths), np.cumsum(shares, axis=1), strict=True):
        try:
            storage.check_regular(whole.path)
            with open(whole.path, "rb") as file:
                length = os.fstat(file.fileno()).st_size
                nears = [round(length * place) for place in places[:-1]]
                cuts = [0, *(_cut(file, near) if 0 < near < length else near for near in nears), length]
        except OSError as error:
            raise UserError(f"cannot read {whole.name}: {reason(error)}") from None
        for spans, start, stop in zip(dealt, cuts, cuts[1:], strict=False):
            spans += [Span(whole, start, stop)] * (start < stop)
    return dealt


def evenly(paths: Sequence[Path | TextFile], ranks: int) -> Array:
    """Shares (files, ranks), float64: as much of each file for every rank."""
    return np.full((len(paths), ranks), 1 / ranks)


def by_file(paths: Sequence[Path | TextFile], ranks: int) -> Array:
    """Shares (files, ranks), float64: each file has one owner, the largest first that with least so far."""
    shares, loads = np.zeros((len(paths), ranks)), np.zeros(ranks)
    files = [pathlib.Path(as_file(path).path) for path in paths]
    sizes = [path.stat().st_size if path.exists() else 0 for path in files]
    for number in sorted(range(len(paths)), key=lambda number: -sizes[number]):
        owner = int(loads.argmin())
        shares[number, owner] = 1
        loads[owner] += sizes[number]
    return shares


def by_dirichlet(paths: Sequence[Path | TextFile], ranks: int, alpha: float, seed: int) -> Array:
    """Shares (files, ranks), float64, of each file from Dirichlet(alpha): small alpha, few owners of a file, uneven sizes.

    Yurochkin et al. 2019, "Bayesian nonparametric federated learning of neural networks", with files for classes.
    """
    return np.random.default_rng(seed).dirichlet(np.full(ranks, alpha), len(paths))


def _cut(file: BinaryIO, near: int) -> int:
    """A place at or behind `near` where text may be cut: after a newline, else after a space, else between characters."""
    file.seek(near)
    ahead = file.read(_SEARCH)
    for mark in (b"\n", b" "):
        place = ahead.find(mark)
        if place >= 0:
            return near + place + 1
    return near + next((k for k, byte in enumerate(ahead) if byte & 0xC0 != 0x80), len(ahead))
