"""Each rank of a node shows in shared memory that it runs; the others notice where it does not."""

import contextlib
import math
import os
import signal
import threading

from .node_allreduce import PULSE

BEAT = 0.25  # seconds
LATE = 2.0  # seconds of silence that are worth a line


class Pulse(threading.Thread):
    """Watches the ranks of a node: one that was stopped for a while is named, one that stays silent is ended.

    MPI notices a process that has ended, never one that stands still.

    Parameters
    ----------
    place : NodeInfo
        Of comm.node_info.
    memory : SharedMemory
    deadline : float
        Seconds of silence after which a rank is ended; 0: never.
    say : callable
        Takes a line for the user.
    """

    def __init__(self, place, memory, deadline, say):
        super().__init__(daemon=True)
        self.memory, self.mine, self.deadline, self.say, self.over = memory, place.rank, deadline, say, threading.Event()
        self.ranks, self.pids = zip(*place.pids.items(), strict=True)

    def run(self):
        """Time is counted in beats of one's own, so that ranks that were all stopped together do not blame each other."""
        silence, seen = [0.0] * len(self.ranks), self.memory.counters[:, PULSE].copy()
        while not self.over.wait(BEAT):
            self.memory.counters[self.mine, PULSE] += 1
            now = self.memory.counters[:, PULSE].copy()
            for place in set(range(len(self.ranks))) - {self.mine}:
                if now[place] == seen[place]:
                    silence[place] += BEAT
                    self._end_if_silent(place, silence)
                    continue
                if silence[place] >= LATE:
                    self._tell(place, f"was silent for {silence[place]:.0f} s")
                silence[place] = 0.0
            seen = now

    def _end_if_silent(self, place, silence):
        patience = self.deadline + (0 if self._speaks_of(place) else LATE)
        if self.deadline > 0 and patience <= silence[place]:
            self._tell(place, f"has been silent for {silence[place]:.0f} s and is ended")
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pids[place], signal.SIGKILL)
            silence[place] = -math.inf

    def _speaks_of(self, place):
        """Whether this is the one of the others that speaks and acts first."""
        return self.mine == (0 if place else 1)

    def _tell(self, place, what):
        if self._speaks_of(place):
            self.say(f"rank {self.ranks[place]} {what}")

    def end(self):
        self.over.set()
        if self.is_alive():
            self.join()
