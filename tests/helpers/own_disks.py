"""Several commands on disks that ranks do not share: every rank works in a folder of its own, where relative paths lead.

As a script, what each rank runs: python -m helpers.own_disks FOLDER, with helpers.several_commands. As a "command" between
them, what befalls a disk: helpers.own_disks RANK flip|remove|copy|append PATH; or a run: helpers.own_disks RANK stop STEP.
"""

import os
import pathlib
import shutil
import signal
import sys

from helpers import several_commands
from helpers.run_files import flip

DISKS = "DLLM_TEST_DISKS"  # variable: the folder that holds those of all ranks


def disk_of(disks, rank):
    """The folder in which a rank works."""
    return disks / f"disk{rank}"


def main(arguments):
    """Harm to what a rank has at a path, which may have * in it; `copy` keeps it as "kept"."""
    from mpi4py import MPI

    from dllm.training.trainer import Trainer

    rank, harm, where = arguments
    if rank in ("all", str(MPI.COMM_WORLD.rank)):
        if harm == "stop":
            Trainer.before_step[:] = [lambda trainer: stop_at(int(where), trainer.state.step)]
        for path in () if harm == "stop" else list(pathlib.Path().glob(where)):
            if harm == "flip":
                flip(path, path.stat().st_size // 2)
            elif harm == "append":
                path.write_text(path.read_text() + "\n")
            elif harm == "copy":
                shutil.copytree(path, "kept")
            elif path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()
    return 0


def stop_at(step, done):
    """In the step after which `step` are done, ask this process to stop, as a user would."""
    if done == step - 2:
        os.kill(os.getpid(), signal.SIGUSR1)


if __name__ == "__main__":
    from mpi4py import MPI

    from dllm.data import placing, text

    text.SHARD, text.PIECE, placing.SMALL = 20_000, 10_000, 30_000
    disk = disk_of(pathlib.Path(os.environ[DISKS]), MPI.COMM_WORLD.rank)
    disk.mkdir(parents=True)
    os.chdir(disk)
    several_commands.run(pathlib.Path(sys.argv[1]))
