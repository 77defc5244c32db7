"""Ranks that another MPI's mpirun has started, or srun without MPI: refused in one line with both numbers and both paths."""

import os
import subprocess
import sys

import pytest
from helpers.launch import REFUSED, environment, flavour, mpirun

from dllm.files.starter import MPICH_SHARE, mpirun_beside, shortage

FOREIGN = {  # variables of the mpirun that this MPI does not know
    "mpich": {"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "{rank}"},
    "openmpi": {"PMI_SIZE": "4", "PMI_RANK": "{rank}"},
}
STEP = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4"}  # what batch scripts and shells of salloc have
SRUN = {**STEP, "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "{rank}"}


def ranks_of(variables, *arguments):
    """(exit code, standard output, standard error) of two processes with the variables of two ranks."""
    started = [
        subprocess.Popen(
            [sys.executable, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env=environment({name: value.format(rank=rank) for name, value in variables.items()}),
        )
        for rank in range(2)
    ]  # fmt: skip
    said = [process.communicate(timeout=60) for process in started]
    return [(process.returncode, *texts) for process, texts in zip(started, said, strict=True)]


@pytest.mark.parametrize(
    ("variables", "command"), [(FOREIGN[flavour()], "dllm.train"), (FOREIGN[flavour()], "dllm.serve"), (SRUN, "dllm.evaluate")]
)
def test_ranks_that_mpi_does_not_see_are_refused_by_one_of_them(variables, command):
    (code, out, first), (other_code, other_out, second) = ranks_of(variables, "-m", command)
    assert (code, other_code, out, other_out) == (REFUSED, REFUSED, "", "")
    lines = [line for line in first.splitlines() if line.startswith("dllm: ")]
    assert len(lines) == 1
    assert "has started 4 ranks, but MPI (/" in lines[0]
    assert "sees 1:" in lines[0]
    assert (mpirun_beside() or "the mpirun of this MPI") in lines[0]
    assert "dllm" not in second


@pytest.mark.parametrize("variables", [STEP, {**STEP, "SLURM_PROCID": "0"}, {**SRUN, "SLURM_STEP_NUM_TASKS": "1"}])
def test_one_process_in_a_batch_script_or_a_shell_of_salloc_goes_on(variables):
    variables = {name: value.format(rank=0) for name, value in variables.items()}
    done = mpirun(0, "-m", "dllm.train", "--settings", env=variables)
    assert done.returncode == 0, done


def test_the_launcher_takes_the_mpirun_beside_its_python(tmp_path):
    fake = tmp_path / "mpirun"
    fake.write_text("#!/bin/sh\necho Open MPI of somebody else\n")
    fake.chmod(0o755)
    program = "from dllm.launching import mpirun; print(mpirun.path(), mpirun.command(2, 2, {})[0])"
    variables = environment() | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    words = [sys.executable, "-c", program]
    found = subprocess.run(words, env=variables, capture_output=True, text=True, timeout=60, check=True)
    there = mpirun_beside() or str(fake)
    assert found.stdout.split() == [there, there]


def test_beside_the_python_of_the_system_is_no_mpirun_of_its_own(tmp_path, monkeypatch):
    for name in ("python", "mpirun"):
        (tmp_path / name).touch(0o755)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    for prefix, base, found in (("venv", "usr", True), ("usr", "usr", False), ("conda", "conda", True)):
        monkeypatch.setattr(sys, "prefix", str(tmp_path / prefix))
        monkeypatch.setattr(sys, "base_prefix", str(tmp_path / base))
        (tmp_path / "conda" / "conda-meta").mkdir(parents=True, exist_ok=True)
        assert mpirun_beside() == (str(tmp_path / "mpirun") if found else None), prefix


@pytest.mark.skipif(flavour() == "openmpi", reason="Open MPI takes little shared memory")
def test_too_little_shared_memory_is_told_by_one_rank_before_mpi_starts():
    assert shortage(1) is None
    assert shortage(2) is None
    room = os.statvfs("/dev/shm")
    ranks = room.f_blocks * room.f_frsize // MPICH_SHARE + 1
    assert f"and {ranks} ranks of MPICH take" in shortage(ranks)
    for rank, lines in ((0, 1), (1, 0)):
        variables = {"MPI_LOCALRANKID": str(rank), "MPI_LOCALNRANKS": str(ranks)}
        done = mpirun(0, "-m", "dllm.train", "--settings", env=variables, check=True)
        assert done.stderr.count("/dev/shm has") == len(done.stderr.splitlines()) == lines
