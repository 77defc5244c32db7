"""Commands that must be refused, one after another in one start of all ranks: python refusals.py FILE FOLDER.

FILE: JSON lists of words. What rank R wrote in command N goes to FOLDER/N-R.txt, how all ended to FOLDER/R.json.
"""

import importlib
import json
import os
import pathlib
import sys
import time

from mpi4py import MPI

comm, folder, ends = MPI.COMM_WORLD, pathlib.Path(sys.argv[2]), []
for number, (module, *arguments) in enumerate(json.loads(pathlib.Path(sys.argv[1]).read_text())):
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
