"""Ranks tell each other how they are, for as long as they live, and without any of them waiting for another.

Every BEAT each rank sends what it knows of all ranks to a few others, drawn at random; of two reports on a rank the one with
the larger count is newer. Messages go from one rank to one other, so that the death of a third does not touch them.
"""

from __future__ import annotations

import contextlib
import random
import threading
import time
from collections.abc import Callable, Iterator
from typing import Annotated, Any, TypeAlias

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
ENTRY = 8192  # bytes that a rank's report may have as JSON; memory is touched for those it has
SILENT = 5.0  # seconds after which a rank is told less often, every so many seconds: it may never read it


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

    Attributes
    ----------
    known : dict
        rank -> (how many reports it has made, the newest one).
    """

    def __init__(self, comm: MPI.Comm, report: Callable[[], Report], kind: Any = Report) -> None:
        super().__init__(name="gossip", daemon=True)
        self.comm, self.report, self.kind = comm.Dup(), report, dict[int, tuple[Count, kind]]
        self.over = threading.Event()
        self.rank, self.size = comm.rank, comm.size
        self.survivable = survivable(comm)
        self.others = [rank for rank in range(comm.size) if rank != comm.rank]
        self.count = 0
        self.known: dict[int, tuple[int, Report]] = {}
        self.heard = dict.fromkeys(range(comm.size), time.monotonic())  # rank -> when a new report of it came
        self.dead: set[int] = set()
        self.incoming = {rank: np.zeros(ENTRY * comm.size, np.uint8) for rank in self.others}
        self.receiving: dict[int, MPI.Request] = {}
        self.sending: dict[int, tuple[MPI.Request, Bytes]] = {}
        self.kept: list[Any] = []  # requests that failed, with their memory

    def table(self) -> dict[int, tuple[Report, float, bool]]:
        """rank -> (report, seconds since it was heard of, whether it is dead), of all ranks that were ever heard of."""
        now = time.monotonic()
        known = dict(self.known)
        return {rank: (known[rank][1], now - self.heard[rank], rank in self.dead) for rank in sorted(known)}

    def run(self) -> None:
        """The thread: listen and speak until `end`."""
        for rank in self.others:
            self._expect(rank)
        due = 0.0
        while not self.over.wait(LOOK):
            for rank in self.others:
                if rank not in self.dead:
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
                self._take(bytes(self.incoming[rank][: status.Get_count(MPI.BYTE)]))
                self.receiving[rank] = self.comm.Irecv(self.incoming[rank], rank, TAG)

    def _take(self, message: bytes) -> None:
        """Learn what is new of a message. One that says nothing of the kind is as if it had not come."""
        now = time.monotonic()
        try:
            reports: dict[int, tuple[int, Report]] = unpack(message, self.kind)
        except ValueError:
            return
        for rank, (count, report) in reports.items():
            is_another = 0 <= rank < self.size and rank != self.rank  # of itself each rank knows best
            if is_another and (rank not in self.known or count > self.known[rank][0]):
                self.known[rank] = count, report
                self.heard[rank] = now

    def _speak(self, everyone: bool = False) -> None:
        self.count += 1
        self.known[self.rank] = self.count, self.report()
        self.heard[self.rank] = time.monotonic()
        message = np.frombuffer(pack(self.known), np.uint8)
        if message.size > ENTRY * self.size:
            raise ValueError(f"the reports of {self.size} ranks have {message.size} bytes, more than {ENTRY} each")
        living = [rank for rank in self.others if rank not in self.dead]
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
            self.dead.add(rank)
            # MPI may still write to the memory of what has failed
            self.kept += [self.receiving.pop(rank, None), self.sending.pop(rank, None)]
