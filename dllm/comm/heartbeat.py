"""Each rank of a node shows in shared memory that it runs; the others notice where it does not.

MPI notices a process that has ended, never one that stands still.
"""

from __future__ import annotations

import contextlib
import math
import os
import signal
import threading
from collections.abc import Callable

from .node_info import NodeInfo
from .shared_memory import ALIVE, SharedMemory

INTERVAL = 0.25  # seconds between beats
LATE = 2.0  # seconds of silence that are worth a line


class Heartbeat:
    """What a run asks of it; as it stands, where no memory is shared and nobody can look."""

    def start(self) -> None:
        """Begin to watch."""

    def end(self) -> None:
        """Watch no more."""


class SharedHeartbeat(threading.Thread, Heartbeat):
    """Watches the ranks of a node: one that was stopped for a while is named, one that stays silent is ended.

    Parameters
    ----------
    node : NodeInfo
    memory : SharedMemory
    deadline : float
        Seconds of silence after which a rank is ended; 0: never.
    say : callable
        Takes a line for the user.
    """

    def __init__(self, node: NodeInfo, memory: SharedMemory, deadline: float, say: Callable[[str], None]) -> None:
        super().__init__(daemon=True)
        self.memory, self.own, self.deadline, self.say, self.over = memory, node.rank, deadline, say, threading.Event()
        self.ranks, self.pids = list(node.pids), list(node.pids.values())

    def run(self) -> None:
        """Count time in beats of one's own, so that ranks that were all stopped together do not blame each other."""
        silence, seen = [0.0] * len(self.ranks), self.memory.counters[:, ALIVE].copy()
        while not self.over.wait(INTERVAL):
            self.memory.counters[self.own, ALIVE] += 1
            now = self.memory.counters[:, ALIVE].copy()
            for other in set(range(len(self.ranks))) - {self.own}:
                if now[other] == seen[other]:
                    silence[other] += INTERVAL
                    self._end_if_silent(other, silence)
                    continue
                if silence[other] >= LATE:
                    self._tell(other, f"was silent for {silence[other]:.0f} s")
                silence[other] = 0.0
            seen = now

    def _end_if_silent(self, other: int, silence: list[float]) -> None:
        patience = self.deadline + (0 if self._speaks_of(other) else LATE)
        if self.deadline > 0 and patience <= silence[other]:
            self._tell(other, f"has been silent for {silence[other]:.0f} s and is ended")
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pids[other], signal.SIGKILL)
            silence[other] = -math.inf

    def _speaks_of(self, other: int) -> bool:
        """Whether this is the one of the others that speaks and acts first."""
        return self.own == (0 if other else 1)

    def _tell(self, other: int, what: str) -> None:
        if self._speaks_of(other):
            self.say(f"rank {self.ranks[other]} {what}")

    def end(self) -> None:
        """Watch no more."""
        self.over.set()
        if self.is_alive():
            self.join()
