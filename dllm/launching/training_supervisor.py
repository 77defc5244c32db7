"""Bring a training job back until its run is done, from the newest whole checkpoint."""

from __future__ import annotations

import argparse
import math

from ..errors import BAD_INPUT, DONE, NOT_SAVED, STOPPED_EARLY
from ..runs import ownership, run_folder
from .run_disks import RunDisks
from .run_status import RunStatus
from .supervisor import Outcome, Supervisor

PAUSE = 1.0  # seconds before a job is started anew
GRACE = 10.0  # seconds that a job gets to end by itself once its end is due


class TrainingSupervisor(Supervisor):
    """Of `dllm launch`.

    Parameters
    ----------
    options : namespace
        Of launch: ranks, hostfile, interface, resume, retries, silence.
    wanted : namespace
        Options of train.
    disks : RunDisks
        Where the run lies.
    found : RunStatus
        What they say of it now.
    """

    def __init__(self, options: argparse.Namespace, wanted: argparse.Namespace, disks: RunDisks, found: RunStatus) -> None:
        super().__init__("launch", "dllm.train", options.ranks, options.hostfile, (ownership.JOB,), True, options.interface)
        self.options, self.wanted, self.disks, self.run = options, wanted, disks, disks.run
        self.before: tuple[int, dict[str, int]] | None = None  # ranks and hosts before a resize, until it has got further
        self.newest = found.step  # checkpoint that the run had come to
        self.doubtful = bool(disks.silent())
        self.named = bool(options.run or options.resume or wanted.out)  # by the user
        self.fresh = not options.run  # nothing of the run was there, and no job of this supervisor has ended
        self.begin()

    def begin(self) -> None:
        """Note what is there before the job."""
        self.ranks_started, self.owners = self.ranks, frozenset(self.disks.owners)
        self.done = math.inf  # seconds after its start when the run was
        self.heard = 0.0  # and when something was last heard of it: a disk may be away for a moment

    def arguments(self) -> list[str]:
        """Those of train, which goes on with the run where it has a checkpoint."""
        self.begin()
        wanted, words = self.wanted, ["--set", "resilience.lost_lanes=stop", "--progress", self.wanted.progress]
        for name, value in (("--max-steps", wanted.max_steps), ("--max-seconds", wanted.max_seconds), ("--data", wanted.data)):
            words += [name, str(value)] if value else []
        words += ["--trace", ":".join(str(number) for number in wanted.trace if number)] if wanted.trace else []
        for setting in wanted.set:
            words += ["--set", setting]
        if self.options.resume or self.newest is not None:
            return [*words, "--resume", self.run]
        if not self.fresh:  # else what is there now is another job's
            self.disks.begin_anew()
        for name, value in (("--preset", wanted.preset), ("--config", wanted.config), ("--init-from", wanted.init_from)):
            words += [name, value] if value else []
        return [*words, "--out", self.run]

    def is_due(self, lasted: float) -> bool:
        """Once the run is done, or the job was silent for too long."""
        found = self.disks.look()
        if self._has_ended(found):
            self.done = min(self.done, lasted)
            return lasted - self.done > GRACE  # Open MPI's mpirun waits for ever for a lost host
        self._take_resize_request()
        if found.silent is not None and self._owns(found):
            self.heard = max(self.heard, lasted - found.silent)
        silence = lasted - self.heard
        if silence > self.options.silence:
            self.say(f"nothing was heard of the job for {silence:.0f} s: ending it")
        return bool(silence > self.options.silence)

    def judge(self, code: int, lasted: float) -> Outcome:
        """The end where the run is done, stopped, refused or somebody else's, or where starts bring it no further."""
        if self._has_ended(self.disks.look()):
            return Outcome(DONE)
        found = self.disks.status()
        step = self.newest if found.step is None and self.disks.silent() else found.step
        further = (-1 if step is None else step) > (-1 if self.newest is None else self.newest)
        self.newest = step
        if self._has_ended(found):
            return Outcome(DONE)
        if self.job.stops:
            return Outcome(NOT_SAVED if code == NOT_SAVED else self.stopped())
        fresh, self.fresh = self.fresh, False
        if code == BAD_INPUT and fresh and not self.named and found.there and not self._owns(found):
            self._take_another_name()  # two were started in the same second
            return Outcome()
        if found.owner not in self.owners and not self._owns(found):
            self.say(f"another job has taken over {self.run}: this one ends")
            return Outcome(BAD_INPUT)
        if code == NOT_SAVED:  # what a start would compute anew would find no room either
            return Outcome(NOT_SAVED)
        place = "from the beginning" if step is None else f"from step {step}"
        if self.ranks != self.ranks_started:
            self.say(f"going on with {self.ranks} ranks {place}")
            self.failures = 0
            return Outcome()
        if code == STOPPED_EARLY:
            return Outcome(STOPPED_EARLY)
        if self.before and not further:
            self.say(f"{self.ranks} ranks get nowhere; going back to {self.before[0]}")
            self.ranks, self.hosts = self.before
            self.before, self.chosen = None, self.hosts
            return Outcome()
        if code == BAD_INPUT and not further:
            return Outcome(BAD_INPUT)
        if further:
            self.failures, self.before = 0, None
        self.failures += 1
        what = f"after {lasted:.0f} s (mpirun's exit code {code})"
        if self.failures > self.options.retries:
            self.say(f"the job ended {what}, {self.failures} times without getting further: giving up; see the messages above")
            return Outcome(1)
        self.say(f"the job ended {what}; starting it again {place}, attempt {self.failures} of {self.options.retries}")
        return Outcome(pause=PAUSE)

    def stopped(self) -> int:
        """Whether there is something to go on from."""
        return 1 if self.newest is None else STOPPED_EARLY

    def read_hosts(self) -> None:
        """Take the hosts as the file has them now, and ask their disks from now on."""
        super().read_hosts()
        self.disks.use(self.hosts)

    def _take_resize_request(self) -> None:
        """Somebody wants another number of ranks: dllm resize. New hosts of the file are for them."""
        wanted = self.disks.take_resize_request()
        if wanted and wanted != self.ranks:
            self.before = self.ranks, self.hosts
            self.read_hosts()
            self.ranks, self.chosen = wanted, self.hosts
            self.job.ask()  # a checkpoint, then the end

    def _take_another_name(self) -> None:
        taken, self.run = self.run, run_folder.new_name(None, self.wanted.preset or "default")
        self.disks.rename(self.run)
        self.fresh, self.newest = True, None
        self.say(f"{taken} is another job's: this one makes {self.run}")

    def _owns(self, found: RunStatus) -> bool:
        """Whether the run was last taken by a job of this supervisor."""
        return (found.owner or "").startswith(f"{self.job.mark}.")

    def _has_ended(self, found: RunStatus) -> bool:
        """Whether the run is done, by a job of this supervisor: a disk that was away may have an older end."""
        return found.done and self._owns(found)
