"""A file system without locks, as NFS has it without lockd: shards and checkpoints are written and read all the same."""

import errno
import os
import subprocess
import sys

import pytest
from helpers.launch import environment
from helpers.seccomp import DENY

FLOCK, FCNTL = {"x86_64": (73, 72), "aarch64": (32, 25)}.get(os.uname().machine, (0, 0))  # numbers of the system calls
LOCKS = """
import fcntl, sys
for take in (fcntl.flock, fcntl.lockf):
    with open(sys.argv[1], "a") as file:
        try:
            take(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            print(error.errno)
"""
ARRAYS = """
import sys
import numpy as np
from dllm.files import hdf5
theta = np.arange(10.0)
hdf5.write_arrays(sys.argv[1], {"theta": theta})  # which reads it back
with hdf5.open_arrays(sys.argv[1], ["theta"]) as array:
    assert (array("theta", "float64", (10,))[:] == theta).all()
print("read")
"""
pytestmark = pytest.mark.skipif(sys.platform != "linux" or not FLOCK, reason="needs the numbers of Linux's system calls")


def without_locks(program, path, number, **variables):
    """Words that a program prints in a process where both ways to lock fail with an errno."""
    deny = f"{DENY}\ndeny({FLOCK}, {number})\ndeny({FCNTL}, {number}, argument=1, value=6)\n"  # F_SETLK
    words = [sys.executable, "-c", deny + program, path]
    done = subprocess.run(words, env=environment(variables), capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EIO])
@pytest.mark.parametrize("wish", [None, "TRUE", "BEST_EFFORT"])  # of the cluster's modules
def test_arrays_are_written_and_read(tmp_path, number, wish):
    variables = {} if wish is None else {"HDF5_USE_FILE_LOCKING": wish}
    assert without_locks(LOCKS, tmp_path / "lock", number) == [str(number)] * 2
    assert without_locks(ARRAYS, tmp_path / "file.h5", number, **variables) == ["read"]
