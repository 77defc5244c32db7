"""What has started this process, by its variables and by /proc, without MPI: as which rank of how many, and which mpirun."""

from __future__ import annotations

import functools
import os
import pathlib
import sys

RANK = ("PMI_RANK", "OMPI_COMM_WORLD_RANK")  # variables by which a process learns its rank
SIZE = ("PMI_SIZE", "OMPI_COMM_WORLD_SIZE")  # and of how many; both are there where one MPI's job starts the other's
STARTERS = {"mpirun", "mpiexec", "mpiexec.hydra", "prterun", "orterun"}  # the mpiruns, which pass on what ranks write
OUTPUT_OPTIONS = ("prepend", "outfile", "errfile", "output", "tag-", "timestamp", "xml", "stream-buffering")  # of either mpirun
MPICH_SHARE = 5_400_000  # bytes of /dev/shm that MPICH takes for a rank where there are several (4.3 and 5.0: 5.39 MB)
DAEMONS = {"hydra_pmi_proxy", "prted", "orted", "slurmstepd"}  # what they have on each host, and srun


def launched_rank() -> int | None:
    """This process's rank as what has launched it says; None: it was started by hand, or by a script."""
    rank = next((os.environ[name] for name in RANK if name in os.environ), None)
    if rank is None and _step_tasks() > 1:
        rank = os.environ.get("SLURM_PROCID")
    return None if rank is None else int(rank)


def launched_sizes() -> set[int]:
    """How many ranks there are as what has launched this process says; empty: nobody says it."""
    sizes = {int(os.environ[name]) for name in SIZE if os.environ.get(name, "").isdigit()}
    return sizes or ({_step_tasks()} if _step_tasks() > 1 else set())


def is_open_mpi_job() -> bool:
    """Whether Open MPI's mpirun has started this process, and no other."""
    return "OMPI_COMM_WORLD_SIZE" in os.environ and "PMI_SIZE" not in os.environ


def _step_tasks() -> int:
    """Of srun's step that this process is a task of; 1 elsewhere: batch scripts and salloc's shells have SLURM_NTASKS alone."""
    number = os.environ.get("SLURM_STEP_NUM_TASKS", "")
    return int(number) if number.isdigit() and "SLURM_STEP_ID" in os.environ else 1


def shortage(ranks: int, used: bool = False) -> str | None:
    """Why so many ranks of MPICH would crash on this host, a line to tell before they start; None where they have room.

    used : some of them have begun to take theirs, so that the size of /dev/shm counts, not what is free
    """
    try:
        found = os.statvfs("/dev/shm")
    except OSError:
        return None
    room, need = (found.f_blocks if used else found.f_bavail) * found.f_frsize, ranks * MPICH_SHARE
    if ranks < 2 or room >= need:
        return None
    return (
        f"/dev/shm has {room >> 20:,} MB{'' if used else ' free'}, and {ranks} ranks of MPICH take {need >> 20:,} MB of it, so "
        "they will crash; make it larger (docker run --shm-size=1g), take fewer ranks with more threads, or Open MPI"
    )


@functools.cache
def mpirun_pid() -> int | None:
    """The mpirun of this process where it is on this host and this process is a rank, else None."""
    if launched_rank() is None:
        return None
    return next((pid for pid, program in ancestors() if os.path.basename(program) in STARTERS), None)


@functools.cache
def mpirun_changes_output() -> bool:
    """Whether mpirun was told to do something with what ranks write, such as to name the rank in each line."""
    try:
        words = pathlib.Path(f"/proc/{mpirun_pid()}/cmdline").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return True
    return any(word == "-l" or word.lstrip("-").startswith(OUTPUT_OPTIONS) for word in words if word.startswith("-"))


def mpirun_beside() -> str | None:
    """The mpirun of this Python's own environment, be it activated or not; None where it has none, or Python is the system's.

    Beside the system's Python lies the system's mpirun, and a cluster's `module load` puts a better one first in PATH.
    """
    if sys.prefix == sys.base_prefix and not os.path.isdir(os.path.join(sys.prefix, "conda-meta")):
        return None
    path = pathlib.Path(sys.executable).with_name("mpirun")
    return str(path) if os.access(path, os.X_OK) else None


def starting_program() -> str:
    """The path of the program that has started the ranks, as far as it is on this host; else what is known of it."""
    programs = [program for _, program in ancestors()]
    known = [program for names in (STARTERS, DAEMONS) for program in programs if os.path.basename(program) in names]
    return known[0] if known else "srun" if _step_tasks() > 1 else "its launcher"


def ancestors() -> list[tuple[int, str]]:
    """(pid, path of its program) of this process's parent, its parent and so on, as far as they may be seen."""
    found, pid = list[tuple[int, str]](), os.getppid()
    try:
        while pid > 1:
            found.append((pid, os.readlink(f"/proc/{pid}/exe")))
            pid = int(pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except (OSError, ValueError, IndexError):
        pass
    return found
