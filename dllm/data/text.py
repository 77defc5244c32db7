"""Text files of any size as pieces of about a MiB that end with a line, grouped into shards; where the embedded corpus is."""

import os
import pathlib
import sysconfig
from dataclasses import dataclass

from ..errors import UserError

PIECE = 1 << 20  # bytes read at a time
SHARD = 8 << 20  # bytes of text whose tokens share a file
_SEARCH = 1 << 16  # how far behind the wanted place a cut looks for the end of a line


@dataclass(frozen=True)
class Piece:
    """Bytes [start, stop) of a file. `last`: the file ends here."""

    path: str
    start: int
    stop: int
    last: bool

    def read(self):
        try:
            with open(self.path, "rb") as file:
                file.seek(self.start)
                return file.read(self.stop - self.start)
        except OSError as error:
            raise UserError(f"cannot read {self.path}: {error.strerror}") from None


def plan(paths):
    """Lists of pieces, one list a shard. It depends on the files only, so every rank plans the same. Raises UserError."""
    shards, size = [[]], 0
    for path in map(str, paths):
        for piece in _pieces(path):
            if size >= SHARD:
                shards.append([])
                size = 0
            shards[-1].append(piece)
            size += piece.stop - piece.start
    return [pieces for pieces in shards if pieces]


def _pieces(path):
    try:
        with open(path, "rb") as file:
            length = os.fstat(file.fileno()).st_size
            start = 0
            while start < length:
                stop = min(length, _cut(file, start + PIECE))
                yield Piece(path, start, stop, stop == length)
                start = stop
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None


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
