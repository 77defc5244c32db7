"""Under mpirun, which ends a job whose output it cannot pass on: the job comes to its end whoever reads it."""

import subprocess
import sys

import pytest
from helpers.launch import environment, mpirun_path

WORK = """
import sys
from dllm import cli
def work(words, comm):
    for number in range(300):
        if comm.rank == 0:
            print("line", number, flush=True)
    comm.Barrier()
    with open(f"{words[0]}{comm.rank}", "w") as file:
        file.write("done")
    return 0
sys.exit(cli.collective(work))
"""


@pytest.mark.parametrize("shell", ["| head -n 3; exit ${PIPESTATUS[0]}", "2>&1 | true; exit ${PIPESTATUS[0]}", "> /dev/full"])
def test_two_ranks_end_as_they_would_have(tmp_path, shell):
    words = ["timeout", "60", mpirun_path(), "-n", "2", sys.executable, "-c", WORK, tmp_path / "rank"]
    words = ["bash", "-c", f'"$0" "$@" {shell}', *words]
    done = subprocess.run(words, env=environment(), cwd=tmp_path, capture_output=True, text=True, timeout=70)
    assert done.returncode == 0, done
    assert sorted(path.name for path in tmp_path.iterdir()) == ["rank0", "rank1"]
    if "head" in shell:
        assert done.stdout == "line 0\nline 1\nline 2\n"
