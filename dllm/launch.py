"""Start a training job under mpirun, watch it, and bring it back until it is done: dllm launch -n N -- TRAIN ARGUMENTS."""

import math
import signal
import sys
import time

from . import cli
from .errors import BAD_INPUT, DONE, STOPPED_EARLY, UserError
from .launching import mpirun
from .launching.job import LONGER, START, Job
from .runs import ownership, run_folder
from .training.options import train_config, train_options

EPILOG = """
examples
  dllm launch -n 8                                         the default run, on 8 ranks
  dllm launch -n 8 -- --data DIR --preset wlm-200          any arguments of dllm.train
  dllm launch -n 6 --resume RUN                            go on with RUN, on 6 ranks
  dllm launch -n 8 --run RUN -- --data DIR                 for batch scripts: make RUN, or go on with it where it is there
  dllm launch --hostfile FILE -- --data DIR                on other hosts too: a line each, such as  node1 slots=8

Under Open MPI the job goes on without a rank that dies. Where that is not possible, or everything dies, the job is started
anew from its newest whole checkpoint, on the hosts that answer. Ctrl-C once: a checkpoint, then the end (exit code 75); twice:
the end now. `dllm resize RUN -n M` goes on with M ranks.
"""
PAUSE = 1.0  # seconds before a job is started anew
GRACE = 10.0  # seconds that a job gets to end by itself once its end is due


def arguments(argv):
    parser = cli.Parser("launch", __doc__, EPILOG)
    parser.add_argument(
        "-n", "--ranks", type=cli.at_least(1), metavar="N", help="default: one a core, or as the hosts have slots"
    )
    parser.add_argument("--hostfile", metavar="FILE", help="hosts to run on, as for mpirun")
    parser.add_argument("--resume", metavar="RUN", help="go on with this run")
    parser.add_argument("--run", metavar="RUN", help="the run's folder: made, or gone on with where it has a checkpoint")
    parser.add_argument(
        "--retries", type=cli.at_least(0), default=5, metavar="K",
        help="starts in a row that bring the run no further before giving up (default 5)",
    )  # fmt: skip
    parser.add_argument(
        "--silence", type=cli.at_least(1, float), default=1800, metavar="S",
        help="a job that does nothing for so many seconds is started anew (default 1800)",
    )  # fmt: skip
    parser.add_argument("train", nargs="*", metavar="-- TRAIN ARGUMENTS", help="of dllm.train; see its --help")
    return parser.parse_args(argv)


def main(argv=None):
    return cli.run(launch, argv)


def launch(argv):
    options = arguments(argv)
    wanted = train_options(options.train)
    if wanted.resume:
        raise UserError("--resume RUN belongs before the --: dllm launch -n N --resume RUN")
    if options.resume and (wanted.preset or wanted.config or wanted.out):
        raise UserError("--resume brings its own configuration and folder: leave out --preset, --config and --out")
    if options.resume:
        run_folder.read_settings(options.resume)
    if options.run and (options.resume or wanted.out):
        raise UserError("--run RUN names the folder: leave out --resume and --out")
    if options.run and run_folder.is_done(options.run):
        say(f"{options.run} is done")
        return DONE
    train_config(wanted)  # what is wrong with them is said here, once
    hosts = mpirun.read_hosts(options.hostfile) if options.hostfile else {}
    run = options.run or options.resume or run_folder.new_name(wanted.out, wanted.preset or "default")
    if options.resume:
        run_folder.not_done(run)  # an older end is not this job's
    launcher = Launcher(options, wanted, hosts, run)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, lambda *_: launcher.job.stop())
    return launcher.supervise()


class Launcher:
    """The training job of a run, started as often as it takes."""

    def __init__(self, options, wanted, hosts, run):
        self.options, self.wanted, self.hosts, self.run = options, wanted, hosts, run
        self.cores = mpirun.cores()
        self.ranks, self.before = options.ranks or sum(hosts.values()) or self.cores, None  # before a resize
        self.job = Job(say)

    def supervise(self):
        """Exit code of the launcher: DONE, STOPPED_EARLY, BAD_INPUT, or 1 where it gave up."""
        failures, last, hosts = 0, run_folder.newest_step(self.run), self.hosts
        while True:
            begin, ranks, owner = time.monotonic(), self.ranks, ownership.owner(self.run)
            code = self._once(hosts, START * min(2**failures, LONGER))
            step = run_folder.newest_step(self.run)
            if run_folder.is_done(self.run):
                return DONE
            if self.job.stops:
                return STOPPED_EARLY if step is not None else 1
            if ownership.owner(self.run) not in (None, owner) and not self._is_ours():
                say(f"another job has taken over {self.run}: this one ends")
                return BAD_INPUT
            whence = "from the beginning" if step is None else f"from step {step}"
            if self.ranks != ranks:
                say(f"going on with {self.ranks} ranks {whence}")
                failures, last = 0, step
                continue
            if code == STOPPED_EARLY:
                return STOPPED_EARLY
            if self.before and step == last:
                say(f"{self.ranks} ranks get nowhere; going back to {self.before}")
                self.ranks, self.before = self.before, None
                continue
            if code == BAD_INPUT and step == last:
                return BAD_INPUT
            if step != last:
                failures, last, self.before = 0, step, None
            failures += 1
            what = f"after {time.monotonic() - begin:.0f} s (mpirun's exit code {code})"
            if failures > self.options.retries:
                say(f"the job ended {what}, {failures} times without getting further: giving up; see the messages above")
                return 1
            say(f"the job ended {what}; starting it again {whence}, attempt {failures} of {self.options.retries}")
            time.sleep(PAUSE)
            hosts = self._answering()

    def _answering(self):
        """The hosts to start on again."""
        found = mpirun.answering(self.hosts) if self.hosts else {}
        if set(found) != set(self.hosts):
            say(f"going on without {', '.join(sorted(set(self.hosts) - set(found)))}, which did not answer")
        return found or self.hosts

    def _once(self, hosts, patience):
        """Run mpirun to its end. Returns its exit code."""
        ranks = self.ranks if hosts == self.hosts else min(self.ranks, sum(hosts.values()))
        command = [*mpirun.command(ranks, self.cores, hosts, ownership.JOB), sys.executable, "-m", "dllm.train"]
        self.done = math.inf  # when the run was
        words, variables = [*command, *self._train_arguments()], mpirun.environment(detect=len(hosts) > 1)
        return self.job.run(words, variables, hosts, self._due, patience)

    def _due(self, lasted):
        """Whether a job that was started so many seconds ago shall be ended."""
        if run_folder.is_done(self.run):
            self.done = min(self.done, lasted)
            return lasted - self.done > GRACE  # Open MPI's mpirun waits for ever for a lost host
        self._take_wish()
        silence = min(lasted, time.time() - ownership.beaten(self.run) if self._is_ours() else math.inf)
        if silence > self.options.silence:
            say(f"nothing was heard of the job for {silence:.0f} s: ending it")
        return silence > self.options.silence

    def _take_wish(self):
        """Somebody wants another number of ranks: dllm resize."""
        wanted = run_folder.take_wish(self.run)
        if wanted and wanted != self.ranks:
            self.before, self.ranks = self.ranks, wanted
            self.job.ask()  # a checkpoint, then the end

    def _is_ours(self):
        """Whether the run's folder was last taken by a job of this launcher."""
        return (ownership.owner(self.run) or "").startswith(f"{self.job.mark}.")

    def _train_arguments(self):
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


def say(text):
    sys.stderr.write(f"dllm launch: {text}\n")
    sys.stderr.flush()


if __name__ == "__main__":
    sys.exit(main())
