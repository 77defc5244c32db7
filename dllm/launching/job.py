"""A program under mpirun: started, watched, told to end; and no process of it is left on this host."""

from __future__ import annotations

import contextlib
import os
import pathlib
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable

from ..comm import loopback
from ..errors import reason
from ..runs import ownership
from . import mpirun

START = 60.0  # seconds until the first rank must be there; at each further attempt twice as many
LONGER = 4  # times as many at most
LOOK = 0.1  # seconds between looks at the ranks
SOON = 0.005  # and at mpirun's sockets, while it starts
GRACE = 10.0  # seconds that what was killed gets to be gone


class Job:
    """A program that is started as often as it takes, one at a time.

    Its processes are known by a mark in their variables: MPICH gives each rank a session of its own.

    say : callable
        Tells the user a text.
    """

    def __init__(self, say: Callable[[str], None]) -> None:
        self.mark, self.say = uuid.uuid4().hex, say
        self.process: subprocess.Popen[bytes] | None = None
        self.stops = 0  # how often the user has asked for the end
        self.seen = False  # whether a rank was there
        self.lasting: Callable[[], bool] = lambda: False  # whether it goes on without mpirun
        self.open = False  # whether other hosts can reach mpirun though they need not

    def run(
        self,
        words: list[str],
        variables: dict[str, str],
        hosts: dict[str, int],
        due: Callable[[float], bool],
        patience: float,
        local: bool = False,
    ) -> int:
        """Exit code of mpirun, once it has ended by itself or was ended.

        words : list of str
            mpirun's command.
        variables : dict
            Its environment, of mpirun.environment.
        hosts : dict
            name -> ranks, where they are listed.
        due : callable
            Whether a job that was started so many seconds ago shall be ended; asked at every look.
        patience : float
            Seconds until a rank must be there: Open MPI's daemons have been seen to wait for each other for ever.
        local : bool
            Whether all ranks are on this host, so that nobody else needs to reach mpirun.
        """
        process = subprocess.Popen(words, env=variables | {ownership.JOB: self.mark}, start_new_session=True)
        self.process = process
        if self.stops:  # asked for while it was being started
            self._pass_on()
        begin = time.monotonic()
        self.seen = bool(hosts) and not mpirun.is_here(next(iter(hosts)))  # ranks that are all elsewhere cannot be looked for
        while process.poll() is None or self.lasting():
            self._look(process, local and process.poll() is None and time.monotonic() - begin < patience)
            self.seen, lasted = self.seen or self.has_ranks(), time.monotonic() - begin
            if not self.seen and lasted > patience:
                self.say(f"no rank was there after {patience:.0f} s: ending the job")
                break
            if due(lasted):
                break
        self._sweep()
        return process.wait()

    def _look(self, process: subprocess.Popen[bytes], confine: bool) -> None:
        """Wait until the next look; meanwhile keep other hosts from mpirun, as soon as it listens."""
        end = time.monotonic() + LOOK
        try:
            while confine and time.monotonic() < end:
                loopback.confine_process(process.pid)
                time.sleep(SOON if not self.seen else LOOK)
        except OSError as error:
            if not self.open:
                self.say(f"mpirun can be reached from the network, which this system does not let dllm forbid: {reason(error)}")
            self.open = True
        time.sleep(max(0.0, end - time.monotonic()))

    def stop(self) -> None:
        """The first time the program ends in its own way, the second time at once, the third time it is killed."""
        self.stops += 1
        self._pass_on()

    def ask(self) -> None:
        """Let it end in its own way, to be started anew."""
        if self.process is not None:
            self.process.send_signal(signal.SIGUSR1)  # which either mpirun hands to its ranks

    def _pass_on(self) -> None:
        if self.process is None or self.process.poll() is not None:
            return
        if self.stops == 1:
            self.ask()
        else:
            _kill(os.killpg, self.process.pid, signal.SIGTERM if self.stops == 2 else signal.SIGKILL)

    def _own(self) -> list[int]:
        """Numbers of the job's processes on this host."""
        mark = f"{ownership.JOB}={self.mark}".encode()
        return [pid for pid in _processes() if mark in _environment(pid)]

    def has_ranks(self) -> bool:
        """Whether a rank of the job is on this host."""
        return any(_program(pid) == os.path.realpath(sys.executable) for pid in self._own())

    def _sweep(self) -> None:
        """End what mpirun left on this host: two jobs would be in each other's way."""
        end = time.monotonic() + GRACE
        while (left := self._own()) and time.monotonic() < end:
            for pid in left:
                _kill(os.kill, pid, signal.SIGKILL)
            time.sleep(0.05)


def _kill(function: Callable[[int, int], None], number: int, which: signal.Signals) -> None:
    """Send a signal to what may be gone."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        function(number, which)


def _processes() -> list[int]:
    return [int(folder.name) for folder in pathlib.Path("/proc").iterdir() if folder.name.isdigit()]


def _environment(pid: int) -> list[bytes]:
    """The variables of a process as they were when it started; nothing where it is gone, or a zombie, or another user's."""
    try:
        return pathlib.Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:
        return []


def _program(pid: int) -> str:
    """The file that a process runs; "" where it is gone."""
    try:
        return os.path.realpath(f"/proc/{pid}/exe")
    except OSError:
        return ""
