"""A real Slurm of four nodes on this machine: munge, a controller, four node daemons, in a folder of their own."""

import os
import pathlib
import shutil
import signal
import socket
import subprocess
import time

NODES, CPUS, PORT = 4, 2, 26900
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "scontrol")
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
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
TmpFS={folder}/tmp-%n
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
ReturnToService=2
KillWait=3
NodeName=n[1-{nodes}] NodeHostname={host} NodeAddr=127.0.0.1 Port=[{first}-{last}] CPUs={cpus} RealMemory=2000 State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def missing():
    """Why there can be no Slurm here; None where there can."""
    absent = [name for name in PROGRAMS if shutil.which(name, path=os.environ["PATH"] + ":/usr/sbin") is None]
    if absent:
        return f"Slurm is not installed ({', '.join(absent)}): apt-get install slurmctld slurmd slurm-client munge"
    return None if os.geteuid() == 0 else "Slurm's daemons need root"


class Cluster:
    """Up from its making to the end of its `with`."""

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
        values = {"host": socket.gethostname().partition(".")[0], "folder": self.folder, "port": PORT, "nodes": NODES}
        values |= {"cpus": CPUS, "first": PORT + 1, "last": PORT + NODES}
        (self.folder / "slurm.conf").write_text(CONFIGURATION.format(**values))
        self.environment = {**os.environ, "SLURM_CONF": str(self.folder / "slurm.conf")}
        self.environment["PATH"] += ":/usr/sbin"

    def __enter__(self):
        munge = self.folder / "munge"
        self.run("munged", "--force", f"--socket={munge}/socket", f"--key-file={munge}/key", f"--log-file={munge}/log",
                 f"--pid-file={munge}/pid", f"--seed-file={munge}/seed")  # fmt: skip
        self.run("slurmctld", "-c")
        for n in range(NODES):
            self.run("slurmd", "-N", f"n{n + 1}")
        self.until(lambda: self.run("sinfo", "-h", "-t", "idle", "-o", "%D") == str(NODES), "all nodes idle", 30)
        return self

    def __exit__(self, *error):
        self.run("scancel", "-u", "root", check=False)
        time.sleep(0.5)
        for path in (*self.folder.glob("slurmd-*.pid"), self.folder / "slurmctld.pid", self.folder / "munge" / "pid"):
            if path.exists():
                with_pid = int(path.read_text())
                try:
                    os.kill(with_pid, signal.SIGTERM)
                except ProcessLookupError:
                    continue
                self.until(lambda pid=with_pid: not _alive(pid), "end of a daemon", 20)

    def run(self, *command, check=True):
        """Standard output of a command."""
        done = subprocess.run(
            list(map(str, command)), capture_output=True, text=True, timeout=60, check=False, env=self.environment
        )
        assert not check or done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        return done.stdout.strip()

    def state(self, job):
        """Such as PENDING, RUNNING, COMPLETED."""
        words = self.run("scontrol", "show", "job", job).split()
        return next(word.partition("=")[2] for word in words if word.startswith("JobState="))

    def until(self, condition, what, limit):
        end = time.monotonic() + limit
        while not condition():
            assert time.monotonic() < end, f"no {what} after {limit} s"
            time.sleep(0.2)


def _alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True
