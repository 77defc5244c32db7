"""Keep a program up under mpirun: it is started, watched, and started again on the hosts that answer, until it may end."""

from __future__ import annotations

import os
import signal
import sys
import time
from abc import ABC, abstractmethod
from typing import NamedTuple

from ..errors import UserError, printable
from ..files.starter import shortage
from ..remote import locate
from . import mpirun
from .interfaces import address_of
from .job import LONGER, LOOK, START, Job

NOT_ENCRYPTED = (
    "MPI does not encrypt what goes between hosts; where others can listen give --interface of a tunnel, such as wg0"
)


class Outcome(NamedTuple):
    """What follows where the job has ended."""

    code: int | None = None  # the supervisor ends with this exit code; None: the job is started again
    pause: float = 0.0  # seconds before that


class Supervisor(ABC):
    """A program under mpirun, started as often as it takes.

    Parameters
    ----------
    command : str
        Of dllm, in whose name the user is told things.
    module : str
        What ranks run, with `python -m`.
    ranks : int or None
        How many; None: one a core, or as the hosts have slots.
    hostfile : str or None
        Names hosts, and is read anew before the program is started again; None: this machine, or what Slurm has given.
    pass_on : tuple of str
        Variables that ranks on other hosts shall see, beside those that say where stores are.
    detect : bool
        Whether hosts that fall silent shall be noticed, where there are several.
    interface : str or None
        The network interface between hosts.
    """

    def __init__(
        self,
        command: str,
        module: str,
        ranks: int | None,
        hostfile: str | None,
        pass_on: tuple[str, ...],
        detect: bool,
        interface: str | None = None,
    ) -> None:
        self.command, self.module, self.hostfile = command, module, hostfile
        self.pass_on = *pass_on, *(name for name in locate.variables() if name in os.environ)
        self.detect, self.interface = detect, interface
        if interface:
            address_of(interface)  # what is wrong with it is said here
        self.cores = mpirun.cores()
        self.hosts = mpirun.read_hosts(hostfile) if hostfile else {}  # name -> ranks that it takes
        self.chosen = self.hosts  # for which so many ranks were asked
        self.ranks = ranks or sum(self.hosts.values()) or self.cores
        self.warned = False  # that nothing is encrypted
        self.doubtful = False  # whether a host may not answer now
        self.failures = 0  # in a row; the more, the longer the ranks get to come up
        self.job = Job(self.say)

    def say(self, text: str) -> None:
        """Tell the user."""
        say(self.command, text)

    def supervise(self) -> int:
        """Exit code of the supervisor, once the program may end. SIGINT, SIGTERM and SIGUSR1 stop it."""
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, lambda *_: self.stop())
        hosts = self._answering() if self.doubtful else self.hosts
        while True:
            begin = time.monotonic()
            outcome = self.judge(self._run_once(hosts), time.monotonic() - begin)
            if outcome.code is not None:
                return outcome.code
            if outcome.pause:
                self._rest(outcome.pause)
                if self.job.stops:
                    return self.stopped()
                self.read_hosts()
            hosts = self._answering()

    def stop(self) -> None:
        """The first time the program ends in its own way, the second time at once, the third time it is killed."""
        self.job.stop()

    @abstractmethod
    def arguments(self) -> list[str]:
        """The words behind `python -m module`; asked for before each start."""

    @abstractmethod
    def is_due(self, lasted: float) -> bool:
        """Whether a job that was started so many seconds ago shall be ended; asked at every look."""

    @abstractmethod
    def judge(self, code: int, lasted: float) -> Outcome:
        """What follows where the job has ended with mpirun's exit code `code` after so many seconds."""

    @abstractmethod
    def stopped(self) -> int:
        """Exit code where the user has stopped it."""

    def read_hosts(self) -> None:
        """Take the hosts as the file has them now: some may have joined. Where it cannot be read those before stay."""
        if self.hostfile:
            try:
                self.hosts = mpirun.read_hosts(self.hostfile)
            except UserError as error:
                self.say(f"{printable(str(error))}; going on with the hosts that it named before")

    def _run_once(self, hosts: dict[str, int]) -> int:
        """Run mpirun to its end. Returns its exit code."""
        if not (self.warned or self.interface or mpirun.all_here(hosts)):
            self.say(NOT_ENCRYPTED)
            self.warned = True
        ranks = self.ranks if hosts == self.chosen else min(self.ranks, sum(hosts.values()))
        before = mpirun.command(ranks, self.cores, hosts, *self.pass_on)
        if mpirun.all_here(hosts) and mpirun.flavour() == "mpich" and (problem := shortage(ranks)):
            self.say(problem)
        words = [*before, sys.executable, "-m", self.module, *self.arguments()]
        local = mpirun.all_here(hosts)
        variables = mpirun.environment(self.detect and len(hosts) > 1, None if local else self.interface)
        return self.job.run(words, variables, hosts, self.is_due, START * min(2**self.failures, LONGER), local)

    def _rest(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while time.monotonic() < end and not self.job.stops:
            time.sleep(LOOK)

    def _answering(self) -> dict[str, int]:
        """The hosts to start on again."""
        found = mpirun.answering(self.hosts) if self.hosts else {}
        if found and set(found) != set(self.hosts):
            self.say(f"going on without {', '.join(sorted(set(self.hosts) - set(found)))}, which did not answer")
        return found or self.hosts


def say(command: str, text: str) -> None:
    """A line on standard error in the name of a command."""
    sys.stderr.write(f"dllm {command}: {text}\n")
    sys.stderr.flush()
