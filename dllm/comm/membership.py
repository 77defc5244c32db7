"""Ranks tell each other how they are, for as long as they live, and without any of them waiting for another.

Every BEAT each rank sends what it knows of all ranks to a few others, drawn at random; of two reports on a rank the one with
the larger count is newer. Messages go from one rank to one other, so that the death of a third does not touch them.

The place of a rank that is gone may be taken by a new process, a later life of the rank. MPI knows nothing of it: others carry
what `told` says to and fro (peers/joining.py). A count is life << LIFE | reports of that life, so a report of a
later life is newer than all before. Whoever was dead as of a life is alive in the next, and no old report revives it.
"""

from __future__ import annotations

import contextlib
import random
import threading
import time
from collections.abc import Callable, Iterator
from typing import Annotated, Any, NamedTuple, TypeAlias

import msgspec
import numpy as np
from mpi4py import MPI

from ..kernels.types import Bytes
from .messages import pack, unpack
from .runtime import survivable

Report: TypeAlias = dict[str, Any]  # what a rank says of itself, for JSON
Count = Annotated[int, msgspec.Meta(ge=0, le=2**53)]

TAG = 201
BEAT = 0.2  # seconds
LOOK = 0.05  # seconds between looks at what has come
FANOUT = 3  # ranks that get each report
LIFE = 32  # bits of a count below those of the life: at five reports a second enough for 27 years
LIVES = 1 << 53 - LIFE
ENTRY = 8192  # bytes
SILENT = 5.0  # seconds after which a rank is told less often, every so many seconds: it may never read it


class Place(NamedTuple):
    """What a process is among the ranks."""

    rank: int
    size: int  # how many ranks there are, dead ones and all
    life: int = 0  # above 0: the rank has died before, and MPI knows nothing of this process


class Membership(threading.Thread):
    """What every rank says of itself, on every rank, by gossip.

    From `start` until `end` no other thread of this process may call MPI.

    Parameters
    ----------
    comm : MPI.Comm
        Duplicated: collective.
    report : callable
        Returns what this rank says of itself now, a small dict for JSON.
    kind : type
        Of reports, for msgspec: a TypedDict. What is of no such type is not taken from anybody.
    entry : int
        Bytes that a report may have as JSON; memory is touched for those it has.
    place : Place or None
        Of this process; None: the one that MPI gave it.

    Attributes
    ----------
    known : dict
        rank -> (how many reports it has made, with its life, the newest one).
    dead : dict
        rank -> the life in which it died.
    lost : set of int
        Ranks that MPI reaches no more, whoever has their places.
    replaced : bool
        Whether this rank has a later life than this process, which has to go.
    before : dict
        The last report of an earlier life of this rank; empty: none was heard of.
    reborn : callable
        Called with a rank, its life and its report where a new life is heard of, before anybody sees it; in any thread.
    """

    def __init__(
        self,
        comm: MPI.Comm,
        report: Callable[[], Report],
        kind: Any = Report,
        entry: int = ENTRY,
        place: Place | None = None,
    ) -> None:
        super().__init__(name="gossip", daemon=True)
        self.comm, self.report, self.kind = comm.Dup(), report, dict[int, tuple[Count, kind]]
        self.entry, self.over = entry, threading.Event()
        self.rank, self.size, self.life = place or Place(comm.rank, comm.size)
        self.survivable = survivable(comm) or self.life > 0
        self.others = [] if self.life else [rank for rank in range(comm.size) if rank != comm.rank]  # by MPI
        self.count = self.life << LIFE
        self.known: dict[int, tuple[int, Report]] = {}
        self.heard = dict.fromkeys(range(self.size), time.monotonic())  # rank -> when a new report of it came
        self.dead: dict[int, int] = {}
        self.lost: set[int] = set()
        self.replaced = False
        self.before: Report = {}
        self.reborn: Callable[[int, int, Report], None] = lambda rank, life, report: None
        self._learning = threading.Lock()  # of `known`, `heard` and `dead`
        self.incoming = {rank: np.zeros(entry * comm.size, np.uint8) for rank in self.others}
        self.receiving: dict[int, MPI.Request] = {}
        self.sending: dict[int, tuple[MPI.Request, Bytes]] = {}
        self.kept: list[Any] = []  # requests that failed, with their memory

    def table(self) -> dict[int, tuple[Report, float, bool]]:
        """rank -> (report, seconds since it was heard of, whether it is dead), of all ranks that were ever heard of."""
        now = time.monotonic()
        known = dict(self.known)
        return {rank: (known[rank][1], now - self.heard[rank], self.is_dead(rank)) for rank in sorted(known)}

    def life_of(self, rank: int) -> int:
        """The newest life of a rank that was heard of."""
        return self.known[rank][0] >> LIFE if rank in self.known else 0

    def is_dead(self, rank: int) -> bool:
        """Whether a rank is dead in its newest life."""
        return rank in self.dead and self.life_of(rank) <= self.dead[rank]

    def note_death(self, rank: int, life: int) -> None:
        """Take a rank for dead as of this life."""
        with self._learning:
            self.dead[rank] = max(life, self.dead.get(rank, 0))

    def run(self) -> None:
        """The thread: listen and speak until `end`."""
        for rank in self.others:
            self._expect(rank)
        due = 0.0
        while not self.over.wait(LOOK):
            for rank in self.others:
                if rank not in self.lost:
                    self._look(rank)
            if time.monotonic() >= due:
                due = time.monotonic() + BEAT
                self._speak()

    def end(self) -> None:
        """Say how this rank is once more, then nothing."""
        self.over.set()
        if self.is_alive():
            self.join()
            self._speak(everyone=True)
            for rank in list(self.receiving):
                with self._losing(rank):
                    self.receiving[rank].Cancel()
                    self.receiving[rank].Wait()

    def _expect(self, rank: int) -> None:
        with self._losing(rank):
            self.receiving[rank] = self.comm.Irecv(self.incoming[rank], rank, TAG)

    def _look(self, rank: int) -> None:
        with self._losing(rank):
            status = MPI.Status()
            while self.receiving[rank].Test(status):
                self.take(bytes(self.incoming[rank][: status.Get_count(MPI.BYTE)]))
                self.receiving[rank] = self.comm.Irecv(self.incoming[rank], rank, TAG)

    def told(self) -> bytes:
        """A message that says what this rank knows of all, for `take` of another."""
        return pack(dict(self.known))

    def take(self, message: bytes | memoryview) -> bool:
        """Learn what is new of a message. One that says nothing of the kind is as if it had not come: False."""
        now = time.monotonic()
        try:
            reports: dict[int, tuple[int, Report]] = unpack(message, self.kind)
        except ValueError:
            return False
        with self._learning:
            for rank, (count, report) in reports.items():
                if rank == self.rank:  # of itself each rank knows best, but for this
                    self.replaced = self.replaced or count >> LIFE > self.life
                    self.before = report if count >> LIFE < self.life else self.before
                elif 0 <= rank < self.size and (rank not in self.known or count > self.known[rank][0]):
                    if count >> LIFE > self.life_of(rank):
                        self.reborn(rank, count >> LIFE, report)
                    self.known[rank] = count, report
                    self.heard[rank] = now
        return True

    def _speak(self, everyone: bool = False) -> None:
        self.count += 1
        report = self.report()
        with self._learning:
            self.known[self.rank] = self.count, report
            self.heard[self.rank] = time.monotonic()
        message = np.frombuffer(self.told(), np.uint8)
        if message.size > self.entry * self.size:
            raise ValueError(f"the reports of {self.size} ranks have {message.size} bytes, more than {self.entry} each")
        living = [rank for rank in self.others if rank not in self.lost]
        for rank in living if everyone else random.sample(living, min(FANOUT, len(living))):
            silent = time.monotonic() - self.heard[rank] > SILENT
            if silent and self.count % round(SILENT / BEAT):
                continue
            with self._losing(rank):
                if rank not in self.sending or self.sending[rank][0].Test():
                    self.sending[rank] = self.comm.Isend(message, rank, TAG), message

    @contextlib.contextmanager
    def _losing(self, rank: int) -> Iterator[None]:
        """A block about one other rank; an error of MPI in it means that this rank is gone."""
        try:
            yield
        except MPI.Exception:
            self.lost.add(rank)
            self.note_death(rank, 0)  # MPI knows the first life alone
            # MPI may still write to the memory of what has failed
            self.kept += [self.receiving.pop(rank, None), self.sending.pop(rank, None)]
