"""Bring a training job back until its run is done, from the newest whole checkpoint."""

from __future__ import annotations

import argparse
import math
import time

from ..errors import BAD_INPUT, DONE, STOPPED_EARLY
from ..runs import ownership, run_folder
from . import mpirun
from .supervisor import Outcome, Supervisor

PAUSE = 1.0  # seconds before a job is started anew
GRACE = 10.0  # seconds that a job gets to end by itself once its end is due


class TrainingSupervisor(Supervisor):
    """Of `dllm launch`.

    Parameters
    ----------
    options : namespace
        Of launch: ranks, interface, resume, retries, silence.
    wanted : namespace
        Options of train.
    hosts : dict
        name -> ranks that it takes; empty: this machine, or what Slurm has given.
    run : str
        The run's folder.
    """

    def __init__(self, options: argparse.Namespace, wanted: argparse.Namespace, hosts: dict[str, int], run: str) -> None:
        ranks = options.ranks or sum(hosts.values()) or mpirun.cores()
        super().__init__("launch", "dllm.train", ranks, hosts, (ownership.JOB,), True, options.interface)
        self.options, self.wanted, self.run = options, wanted, run
        self.ranks_before: int | None = None  # a resize, until it has brought the run further
        self.newest = run_folder.newest_step(run)  # checkpoint that the run had come to
        self.begin()

    def begin(self) -> None:
        """Note what is there before the job."""
        self.ranks_started, self.owner = self.ranks, ownership.owner(self.run)
        self.done = math.inf  # seconds after its start when the run was

    def arguments(self) -> list[str]:
        """Those of train, which goes on with the run where it has a checkpoint."""
        self.begin()
        wanted, words = self.wanted, ["--set", "resilience.lost_lanes=stop", "--progress", self.wanted.progress]
        for name, value in (("--max-steps", wanted.max_steps), ("--max-seconds", wanted.max_seconds), ("--data", wanted.data)):
            words += [name, str(value)] if value else []
        for setting in wanted.set:
            words += ["--set", setting]
        if self.options.resume or run_folder.newest_step(self.run) is not None:
            return [*words, "--resume", self.run]
        run_folder.begin_anew(self.run)
        for name, value in (("--preset", wanted.preset), ("--config", wanted.config)):
            words += [name, value] if value else []
        return [*words, "--out", self.run]

    def is_due(self, lasted: float) -> bool:
        """Once the run is done, or the job was silent for too long."""
        if run_folder.is_done(self.run):
            self.done = min(self.done, lasted)
            return lasted - self.done > GRACE  # Open MPI's mpirun waits for ever for a lost host
        self._take_resize_request()
        silence = min(lasted, time.time() - ownership.last_alive(self.run) if self._owns_run() else math.inf)
        if silence > self.options.silence:
            self.say(f"nothing was heard of the job for {silence:.0f} s: ending it")
        return bool(silence > self.options.silence)

    def judge(self, code: int, lasted: float) -> Outcome:
        """The end where the run is done, stopped, refused or somebody else's, or where starts bring it no further."""
        step = run_folder.newest_step(self.run)
        if run_folder.is_done(self.run):
            return Outcome(DONE)
        if self.job.stops:
            return Outcome(self.stopped())
        if ownership.owner(self.run) not in (None, self.owner) and not self._owns_run():
            self.say(f"another job has taken over {self.run}: this one ends")
            return Outcome(BAD_INPUT)
        place = "from the beginning" if step is None else f"from step {step}"
        if self.ranks != self.ranks_started:
            self.say(f"going on with {self.ranks} ranks {place}")
            self.failures, self.newest = 0, step
            return Outcome()
        if code == STOPPED_EARLY:
            return Outcome(STOPPED_EARLY)
        if self.ranks_before and step == self.newest:
            self.say(f"{self.ranks} ranks get nowhere; going back to {self.ranks_before}")
            self.ranks, self.ranks_before = self.ranks_before, None
            return Outcome()
        if code == BAD_INPUT and step == self.newest:
            return Outcome(BAD_INPUT)
        if step != self.newest:
            self.failures, self.newest, self.ranks_before = 0, step, None
        self.failures += 1
        what = f"after {lasted:.0f} s (mpirun's exit code {code})"
        if self.failures > self.options.retries:
            self.say(f"the job ended {what}, {self.failures} times without getting further: giving up; see the messages above")
            return Outcome(1)
        self.say(f"the job ended {what}; starting it again {place}, attempt {self.failures} of {self.options.retries}")
        return Outcome(pause=PAUSE)

    def stopped(self) -> int:
        """Whether there is something to go on from."""
        return 1 if run_folder.newest_step(self.run) is None else STOPPED_EARLY

    def _take_resize_request(self) -> None:
        """Somebody wants another number of ranks: dllm resize."""
        wanted = run_folder.take_resize_request(self.run)
        if wanted and wanted != self.ranks:
            self.ranks_before, self.ranks = self.ranks, wanted
            self.job.ask()  # a checkpoint, then the end

    def _owns_run(self) -> bool:
        """Whether the run's folder was last taken by a job of this supervisor."""
        return (ownership.owner(self.run) or "").startswith(f"{self.job.mark}.")
