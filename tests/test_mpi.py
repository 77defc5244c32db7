"""Runs the tests that are marked mpi, on 1, 2 and 4 ranks."""

import re
from pathlib import Path

import pytest
from launch import Job

LIMIT = 200  # seconds for all of them


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_the_tests_marked_mpi_pass_on_this_many_ranks(ranks):
    options = ["--with-mpi", "-m", "mpi", "-q", "-p", "no:cacheprovider", "--timeout", "100"]
    here = Path(__file__).parent
    with Job(ranks, "-m", "pytest", *options, here, timeout=LIMIT, cwd=here.parent) as job:
        done = job.wait()
        passed = dict(re.findall(r"^rank (\d+) passed (\d+) tests$", done.stdout, re.M))
        assert done.returncode == 0, str(job)
        assert len(passed) == ranks, str(job)
        assert len(set(passed.values())) == 1, str(job)
        assert int(passed["0"]) > 5, str(job)
