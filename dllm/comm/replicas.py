"""Copies of files on disks that ranks do not share: which ranks see the same disk, who shall have what, and the way there.

A domain is all ranks that see one disk; its leader, the lowest of them, writes for all. Which they are is found by looking:
each rank drops a token and reads whose tokens are there. A file is placed by rendezvous hashing (Thaler and Ravishankar 1998):
every rank computes the same places, and where a domain comes or goes, only its own files move.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import pathlib
import socket
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..errors import UserError
from ..files import storage
from .messages import allgather
from .runtime import wait

if TYPE_CHECKING:
    from mpi4py import MPI

TOKEN = ".dllm-look-"  # a file with this before its name says that a rank sees this disk


@dataclass(frozen=True)
class Domains:
    """Which ranks see the same disk."""

    rank: int  # this one
    of: tuple[int, ...]  # rank -> the leader of its domain, the lowest rank that sees the same disk
    hosts: tuple[str, ...]  # rank -> the name of its host
    writable: bool = True  # whether all ranks may write there

    @classmethod
    def find(cls, comm: MPI.Comm, folder: str | os.PathLike[str]) -> Domains:
        """Of the disk on which `folder` lies, or will lie. Collective. Nothing is left there.

        Ranks that may not write there are taken for one domain where they are on one host.
        """
        if comm.size == 1:
            return cls(0, (0,), (socket.gethostname(),))
        place = pathlib.Path(os.path.abspath(folder))
        place = next(path for path in (place, *place.parents) if os.path.isdir(path))
        token, mine = "", place / f"{TOKEN}{os.urandom(16).hex()}"
        with contextlib.suppress(OSError):
            os.close(os.open(mine, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
            token = mine.name.removeprefix(TOKEN)
        try:
            told = allgather(comm, (token, socket.gethostname()), tuple[str, str])
            leader = next(rank for rank, other in enumerate(told) if _is_seen(place, told[comm.rank], other))
            wait(comm.Ibarrier())
        finally:
            with contextlib.suppress(OSError):
                mine.unlink()
        leaders = allgather(comm, leader, int)
        return cls(comm.rank, tuple(leaders), tuple(host for _, host in told), all(other for other, _ in told))

    @property
    def leaders(self) -> tuple[int, ...]:
        """The leaders of all domains, the lowest first."""
        return tuple(sorted(set(self.of)))

    @property
    def leads(self) -> bool:
        """Whether this rank writes for its disk."""
        return self.of[self.rank] == self.rank

    @property
    def shared(self) -> bool:
        """Whether all ranks see one disk."""
        return len(set(self.of)) == 1

    def holders(self, name: str, copies: int) -> list[int]:
        """Leaders of the `copies` domains in which the file `name` belongs, the first choice first."""
        return rendezvous(name, {leader: self._label(leader) for leader in self.leaders}, copies)

    def _label(self, leader: int) -> str:
        """What a domain is called as long as it lasts: its host, and which of the host's disks."""
        before = sum(self.hosts[other] == self.hosts[leader] for other in self.leaders if other < leader)
        return f"{self.hosts[leader]}/{before}"


def _is_seen(place: pathlib.Path, own: tuple[str, str], other: tuple[str, str]) -> bool:
    """Whether a rank sees the disk that this one sees; own, other: the token, "" where it may not write, and the host."""
    if not (own[0] and other[0]):
        return own == other
    return other[0].isalnum() and os.path.lexists(place / f"{TOKEN}{other[0]}")


def rendezvous(name: str, labels: Mapping[int, str], copies: int) -> list[int]:
    """The `copies` keys of `labels` whose labels weigh most for `name`, the heaviest first."""
    weight = lambda key: hashlib.blake2b(f"{name}\0{labels[key]}".encode(errors="replace"), digest_size=8).digest()
    return sorted(labels, key=weight, reverse=True)[:copies]


@dataclass(frozen=True)
class File:
    """A file that ranks may hand to each other."""

    name: str  # relative to the folder of the ranks
    sha256: str  # 64 hexadecimal digits
    most: int  # bytes that it has at most


def is_sound(folder: storage.Path, file: File, rest: Callable[[], object] = lambda: None) -> bool | None:
    """Whether a file of this disk is what it should be; None where it is not there. rest : called after each MiB."""
    path = pathlib.Path(folder, file.name)
    if not os.path.isfile(path) or os.path.islink(path):
        return None
    try:
        storage.check_file(path, file.sha256, 0, file.most, rest)
    except UserError:
        return False
    return True


@dataclass(frozen=True)
class Move:
    """A file on its way from a rank's folder to another's."""

    file: File
    source: int  # ranks
    target: int


def plan(files: Iterable[File], have: Sequence[set[str]], want: Sequence[set[str]]) -> tuple[list[Move], list[File]]:
    """Who sends what to whom, the same on every rank, and the files that are wanted and nobody has.

    have, want : by rank, names of files that a rank has, or shall have; ranks that lead no domain have none
    """
    load, moves, gone = [0] * len(have), [], []
    for file in files:
        targets = [rank for rank, names in enumerate(want) if file.name in names and file.name not in have[rank]]
        sources = [rank for rank, names in enumerate(have) if file.name in names]
        if targets and not sources:
            gone.append(file)
            continue
        for target in targets:
            source = min(sources, key=lambda rank: (load[rank], rank))
            load[source] += 1
            moves.append(Move(file, source, target))
    return moves, gone
