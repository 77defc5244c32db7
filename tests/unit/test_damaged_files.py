"""Seeded damage to the bytes of a shard or a checkpoint: the file is refused or read right, and no reader dies or hangs."""

import os
import pathlib
import subprocess
import sys
from collections import Counter

import pytest
from helpers import mutated_files

MUTATIONS = int(os.environ.get("DLLM_MUTATIONS", "300"))  # of each file
CHILD = pathlib.Path(mutated_files.__file__)


def outcomes(kind, folder, check):
    """How MUTATIONS damaged files end, read in child processes: one that dies or hangs is an outcome too."""
    file = mutated_files.KINDS[kind](folder)
    file.write()
    whole, first, ends = file.path.read_bytes(), 0, {}
    while first < MUTATIONS:
        file.path.write_bytes(whole)
        command = [sys.executable, CHILD, kind, folder, str(int(check)), str(first), str(MUTATIONS)]
        child = subprocess.run(command, capture_output=True, text=True)
        ends |= {int(line.split(" ", 1)[0]): line.split(" ", 1)[1] for line in child.stdout.splitlines()}
        first = len(ends)
        if child.returncode:
            ends[first] = f"died ({child.returncode}): {child.stderr[-300:]}"
            first += 1
    return ends


@pytest.mark.timeout(60 + MUTATIONS // 10)
@pytest.mark.parametrize("check", [True, False], ids=["hash first", "HDF5 alone"])
@pytest.mark.parametrize("kind", mutated_files.KINDS)
def test_a_damaged_file_is_refused_or_read_right(tmp_path, kind, check):
    ends = outcomes(kind, tmp_path, check)
    bad = {seed: end for seed, end in ends.items() if end not in ("right", "refused")}
    assert len(ends) == MUTATIONS
    assert not bad
    assert Counter(ends.values())["refused"] > MUTATIONS // 2
