"""Text files of any size as pieces of about a MiB that end with a line, grouped into shards; text dealt out over ranks."""

import os
import pathlib
import sysconfig
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from ..errors import UserError

PIECE = 1 << 20  # bytes read at a time
SHARD = 8 << 20  # bytes of text whose tokens share a file
_SEARCH = 1 << 16  # how far behind the wanted place a cut looks for the end of a line


class Span(NamedTuple):
    """Bytes [start, stop) of a file."""

    path: str
    start: int
    stop: int


@dataclass(frozen=True)
class Piece:
    """Bytes [start, stop) of a file. `last`: the file ends here."""

    path: str
    start: int
    stop: int
    last: bool

    @property
    def size(self):
        return self.stop - self.start

    def count(self, tokenizer):
        """Counter of the units. Raises UserError."""
        return self._apply(tokenizer.count)

    def encode(self, tokenizer):
        """Token numbers, int64. Raises UserError."""
        return self._apply(tokenizer.encode)

    def _apply(self, function):
        """function(bytes, end); text that is not UTF-8 is a UserError with its place."""
        try:
            return function(self.read(), self.last)
        except UnicodeDecodeError as error:
            place = self.start + error.start
            raise UserError(f"{self.path} is not UTF-8 at byte {place}; convert it, or use --tokenizer byte") from None

    def read(self):
        try:
            with open(self.path, "rb") as file:
                file.seek(self.start)
                return file.read(self.stop - self.start)
        except OSError as error:
            raise UserError(f"cannot read {self.path}: {error.strerror}") from None


def plan(parts):
    """Lists of pieces, one list a shard, of files and Spans of files. Every rank plans the same. Raises UserError."""
    shards, size = [[]], 0
    for part in parts:
        for piece in _pieces(part if isinstance(part, Span) else Span(str(part), 0, None)):
            if size >= SHARD:
                shards.append([])
                size = 0
            shards[-1].append(piece)
            size += piece.stop - piece.start
    return [pieces for pieces in shards if pieces]


def _pieces(span):
    path, start, end = span
    try:
        with open(path, "rb") as file:
            length = os.fstat(file.fileno()).st_size
            end = length if end is None else end
            while start < end:
                stop = min(end, _cut(file, start + PIECE))
                yield Piece(path, start, stop, stop == length)
                start = stop
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None


def deal_out(paths, shares):
    """For each rank the Spans (a list) of files that are its own: cut at ends of lines, one rank's part after another's.

    shares : (files, ranks) float64, rows add up to 1
    """
    dealt = [[] for _ in range(shares.shape[1])]
    for path, places in zip(map(str, paths), np.cumsum(shares, axis=1), strict=True):
        try:
            with open(path, "rb") as file:
                length = os.fstat(file.fileno()).st_size
                nears = [round(length * place) for place in places[:-1]]
                cuts = [0, *(_cut(file, near) if 0 < near < length else near for near in nears), length]
        except OSError as error:
            raise UserError(f"cannot read {path}: {error.strerror}") from None
        for spans, start, stop in zip(dealt, cuts, cuts[1:], strict=False):
            spans += [Span(path, start, stop)] * (start < stop)
    return dealt


def evenly(paths, ranks):
    """Shares (files, ranks): as much of each file for every rank."""
    return np.full((len(paths), ranks), 1 / ranks)


def by_file(paths, ranks):
    """Shares (files, ranks): each file has one owner, the largest first that with least so far."""
    shares, loads = np.zeros((len(paths), ranks)), np.zeros(ranks)
    sizes = [pathlib.Path(path).stat().st_size if pathlib.Path(path).exists() else 0 for path in paths]
    for number in sorted(range(len(paths)), key=lambda number: -sizes[number]):
        owner = int(loads.argmin())
        shares[number, owner] = 1
        loads[owner] += sizes[number]
    return shares


def by_dirichlet(paths, ranks, alpha, seed):
    """Shares (files, ranks), those of each file from Dirichlet(alpha): small alpha, few owners of a file, uneven sizes.

    Yurochkin et al. 2019, "Bayesian nonparametric federated learning of neural networks", with files for classes.
    """
    return np.random.default_rng(seed).dirichlet(np.full(ranks, alpha), len(paths))


def _cut(file, near):
    """A place at or behind `near` where text may be cut: after a newline, else after a space, else between characters."""
    file.seek(near)
    ahead = file.read(_SEARCH)
    for mark in (b"\n", b" "):
        place = ahead.find(mark)
        if place >= 0:
            return near + place + 1
    return near + next((k for k, byte in enumerate(ahead) if byte & 0xC0 != 0x80), len(ahead))


def embedded_corpus():
    """The Python standard library of this interpreter as (train files, valid files): sorted, tests left out."""
    root = pathlib.Path(sysconfig.get_paths()["stdlib"])
    skipped = {"test", "tests", "site-packages", "dist-packages", "idle_test", "lib2to3", "__pycache__"}
    files = [path for path in root.rglob("*.py") if not skipped & set(path.relative_to(root).parts)]
    files = [path for path in sorted(files) if _is_text(path)]
    valid = files[10::20]
    return [path for path in files if path not in set(valid)], valid


def _is_text(path):
    try:
        return bool(path.read_bytes().decode())
    except (OSError, UnicodeDecodeError):
        return False
