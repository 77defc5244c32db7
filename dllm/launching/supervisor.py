"""Keep a server up: it is started under mpirun and started again whenever it ends, until it is told to end."""

import signal
import sys
import time

from ..errors import BAD_INPUT, DONE
from . import mpirun
from .job import LONGER, LOOK, START, Job

SHORT = 60.0  # a job that lasts less than so many seconds has failed
RETRIES = 5  # failures in a row before giving up
PAUSE = 1.0  # seconds before it is started anew; after each further failure twice as many
GRACE = 10.0  # seconds that ranks get beyond --drain


def keep(options, words, pass_on):
    """Exit code of `dllm serve MODEL -n N`.

    options : namespace
        ranks, hostfile, drain.
    words : list of str
        All arguments of the command.
    pass_on : list of str
        Variables that ranks on other hosts shall see.
    """
    keeper = Keeper(options, words, pass_on, mpirun.read_hosts(options.hostfile) if options.hostfile else {})
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, lambda *_: keeper.stop())
    return keeper.supervise()


class Keeper:
    """The ranks of a server, started as often as it takes."""

    def __init__(self, options, words, pass_on, hosts):
        self.options, self.words, self.pass_on, self.hosts = options, words, pass_on, hosts
        self.cores = mpirun.cores()
        self.job, self.asked = Job(say), 0.0

    def supervise(self):
        failures, hosts, served = 0, self.hosts, False
        while True:
            begin = time.monotonic()
            code = self._once(hosts, START * min(2**failures, LONGER))
            lasted = time.monotonic() - begin
            if self.job.stops:
                return DONE
            served = served or lasted >= SHORT
            if code == BAD_INPUT and not served:  # later it is something that passes, such as a port not yet free
                return BAD_INPUT
            failures = failures + 1 if lasted < SHORT or not self.job.seen else 1
            say(f"the server ended after {lasted:.0f} s (mpirun's exit code {code})")
            if failures > RETRIES:
                say(f"that was {failures} times in a row: giving up")
                return 1
            pause = PAUSE * 2 ** (failures - 1)
            say(f"starting it again in {pause:g} s")
            end = time.monotonic() + pause
            while time.monotonic() < end and not self.job.stops:
                time.sleep(LOOK)
            if self.job.stops:
                return DONE
            hosts = mpirun.answering(self.hosts) or self.hosts if self.hosts else {}

    def _once(self, hosts, patience):
        """Run mpirun to its end. Returns its exit code."""
        ranks = self.options.ranks if hosts == self.hosts else min(self.options.ranks, sum(hosts.values()))
        command = mpirun.command(ranks, self.cores, hosts, *self.pass_on)
        self.looked, self.missed = 0.0, 0  # when its ranks here were last looked for, and how often there were none
        words = [*command, sys.executable, "-m", "dllm.serve", *self.words]
        return self.job.run(words, mpirun.environment(), hosts, self._due, patience)

    def _due(self, lasted):
        """Whether a job that was started so many seconds ago shall be ended."""
        if self.job.stops:
            return time.monotonic() - self.asked > self.options.drain + GRACE
        if self.hosts and lasted - self.looked > GRACE:  # Open MPI's mpirun waits for ever for a lost host
            self.missed = 0 if self.job.has_ranks() else self.missed + 1
            self.looked = lasted
        return self.missed > 1 and mpirun.is_here(next(iter(self.hosts)))

    def stop(self):
        """The first time requests under way are finished, the second time nothing is."""
        self.asked = time.monotonic()
        self.job.stop()


def say(text):
    sys.stderr.write(f"dllm serve: {text}\n")
    sys.stderr.flush()
