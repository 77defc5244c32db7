"""Keep a server up: whenever it ends it is started again, until it is told to end; and dead ranks of this host are replaced."""

from __future__ import annotations

import argparse
import time

from ..errors import BAD_INPUT, DONE
from . import mpirun
from .replacements import Replacements
from .supervisor import Outcome, Supervisor

SHORT = 60.0  # a job that lasts less than so many seconds has failed
RETRIES = 5  # failures in a row before giving up
PAUSE = 1.0  # seconds before it is started anew; after each further failure twice as many
GRACE = 10.0  # seconds that ranks get beyond --drain


class ServerSupervisor(Supervisor):
    """Of `dllm serve MODEL -n N`.

    Parameters
    ----------
    options : namespace
        model, token_file, ranks, hostfile, interface, drain.
    words : list of str
        All arguments of the command.
    pass_on : list of str
        Variables that ranks on other hosts shall see.
    """

    def __init__(self, options: argparse.Namespace, words: list[str], pass_on: list[str]) -> None:
        super().__init__("serve", "dllm.serve", options.ranks, options.hostfile, tuple(pass_on), False, options.interface)
        self.words, self.drain = words, options.drain
        self.asked = 0.0  # when it was told to end
        self.served = False  # whether a job has lasted
        tokens = [f"--token-file={options.token_file}"] if options.token_file else []
        self.replacements = Replacements(self.job, [*options.model, *tokens], self.say)
        self.job.lasting = self.lasts
        self.looked, self.missed = 0.0, 0  # when its ranks here were last looked for, and how often there were none

    def arguments(self) -> list[str]:
        """Those of the command."""
        self.looked, self.missed = 0.0, 0
        self.replacements.forget()
        return self.words

    def lasts(self) -> bool:
        """Whether the server goes on where mpirun has ended: with ranks of this host that it knows nothing of."""
        return self.replacements.running() and (self.job.stops > 0 or mpirun.all_here(self.hosts))

    def is_due(self, lasted: float) -> bool:
        """Once requests under way had their time, or where no rank is left here."""
        if self.job.stops:
            return bool(time.monotonic() - self.asked > self.drain + GRACE)
        self.replacements.look()
        if self.hosts and lasted - self.looked > GRACE:  # Open MPI's mpirun waits for ever for a lost host
            self.missed = 0 if self.job.has_ranks() else self.missed + 1
            self.looked = lasted
        return self.missed > 1 and mpirun.is_here(next(iter(self.hosts)))

    def judge(self, code: int, lasted: float) -> Outcome:
        """The end where it was told to, was refused, or fails again and again."""
        self.replacements.forget()
        if self.job.stops:
            return Outcome(DONE)
        self.served = self.served or lasted >= SHORT
        if code == BAD_INPUT and not self.served:  # later it is something that passes, such as a port not yet free
            return Outcome(BAD_INPUT)
        self.failures = self.failures + 1 if lasted < SHORT or not self.job.seen else 1
        self.say(f"the server ended after {lasted:.0f} s (mpirun's exit code {code})")
        if self.failures > RETRIES:
            self.say(f"that was {self.failures} times in a row: giving up")
            return Outcome(1)
        pause = PAUSE * 2 ** (self.failures - 1)
        self.say(f"starting it again in {pause:g} s")
        return Outcome(pause=pause)

    def stopped(self) -> int:
        """As it should."""
        return DONE

    def stop(self) -> None:
        """The first time requests under way are finished, the second time nothing is."""
        self.asked = time.monotonic()
        super().stop()
        self.replacements.stop(self.job.stops)
