"""Processes that take the places of ranks which have died on this host, while the others serve on."""

from __future__ import annotations

import contextlib
import os
import pathlib
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence

from ..runs import ownership
from . import join_file
from .job import Job

EVERY = 1.0  # seconds between looks
PAUSE, LONGEST = 1.0, 60.0  # seconds after a failure before the next try, after each further one twice as many, and at most


class Replacements:
    """Those of one job. The job's ranks say in their join file which of them are on this host.

    Parameters
    ----------
    job : Job
    words : sequence of str
        Arguments of `python -m dllm.serve`, beside --join.
    say : callable
        Tells the user a text.
    """

    def __init__(self, job: Job, words: Sequence[str], say: Callable[[str], None]) -> None:
        self.job, self.words, self.say = job, words, say
        self._due = self._again = 0.0  # when the next look is, and before when nothing is started
        self._failures = 0  # in a row
        self._children: list[subprocess.Popen[bytes]] = []
        self._arrived: set[int] = set()  # those of them that are ranks

    def look(self) -> None:
        """Start a process where a rank of this host is missing and none is on its way. To be called again and again."""
        now = time.monotonic()
        if now < self._due:
            return
        self._due = now + EVERY
        found = join_file.of_job(self.job.mark)
        if found is None:
            return
        path, file = found
        here = {rank: at.pid for rank, at in file.ranks.items() if at.host == join_file.host_name() and not at.left}
        missing = [rank for rank, pid in here.items() if not _is_there(pid)]
        if not self._coming(set(here.values()), now) and missing and now >= self._again:
            self.say(f"rank {missing[0]} has died: starting another in its place")
            words = [sys.executable, "-m", "dllm.serve", *self.words, "--join", str(path)]
            variables = os.environ | {ownership.JOB: self.job.mark}
            self._children.append(subprocess.Popen(words, env=variables, start_new_session=True))

    def _coming(self, ranks: set[int], now: float) -> bool:
        """Whether a process is on its way to be a rank. ranks : processes that are"""
        for child in list(self._children):
            if child.pid in ranks and child.pid not in self._arrived:
                self._arrived.add(child.pid)
                self._failures = 0
            if child.poll() is not None:
                self._children.remove(child)
                if child.pid not in self._arrived:
                    self._failures += 1
                    self._again = now + min(PAUSE * 2 ** (self._failures - 1), LONGEST)
                self._arrived.discard(child.pid)
        return any(child.pid not in self._arrived for child in self._children)

    def running(self) -> bool:
        """Whether one is there."""
        return any(child.poll() is None for child in self._children)

    def stop(self, times: int) -> None:
        """Let them end. times : how often that was asked for: first in their own way, then at once, then they are killed."""
        which = {1: signal.SIGUSR1, 2: signal.SIGTERM}.get(times, signal.SIGKILL)
        for child in self._children:
            with contextlib.suppress(ProcessLookupError):
                child.send_signal(which)

    def forget(self) -> None:
        """The job has ended, and with it all of its processes: so has its join file."""
        self.stop(3)
        for child in self._children:
            child.wait()
        self._children.clear()
        self._arrived.clear()
        self._failures = 0
        if found := join_file.of_job(self.job.mark):
            found[0].unlink(missing_ok=True)


def _is_there(pid: int) -> bool:
    """Whether a process of this host has not ended."""
    try:
        state = pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (OSError, IndexError):
        return False
    return state not in ("Z", "X")
