"""A real Slurm of four nodes on this machine: munge, a controller, four node daemons, in a folder of their own."""

import contextlib
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import time

NODES, CPUS = 4, 2
PORTS = range(26900, 28900, NODES + 2)  # where blocks begin: a port that says "taken", the controller's, the nodes'
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "scontrol")
# A requeued job waits for cred_expire and for the scheduler. debug2 tells of looks at time limits. Tier 2 preempts tier 1.
CONFIGURATION = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthInfo=socket={folder}/munge/socket,cred_expire=5
SlurmctldPort={port}
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmdSpoolDir={folder}/spool-%n
StateSaveLocation={folder}/state
SlurmctldDebug=debug2
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
TmpFS={folder}/tmp-%n
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
SchedulerParameters=sched_interval=1,bf_interval=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
ReturnToService=2
KillWait=10
NodeName=n[1-{nodes}] NodeHostname={host} NodeAddr=127.0.0.1 Port=[{first}-{last}] CPUs={cpus} RealMemory=2000 State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES PriorityTier=1
PartitionName=urgent Nodes=ALL PriorityTier=2
"""


def missing():
    """Why there can be no Slurm here; None where there can."""
    absent = [name for name in PROGRAMS if shutil.which(name, path=os.environ["PATH"] + ":/usr/sbin") is None]
    if absent:
        return f"Slurm is not installed ({', '.join(absent)}): apt-get install slurmctld slurmd slurm-client munge"
    return None if os.geteuid() == 0 else "Slurm's daemons need root"


class Cluster:
    """Up from the beginning to the end of its `with`."""

    def __init__(self, folder):
        self.folder = pathlib.Path(folder)
        for name in ("munge", "state", *(f"{kind}-n{n + 1}" for kind in ("spool", "tmp") for n in range(NODES))):
            (self.folder / name).mkdir(parents=True, mode=0o755)
        for parent in (self.folder, *self.folder.parents):  # munge trusts a socket only below folders that others can pass
            if parent.stat().st_uid == os.getuid() and parent != pathlib.Path("/"):
                parent.chmod(parent.stat().st_mode | 0o055)
        key = self.folder / "munge" / "key"
        key.touch(mode=0o600)
        key.write_bytes(os.urandom(128))
        self.taken, port = _free_ports()
        values = {"host": socket.gethostname().partition(".")[0], "folder": self.folder, "port": port, "nodes": NODES}
        values |= {"cpus": CPUS, "first": port + 1, "last": port + NODES}
        (self.folder / "slurm.conf").write_text(CONFIGURATION.format(**values))
        self.environment = {**os.environ, "SLURM_CONF": str(self.folder / "slurm.conf")}
        self.environment["PATH"] += ":/usr/sbin"

    def __enter__(self):
        munge = self.folder / "munge"
        with contextlib.ExitStack() as where_it_fails:
            where_it_fails.callback(self._end_daemons)
            self.run("munged", "--force", f"--socket={munge}/socket", f"--key-file={munge}/key", f"--log-file={munge}/log",
                     f"--pid-file={munge}/pid", f"--seed-file={munge}/seed")  # fmt: skip
            self.run("slurmctld", "-c")
            for n in range(NODES):
                self.run("slurmd", "-N", f"n{n + 1}")
            self.until(lambda: self.run("sinfo", "-h", "-t", "idle", "-o", "%D") == str(NODES), "all nodes idle", 30)
            where_it_fails.pop_all()
        return self

    def __exit__(self, *error):
        try:
            self.run("scancel", "-u", "root", check=False)
            self.until(lambda: not self.run("squeue", "-h"), "end of the jobs", 30)
        finally:
            self._end_daemons()

    def _end_daemons(self):
        files = (*self.folder.glob("slurmd-*.pid"), self.folder / "slurmctld.pid", self.folder / "munge" / "pid")
        daemons = [int(file.read_text()) for file in files if file.exists()]
        for pid in daemons:
            _signal(pid, signal.SIGTERM)
        self.until(lambda: not any(_signal(pid, 0) for pid in daemons), "end of the daemons", 30)
        self.taken.close()

    def run(self, *command, check=True, env=None):
        """Standard output of a command."""
        done = subprocess.run(
            list(map(str, command)), capture_output=True, text=True, timeout=60, check=False,
            env=self.environment | (env or {}),
        )  # fmt: skip
        assert not check or done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        return done.stdout.strip()

    def job(self, number):
        """What Slurm says of a job: its JobState, such as PENDING, RUNNING, COMPLETED; its Restarts."""
        return dict(word.split("=", 1) for word in self.run("scontrol", "show", "job", number).split() if "=" in word)

    def end(self, number, limit):
        """Wait for the end of a job. Returns its last state, such as COMPLETED."""
        ends = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "OUT_OF_MEMORY")  # others pass: REQUEUED, SIGNALING, ...
        states = []
        self.until(lambda: states.append(self.job(number)["JobState"]) or states[-1] in ends, f"end of job {number}", limit)
        return states[-1]

    def looks_at_limits(self):
        """How often Slurm has looked for jobs near their time limit."""
        return (self.folder / "slurmctld.log").read_text().count("Testing job time limits")

    def until(self, condition, what, limit):
        end = time.monotonic() + limit
        while not condition():
            assert time.monotonic() < end, f"no {what} after {limit} s"
            time.sleep(0.2)


def _free_ports():
    """A bound socket, by which other suites on this machine see that a block of ports is taken; the next of its ports."""
    for first in PORTS:
        with contextlib.ExitStack() as stack, contextlib.suppress(OSError):
            sockets = [stack.enter_context(socket.socket()) for _ in range(PORTS.step)]
            for port, one in enumerate(sockets, first):
                one.bind(("", port))
            stack.pop_all()
            for one in sockets[1:]:
                one.close()
            return sockets[0], first + 1
    raise AssertionError(f"no free ports from {PORTS.start} to {PORTS.stop}")


def _signal(pid, number):
    """Whether the process is there."""
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return False
    return True
