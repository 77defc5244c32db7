"""Keep a server up: it is started under mpirun and started again whenever it ends, until it is told to end."""

import os
import signal
import sys
import time

from . import mpirun
from .errors import BAD_INPUT, DONE

LOOK = 0.1  # seconds between looks at the job
START = 60.0  # seconds until the first rank must be there
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
        self.cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        self.marked, self.process, self.stops, self.asked = mpirun.Marked(), None, 0, 0.0

    def supervise(self):
        failures, hosts = 0, self.hosts
        while True:
            begin = time.monotonic()
            code = self._once(hosts)
            lasted = time.monotonic() - begin
            if self.stops:
                return DONE
            if code == BAD_INPUT:
                return BAD_INPUT
            failures = failures + 1 if lasted < SHORT else 1
            say(f"the server ended after {lasted:.0f} s (mpirun's exit code {code})")
            if failures > RETRIES:
                say(f"that was {failures} times in a row: giving up")
                return 1
            pause = PAUSE * 2 ** (failures - 1)
            say(f"starting it again in {pause:g} s")
            end = time.monotonic() + pause
            while time.monotonic() < end and not self.stops:
                time.sleep(LOOK)
            if self.stops:
                return DONE
            hosts = mpirun.answering(self.hosts) or self.hosts if self.hosts else {}

    def _once(self, hosts):
        """Run mpirun to its end; no process of it is left here. Returns its exit code."""
        ranks = self.options.ranks if hosts == self.hosts else min(self.options.ranks, sum(hosts.values()))
        command = mpirun.command(ranks, self.cores, hosts, *self.pass_on)
        self.process = self.marked.start([*command, sys.executable, "-m", "dllm.serve", *self.words], hosts)
        if self.stops:  # asked for while it was being started
            self._pass_on()
        begin, seen = time.monotonic(), bool(hosts) and not mpirun.is_here(next(iter(hosts)))
        while self.process.poll() is None:
            time.sleep(LOOK)
            seen = seen or self.marked.has_ranks()
            if not seen and time.monotonic() - begin > START:
                say(f"no rank was there after {START:.0f} s: ending the job")
                break
            if self.stops and time.monotonic() - self.asked > self.options.drain + GRACE:
                break
        self.marked.sweep(GRACE)
        return self.process.wait()

    def stop(self):
        """The first time requests under way are finished, the second time nothing is."""
        self.stops += 1
        self.asked = time.monotonic()
        if self.process is not None and self.process.poll() is None:
            self._pass_on()

    def _pass_on(self):
        if self.stops == 1:
            self.process.send_signal(signal.SIGUSR1)  # which either mpirun hands to its ranks
        else:
            mpirun.kill(os.killpg, self.process.pid, signal.SIGTERM if self.stops == 2 else signal.SIGKILL)


def say(text):
    sys.stderr.write(f"dllm serve: {text}\n")
    sys.stderr.flush()
