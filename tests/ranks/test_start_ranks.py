"""Runs the other tests of this folder, which are marked mpi: on 3 ranks, with --full on 1 and 8 too; and one that fails."""

import re
import shutil
from pathlib import Path

import pytest
from helpers.launch import Job, mpirun

HERE, TESTS = Path(__file__).parent, Path(__file__).parents[1]
UNUSED = ("cacheprovider", "schemathesis", "hypothesispytest", "anyio")  # plug-ins: to import them takes each rank a second
OPTIONS = ("--with-mpi", "-m", "mpi", "-q", *(f"-pno:{name}" for name in UNUSED), "--timeout", "200")
OF_FILES = "test_replicas.py", "test_shared_reading.py", "test_supply.py"  # on 8 they take a minute and show no more than on 3
FAILING = """
import time
import pytest
from mpi4py import MPI

@pytest.mark.mpi
def test_last_rank():
    assert MPI.COMM_WORLD.rank < MPI.COMM_WORLD.size - 1, "not the last one"
    MPI.COMM_WORLD.barrier()
"""


@pytest.mark.parametrize("ranks", [pytest.param(1, marks=pytest.mark.slow), 3, pytest.param(8, marks=pytest.mark.slow)])
def test_the_tests_marked_mpi_pass_on_this_many_ranks(ranks):
    few = [word for name in OF_FILES if ranks > 4 for word in ("--ignore", HERE / name)]
    with Job(ranks, "-m", "pytest", *OPTIONS, *few, HERE, timeout=280, cwd=TESTS.parent) as job:
        done = job.wait()
        passed = dict(re.findall(r"^rank (\d+) passed (\d+) tests$", done.stdout, re.M))
        assert done.returncode == 0, str(job)
        assert len(passed) == ranks, str(job)
        assert len(set(passed.values())) == 1, str(job)
        assert int(passed["0"]) > 5, str(job)


def test_a_test_that_fails_on_one_rank_is_shown_and_ends_all_ranks(tmp_path):
    shutil.copy(TESTS / "conftest.py", tmp_path)
    shutil.copytree(TESTS / "helpers", tmp_path / "helpers", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(TESTS.parent / "pyproject.toml", tmp_path)
    (tmp_path / "test_failing.py").write_text(FAILING)
    done = mpirun(3, "-m", "pytest", *OPTIONS, tmp_path, cwd=tmp_path, timeout=40)
    assert done.returncode != 0
    assert "rank 2 of 3: test_failing.py::test_last_rank failed in call" in done.stderr
    assert "AssertionError: not the last one" in done.stderr
