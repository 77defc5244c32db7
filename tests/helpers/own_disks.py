"""Several commands on disks that ranks do not share: every rank works in a folder of its own, where relative paths lead.

As a script, what each rank runs: python -m helpers.own_disks FOLDER, with helpers.several_commands. As a "command" between
them, what befalls a disk: helpers.own_disks RANK flip|remove PATH.
"""

import os
import pathlib
import shutil
import sys

from helpers import several_commands
from helpers.run_files import flip

DISKS = "DLLM_TEST_DISKS"  # variable: the folder that holds those of all ranks


def disk_of(disks, rank):
    """The folder in which a rank works."""
    return disks / f"disk{rank}"


def main(arguments):
    """Harm to what a rank has at a path."""
    from mpi4py import MPI

    rank, harm, path = arguments[0], arguments[1], pathlib.Path(arguments[2])
    if rank in ("all", str(MPI.COMM_WORLD.rank)) and path.exists():
        if harm == "flip":
            flip(path, path.stat().st_size // 2)
        elif path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()
    return 0


if __name__ == "__main__":
    from mpi4py import MPI

    from dllm.data import placing, text

    text.SHARD, text.PIECE, placing.SMALL = 20_000, 10_000, 30_000
    disk = disk_of(pathlib.Path(os.environ[DISKS]), MPI.COMM_WORLD.rank)
    disk.mkdir(parents=True)
    os.chdir(disk)
    several_commands.run(pathlib.Path(sys.argv[1]))
