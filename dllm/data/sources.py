"""Texts as people have them: files, folders, pipes, URLs, packed or in records, each of which becomes a plain file of text.

A source is a stream of bytes, and formats.py makes text of it. What is a plain file already is read where it lies; all else is
written to one beside the corpus, once for each disk, and the ranks of a disk share the work file by file. So memory is bounded,
and who reads what changes nothing.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import os
import pathlib
import shutil
import stat
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from ..comm import messages
from ..comm.replicas import Domains
from ..comm.runtime import together
from ..errors import UserError, reason
from .formats import BLOCK, Stream, TextError, is_plain, texts
from .label_files import LabelledFile
from .sound_tokenizers import levels
from .source_names import STDIN, is_stream, open_url, readable_everywhere
from .text import TextFile

if TYPE_CHECKING:
    from mpi4py import MPI

Names: TypeAlias = Mapping[str, Sequence[Any]]  # split -> names of files, pairs of such, or LabelledFiles

RESERVE = 0.02  # of a disk that is left free, at most `MOST_RESERVED` bytes
MOST_RESERVED = 1 << 28


@dataclass(frozen=True)
class Reading:
    """How text is read.

    field : of records, whose text is wanted; "": there are no records
    exact : bytes are kept as they are
    held_out : split -> the share of the train text's documents, or lines, that becomes this split
    seed : draws which
    rate : of recordings, samples a second: each becomes the bytes of its levels; 0: there are none
    """

    field: str = ""
    exact: bool = False
    held_out: Mapping[str, float] = dataclasses.field(default_factory=dict)
    seed: int = 1
    rate: int = 0


@contextlib.contextmanager
def plain_files(
    comm: MPI.Comm, names: Names, near: pathlib.Path, reading: Reading, private: bool, say: Callable[[str], None]
) -> Iterator[dict[str, list[Any]]]:
    """{split: TextFiles, pairs of them, or LabelledFiles} for the time of a `with`. Collective. Raises UserError on all ranks.

    near : a folder, there or not; what is unpacked lies in it meanwhile
    private : the names are this rank's own
    """
    domains = Domains(0, (0,), ("",)) if private else Domains.find(comm, near)
    if not private:
        readable_everywhere(comm, domains.hosts, itertools.chain.from_iterable(map(flat, names.values())))
    sources = [_Source(split, name) for split, paths in names.items() for name in flat(paths)]
    with together(comm):
        made = {number for number, source in enumerate(sources) if source.must_be_made(reading)}
        _check_streams(comm, [sources[number] for number in made], domains, private)
    token = os.urandom(8).hex()
    folder = near / f".text-{token if private else messages.broadcast(comm, token, str)}.tmp"
    with contextlib.ExitStack() as undo:
        with together(comm):
            if made and domains.leads:
                undo.callback(_remove, folder, [path for path in (folder, *folder.parents) if not path.exists()])
                _make(folder)
        with together(comm):
            mine = _my_share(sources, made, domains)
            for number in mine:
                say(f"reading {sources[number].name}")
                _write(sources[number], number, folder, reading)
        files = _as_named(names, sources, made, folder, reading)
        with together(comm):
            _check_shares(files, reading.held_out)
        yield files


def flat(paths: Iterable[Any]) -> Iterator[Any]:
    """Names out of names, pairs of names, and LabelledFiles."""
    for path in paths:
        if isinstance(path, list | tuple) and not isinstance(path, TextFile):
            yield from path
        elif isinstance(path, LabelledFile):
            yield path.file
        else:
            yield path


@dataclass(frozen=True)
class _Source:
    """A name on the command line, for a split."""

    split: str
    name: str

    def must_be_made(self, reading: Reading) -> bool:
        """Whether it is no plain file. Raises UserError."""
        if is_stream(self.name) or "://" in self.name:
            return True
        try:
            found = os.stat(self.name)
            if not stat.S_ISREG(found.st_mode):
                raise UserError(f"cannot read {self.name}: it is not a file")
            with open(self.name, "rb") as file:
                head = file.read(8)
        except (OSError, ValueError) as error:
            hint = "; mpirun does not hand it on: mkfifo makes a pipe that has a name" if "/fd/" in self.name else ""
            raise UserError(f"cannot read {self.name}: {reason(error)}{hint}") from None
        grows = found.st_size == 0 and len(head) > 0  # as what lies below /proc
        held_out = self.split == "train" and bool(reading.held_out)
        return bool(grows or held_out or reading.field or reading.rate or not is_plain(head))

    @property
    def size(self) -> int:
        """Bytes, where that is known."""
        with contextlib.suppress(OSError, ValueError):
            return os.stat(self.name).st_size
        return 0

    def open(self) -> Stream:
        """Its bytes. Raises OSError, UserError."""
        if self.name == STDIN:
            if sys.stdin is None:
                raise UserError(f"cannot read {STDIN}: standard input is closed")
            return sys.stdin.buffer
        return open_url(self.name) if "://" in self.name else open(self.name, "rb")


def _check_streams(comm: MPI.Comm, made: Iterable[_Source], domains: Domains, private: bool) -> None:
    """Raise UserError where a stream cannot be had by those who need it."""
    streams = [source.name for source in made if is_stream(source.name)]
    if len(set(streams)) < len(streams):
        raise UserError(f"{max(streams, key=streams.count)} is given twice: a stream can be read once")
    if streams and not domains.shared:
        hosts = " and ".join(sorted({domains.hosts[leader] for leader in domains.leaders}))
        raise UserError(
            f"{streams[0]} can be read once, but ranks ({hosts}) see different disks: make it a file on each of them"
        )
    if comm.size > 1 and STDIN in streams:  # MPICH ends the job where it is read too slowly, Open MPI stops in the middle
        raise UserError("mpirun does not hand on a long standard input: name a pipe that mkfifo makes, or take one rank")


def _my_share(sources: Sequence[_Source], made: Iterable[int], domains: Domains) -> list[int]:
    """Which sources this rank reads for its disk: streams belong to the lowest, of the others each gets every n-th."""
    group = [rank for rank, leader in enumerate(domains.of) if leader == domains.of[domains.rank]]
    streams = [number for number in made if is_stream(sources[number].name)]
    files = sorted(set(made) - set(streams), key=lambda number: (-sources[number].size, number))
    place = group.index(domains.rank)
    return (streams if place == 0 else []) + files[place :: len(group)]


def _as_named(
    names: Names, sources: Sequence[_Source], made: set[int], folder: pathlib.Path, reading: Reading
) -> dict[str, list[Any]]:
    """`names` with files for names, and what is held out of the train text."""

    def place(number: int, split: str) -> TextFile:
        path = str(_place(folder, number, split)) if number in made else sources[number].name
        return TextFile(path, sources[number].name, reading.exact)

    files: dict[str, list[Any]] = {split: [] for split in names}
    numbers = itertools.count()
    for split, paths in names.items():
        for path in paths:
            both = [place(next(numbers), split) for _ in flat([path])]
            if isinstance(path, LabelledFile):
                files[split].append(LabelledFile(both[0], path.label))
            else:
                files[split].append(both[0] if isinstance(path, str | os.PathLike) else tuple(both))
    for split in reading.held_out:
        files[split] = [place(number, split) for number, source in enumerate(sources) if source.split == "train"]
    return files


def _place(folder: pathlib.Path, number: int, split: str) -> pathlib.Path:
    return folder / f"{number:06d}-{split}"


def _check_shares(files: Mapping[str, Sequence[TextFile]], held_out: Mapping[str, float]) -> None:
    """Raise UserError where a share of some train text is none."""
    empty = [split for split in ("train", *held_out) if held_out and not any(os.path.getsize(one.path) for one in files[split])]
    if empty and len(empty) <= len(held_out):  # else there is no text at all, and who reads it says so
        by = ", ".join(f"--{split}-fraction {share:g}" for split, share in held_out.items() if empty[0] in ("train", split))
        raise UserError(f"{by} gives {empty[0]} none of so few documents or lines: take more text, or another fraction")


# writing


def _make(folder: pathlib.Path) -> None:
    try:
        folder.mkdir(parents=True)
    except OSError as error:
        raise UserError(f"cannot write to {folder.parent}: {reason(error)}") from None


def _remove(folder: pathlib.Path, new: Sequence[pathlib.Path]) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    for path in new:
        with contextlib.suppress(OSError):
            path.rmdir()


class _Writer:
    """A plain file of text that is being made."""

    def __init__(self, path: pathlib.Path, source: str) -> None:
        self.path, self.source, self.written, self.looked = path, source, 0, 0
        self.file = open(path, "xb", buffering=BLOCK)  # noqa: SIM115, closed by `_write`

    def write(self, data: bytes) -> None:
        """Append bytes. Raises UserError, also where the disk is nearly full: others need it, too."""
        try:
            if self.looked <= self.written:
                disk = shutil.disk_usage(self.path.parent)
                if disk.free < min(RESERVE * disk.total, MOST_RESERVED):
                    raise UserError(self._full("is nearly full"))
                self.looked = self.written + 16 * BLOCK
            self.file.write(data)
        except OSError as error:
            raise UserError(self._full(f"says: {reason(error)}")) from None
        self.written += len(data)

    def close(self) -> None:
        """Have all on the disk's side. Raises UserError."""
        try:
            self.file.close()
        except OSError as error:
            raise UserError(self._full(f"says: {reason(error)}")) from None

    def _full(self, why: str) -> str:
        return f"{self.source} has over {self.written:,} bytes of text, and the disk of {self.path.parent.parent} {why}"


def _write(source: _Source, number: int, folder: pathlib.Path, reading: Reading) -> None:
    """Make the plain files of a source. Raises UserError."""
    held_out = reading.held_out if source.split == "train" else {}
    with contextlib.ExitStack() as files:
        try:
            writers = [_Writer(_place(folder, number, split), source.name) for split in (source.split, *held_out)]
        except OSError as error:
            raise UserError(f"cannot write to {folder}: {reason(error)}") from None
        for writer in writers:
            files.callback(writer.file.close)
        try:
            with source.open() as stream:
                parts = _levels(stream, reading.rate) if reading.rate else texts(stream, reading.field, folder, bool(held_out))
                if held_out:
                    _deal(parts, writers, [*held_out.values()], [reading.seed, number])
                else:
                    for part in parts:
                        writers[0].write(part)
        except UserError:
            raise
        except (KeyboardInterrupt, MemoryError):
            raise
        except Exception as error:  # each library has errors of its own
            raise UserError(f"cannot read {source.name}: {_why(error)}") from None
        for writer in writers:
            writer.close()


def _levels(stream: Stream, rate: int) -> Iterator[bytes]:
    try:
        yield levels(stream.read(), rate)
    except UserError as error:
        raise TextError(str(error)) from None


def _why(error: Exception) -> str:
    if isinstance(error, RecursionError):
        return "its records are nested too deeply"
    return reason(error) or type(error).__name__


def _deal(parts: Iterable[bytes], writers: Sequence[_Writer], shares: Sequence[float], seed: Sequence[int]) -> None:
    """Give each document to one of the files, by chance: the first gets what the shares leave."""
    rng, bounds = np.random.default_rng(list(seed)), np.cumsum(shares)
    while block := list(itertools.islice(parts, 4096)):
        for part, which in zip(block, np.searchsorted(bounds, rng.random(4096), side="right"), strict=False):
            writers[(int(which) + 1) % len(writers)].write(part)
