"""The shards that ranks read, brought to their disks: what is missing or damaged comes from a peer, else from the store.

Every rank looks after the shards that it reads itself, and hashes no others. Where all are sound, no more is said. Else
one rank gets for all that see its disk, over MPI, from disks that have it. A copy is hashed as it comes in.
What no rank has, one of those that read it takes from the store that the corpus was opened from, and gives it to the others.
"""

from __future__ import annotations

import os
import pathlib
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

from ..comm.messages import allgather
from ..comm.replicas import Domains, File, plan
from ..comm.runtime import together
from ..comm.transfers import replicate
from ..errors import UserError, printable
from ..remote.locate import RemoteFolder
from .corpus import Corpus
from .placing import ShardFile

if TYPE_CHECKING:
    from mpi4py import MPI

Say = Callable[[str], None]


class _Lack(NamedTuple):
    """A shard that a rank reads, or was asked for, and its disk does not have as it should be."""

    name: str
    problem: str
    damaged: bool  # else it is not there


def supply(comm: MPI.Comm, corpus: Corpus, files: Sequence[ShardFile], say: Say) -> None:
    """Have this rank's disk hold `files`, the shards that it will read, sound. Collective.

    say : told what was damaged and what takes long, the same on every rank

    Raises UserError on all ranks; where nobody has a shard, it is named. Of private corpora nothing is told or asked.
    """
    if corpus.private:
        with together(comm):
            for file in files:
                corpus.check(file)
        return
    everyones = allgather(comm, _lacks(corpus, files), list[_Lack])
    if any(everyones):
        _Supply(comm, corpus, everyones, say).run()


def _lacks(corpus: Corpus, files: Sequence[ShardFile]) -> list[_Lack]:
    found = []
    for file in files:
        try:
            corpus.check(file)
        except UserError as error:
            found.append(_Lack(file.name, str(error), os.path.exists(corpus.folder / file.name)))
    return found


class _Supply:
    """What to do where disks lack shards.

    everyones : of each rank what it lacks
    """

    def __init__(self, comm: MPI.Comm, corpus: Corpus, everyones: list[list[_Lack]], say: Say) -> None:
        self.comm, self.corpus, self.say = comm, corpus, say
        self.domains = Domains.find(comm, corpus.folder)
        self.lacks = everyones
        self._folder: RemoteFolder | None = None  # the store's, once it is asked
        asked = {lack.name for lacks in everyones for lack in lacks}
        self.files = [file for file in corpus.files() if file.name in asked]

    def run(self) -> None:
        """Bring what is lacked. Collective. Raises UserError on all ranks."""
        self._look_at_copies_of_damaged()
        want = self._lacked_by(self.domains.of[self.comm.rank])
        have = {file.name for file in self.files if file.name not in want and self._is_there(file)}
        sources = self._sources(have, want)
        gone = self._replicate(have, want)
        if gone and self.corpus.store is not None:
            have |= self._fetch(gone, self.corpus.store)
            gone = self._replicate(have, want)
        if gone:
            raise UserError.of_all(self._nobody_has([file.name for file in gone]))
        damaged = {
            (self.domains.of[rank], lack.name) for rank, lacks in enumerate(self.lacks) for lack in lacks if lack.damaged
        }
        for leader, name in sorted(damaged):
            source = sources.get((leader, name), "the store")
            self.say(printable(f"{self._path(name)} on {self.domains.hosts[leader]} was damaged; it is mended from {source}"))
        for file in self.files:
            if file.name in want:
                self.corpus.trust(file)

    def _look_at_copies_of_damaged(self) -> None:
        """Hash the other copies of what is damaged on a disk: who mends is named, and all that is damaged is mended."""
        damaged, more = {lack.name for lacks in self.lacks for lack in lacks if lack.damaged}, list[_Lack]()
        if damaged and self.domains.leads:
            known = self._lacked_by(self.comm.rank)
            more = _lacks(self.corpus, [file for file in self.files if file.name in damaged - known and self._is_there(file)])
        if damaged:
            self.lacks = [
                mine + others for mine, others in zip(self.lacks, allgather(self.comm, more, list[_Lack]), strict=True)
            ]

    def _lacked_by(self, leader: int) -> set[str]:
        """Names of what the ranks of a domain lack."""
        return {lack.name for rank, lacks in enumerate(self.lacks) if self.domains.of[rank] == leader for lack in lacks}

    def _is_there(self, file: ShardFile) -> bool:
        """Whether a file of a possible size is: it is hashed where it arrives."""
        path = self.corpus.folder / file.name
        return os.path.isfile(path) and file.least <= os.path.getsize(path) <= file.most

    def _sources(self, have: set[str], want: set[str]) -> dict[tuple[int, str], str]:
        """(leader, name) -> the host from which a disk gets a file."""
        told = allgather(self.comm, (sorted(have), sorted(want)), tuple[list[str], list[str]])
        has, wants = [set[str]() for _ in told], [set[str]() for _ in told]
        for leader in self.domains.leaders:
            has[leader], wants[leader] = map(set, told[leader])
        moves, _ = plan(sorted(self.files, key=lambda file: file.name), has, wants)
        return {(move.target, move.file.name): self.domains.hosts[move.source] for move in moves}

    def _replicate(self, have: set[str], want: set[str]) -> list[File]:
        return replicate(self.comm, self.domains, self.corpus.folder, self.files, have, want, self.say)

    def _fetch(self, gone: Sequence[File], store: Callable[[], RemoteFolder]) -> set[str]:
        """Names of what this rank has taken from the store: its share of what nobody has."""
        load, mine, names = [0] * self.comm.size, list[ShardFile](), {file.name for file in gone}
        for file in (file for file in self.files if file.name in names):
            readers = (rank for rank, lacks in enumerate(self.lacks) if file.name in {lack.name for lack in lacks})
            rank = min(readers, key=lambda rank: (load[rank], rank))
            load[rank] += file.most
            mine += [file] * (rank == self.comm.rank)
        with together(self.comm):
            for file in mine:
                self._fetch_one(file, store)
        return {file.name for file in mine}

    def _fetch_one(self, file: ShardFile, store: Callable[[], RemoteFolder]) -> None:
        """Take a shard from the store. Raises UserError that names it."""
        try:
            self._folder = self._folder or store()
            self._folder.fetch(file.name, self._path(file.name), file.most)
        except UserError as error:
            raise UserError(f"no rank has {self._path(file.name)}, and it does not come from the store: {error}") from None
        self.corpus.check(file)

    def _nobody_has(self, names: list[str]) -> str:
        """What the user is told of shards that nobody has."""
        rank, lack = next((rank, lack) for rank, lacks in enumerate(self.lacks) for lack in lacks if lack.name == names[0])
        more = len(names) - 1
        others = f", nor of {more} other{'s' * (more > 1)}" if more else ""
        where = f" (rank {rank} on {self.domains.hosts[rank]})" if self.comm.size > 1 else ""
        if lack.damaged:
            return f"{lack.problem}{where}; nobody has a sound copy{others}"
        return (
            f"{self._path(lack.name)} is not there{where}, and nobody has a copy{others}: "
            f"start with the hosts that have {'them' if more else 'it'}, or prepare the data anew"
        )

    def _path(self, name: str) -> pathlib.Path:
        return self.corpus.folder / name
