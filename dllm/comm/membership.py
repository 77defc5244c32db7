"""Ranks tell each other how they are, for as long as they live, and without any of them waiting for another.

Every BEAT each rank sends what it knows of all ranks to a few others, drawn at random; of two reports on a rank the one with
the larger count is newer. Messages go from one rank to one other, so that the death of a third does not touch them.
"""

import contextlib
import json
import random
import threading
import time

import numpy as np
from mpi4py import MPI

from .runtime import survivable

TAG = 201
BEAT = 0.2  # seconds
LOOK = 0.02  # seconds between looks at what has come
FANOUT = 3  # ranks that get each report
ENTRY = 512  # bytes that a rank's report may have as JSON
SILENT = 5.0  # seconds after which a rank is told less often, every so many seconds: it may never read it


class Gossip(threading.Thread):
    """What every rank says of itself, on every rank. From `start` until `end` no other thread of this process may call MPI.

    Parameters
    ----------
    comm : MPI.Comm
        Duplicated: collective.
    report : callable
        Returns what this rank says of itself now, a small dict for JSON.
    """

    def __init__(self, comm, report):
        super().__init__(name="gossip", daemon=True)
        self.comm, self.report, self.over = comm.Dup(), report, threading.Event()
        self.rank, self.size = comm.rank, comm.size
        self.survivable = survivable(comm)
        self.others = [rank for rank in range(comm.size) if rank != comm.rank]
        self.count, self.known = 0, {}  # rank -> (count, report)
        self.heard = dict.fromkeys(range(comm.size), time.monotonic())  # rank -> when a new report of it came
        self.dead = set()
        self.incoming = {rank: np.zeros(ENTRY * comm.size, np.uint8) for rank in self.others}
        self.receiving, self.sending, self.kept = {}, {}, []

    def table(self):
        """rank -> (report, seconds since it was heard of, whether it is dead), of all ranks that were ever heard of."""
        now = time.monotonic()
        known = dict(self.known)
        return {rank: (known[rank][1], now - self.heard[rank], rank in self.dead) for rank in sorted(known)}

    def run(self):
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

    def end(self):
        """Say how this rank is once more, then nothing."""
        self.over.set()
        if self.is_alive():
            self.join()
            self._speak(everyone=True)
            for rank in list(self.receiving):
                with self._losing(rank):
                    self.receiving[rank].Cancel()
                    self.receiving[rank].Wait()

    def _expect(self, rank):
        with self._losing(rank):
            self.receiving[rank] = self.comm.Irecv(self.incoming[rank], rank, TAG)

    def _look(self, rank):
        with self._losing(rank):
            status = MPI.Status()
            while self.receiving[rank].Test(status):
                self._take(bytes(self.incoming[rank][: status.Get_count(MPI.BYTE)]))
                self.receiving[rank] = self.comm.Irecv(self.incoming[rank], rank, TAG)

    def _take(self, message):
        now = time.monotonic()
        for text, (count, report) in json.loads(message).items():
            rank = int(text)
            if count > self.known.get(rank, (-1,))[0]:
                self.known[rank] = count, report
                self.heard[rank] = now

    def _speak(self, everyone=False):
        self.count += 1
        self.known[self.rank], self.heard[self.rank] = (self.count, self.report()), time.monotonic()
        message = np.frombuffer(json.dumps(self.known).encode(), np.uint8)
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
    def _losing(self, rank):
        """A block about one other rank; an error of MPI in it means that this rank is gone."""
        try:
            yield
        except MPI.Exception:
            self.dead.add(rank)
            # MPI may still write to the memory of what has failed
            self.kept += [self.receiving.pop(rank, None), self.sending.pop(rank, None)]
