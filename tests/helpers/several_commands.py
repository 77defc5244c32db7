"""Several commands one after another in one start of all ranks, which saves the start of each.

As a script, what each rank runs: python -m helpers.several_commands FOLDER. It runs the JSON lists of words of
FOLDER/commands.json. What rank R wrote in command N goes to FOLDER/N-R.txt, how all ended to FOLDER/R.json.
"""

import dataclasses
import importlib
import json
import os
import pathlib
import sys
import time

from helpers.launch import LIMIT, mpirun


@dataclasses.dataclass
class Ending:
    """How a command ended: what each rank wrote, their exit codes, the seconds of the slowest."""

    texts: list
    codes: set
    seconds: float

    @property
    def text(self):
        return "".join(self.texts)


def run_several(folder, ranks, commands, *, cwd=None, timeout=LIMIT, check=False, script="helpers.several_commands", env=None):
    """Run commands, each a list of words that begins with a module that has `main`. Returns a list of Ending.

    folder : a new one, for what they write
    ranks : 0 is one process without mpirun
    check : fail where one of them does not end with 0
    script : what calls `run` in each rank
    """
    commands = write_commands(folder, commands)
    env = {"PYTHONPATH": pathlib.Path(__file__).parents[1], **(env or {})}
    mpirun(ranks, "-m", script, folder, cwd=cwd, env=env, timeout=timeout, check=True)
    ends = [json.loads((folder / f"{rank}.json").read_text()) for rank in range(ranks or 1)]
    found = []
    for number, command in enumerate(commands):
        texts = [(folder / f"{number}-{rank}.txt").read_text() for rank in range(ranks or 1)]
        codes, seconds = zip(*(end[number] for end in ends), strict=True)
        assert not check or set(codes) == {0}, f"{' '.join(command)}\n{''.join(texts)}"
        found.append(Ending(texts, set(codes), max(seconds)))
    return found


def write_commands(folder, commands):
    """Make a folder for `run`. Returns the commands as lists of str."""
    folder.mkdir(parents=True)
    commands = [list(map(str, command)) for command in commands]
    (folder / "commands.json").write_text(json.dumps(commands))
    return commands


def run(folder):
    """What each rank does."""
    from mpi4py import MPI

    comm, ends = MPI.COMM_WORLD, []
    for number, (module, *arguments) in enumerate(json.loads((folder / "commands.json").read_text())):
        with open(folder / f"{number}-{comm.rank}.txt", "wb") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        comm.barrier()
        begin = time.monotonic()
        code = importlib.import_module(module).main(arguments)
        sys.stdout.flush()
        sys.stderr.flush()
        comm.barrier()
        ends.append((code, time.monotonic() - begin))
        (folder / f"{comm.rank}.json").write_text(json.dumps(ends))


if __name__ == "__main__":
    run(pathlib.Path(sys.argv[1]))
