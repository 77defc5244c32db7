"""Where kernels and the embedded corpus are kept: full disks, folders that cannot be written to, users without a home."""

import os
import pathlib
import subprocess
import sys

import pytest
from helpers.launch import environment

from dllm.data import embedded
from dllm.kernels.caches import temporary_cache

COMPILE = """
import resource, sys
import numpy as np
most = int(sys.argv[1])
if most >= 0:
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))  # as a quota would, no file grows further
from dllm.kernels import reduce
reduce.copy(np.zeros(3), np.zeros(3))
reduce.fence()
print(*reduce.fence.stats.cache_hits.values(), *reduce.copy.stats.cache_hits.values())
"""
ATTEND = """
import hashlib
import numpy as np
from dllm.kernels import attention
from dllm.kernels.gemm import aligned
from dllm.kernels.team import Team
rng, S, T, B = np.random.default_rng(1), 11, 9, 64
h, k, m = (aligned((4, rows * B, 16), np.float32) for rows in (T, S, S))
for x in (h, k, m):
    x[:] = rng.standard_normal(x.shape)
c, A = aligned(h.shape, np.float32), np.zeros((B, T, S), np.float32)
attention.attend(c, A, h, 0, k, m, np.full(B, S), S, T, B, Team())
print(*attention.attend_lanes.stats.cache_hits.values(), hashlib.sha256(A.tobytes()).hexdigest())
"""
NOBODY = """
import os, sys, tempfile
from dllm.kernels import caches
for name in ("XDG_CACHE_HOME", "HOME"):
    os.environ.pop(name, None)
tempfile.tempdir = sys.argv[1]
os.setuid(12345)
found = caches.user_cache()
print(found, oct(found.stat().st_mode & 0o777), caches.user_cache() == found)
"""


def run(program, *arguments, **variables):
    """Standard output, and lines on standard error, of a program; it must succeed."""
    words, variables = [sys.executable, "-c", program, *map(str, arguments)], environment(variables)
    variables = {name: value for name, value in variables.items() if value != "None"}
    variables["PYTHONDONTWRITEBYTECODE"] = "1"  # Python itself would leave files that are cut short in this tree
    done = subprocess.run(words, env=variables, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip(), done.stderr.splitlines()


@pytest.mark.parametrize("most", [0, 1000])  # the second is enough for the index of a kernel, not for its code
def test_a_disk_that_fills_costs_time_alone(tmp_path, most):
    hits, said = run(COMPILE, most, NUMBA_CACHE_DIR=tmp_path)
    assert hits == ""
    assert len(said) == 1
    assert f"cannot be kept in {tmp_path}" in said[0]
    assert "NUMBA_CACHE_DIR" in said[0]
    if most:
        assert run(COMPILE, most, NUMBA_CACHE_DIR=tmp_path, MPI_LOCALRANKID=1) == ("", [])  # another rank has said it
        assert run(COMPILE, -1, NUMBA_CACHE_DIR=tmp_path) == ("", [])
        assert run(COMPILE, -1, NUMBA_CACHE_DIR=tmp_path) == ("1 1", [])


@pytest.mark.parametrize(
    ("name", "place"), [("NUMBA_CACHE_DIR", "/proc/nothing"), ("XDG_CACHE_HOME", "file/below"), ("HOME", "/proc/nothing")]
)
def test_a_folder_that_cannot_be_made_is_named(tmp_path, name, place):
    (tmp_path / "file").touch()
    others = dict.fromkeys(("NUMBA_CACHE_DIR", "XDG_CACHE_HOME"), "None")
    hits, said = run(COMPILE, -1, **(others | {name: tmp_path / place}))
    assert hits == ""
    assert len(said) == 1
    assert str(tmp_path / place) in said[0]


def test_what_was_cut_short_is_compiled_and_kept_again(tmp_path):
    run(COMPILE, -1, NUMBA_CACHE_DIR=tmp_path)
    for number, path in enumerate(sorted(tmp_path.rglob("*.nb?"))):
        os.truncate(path, number % 3 * 10)
    assert run(COMPILE, -1, NUMBA_CACHE_DIR=tmp_path) == ("", [])
    assert run(COMPILE, -1, NUMBA_CACHE_DIR=tmp_path) == ("1 1", [])


def test_a_process_that_compiles_has_the_bits_of_one_that_loads(tmp_path):
    """A sum in a kernel that another one calls is added up in the order that it has there, whoever else has brought it."""
    (fresh, _), (loaded, _) = (run(ATTEND, NUMBA_CACHE_DIR=tmp_path) for _ in range(2))
    assert loaded == f"1 {fresh}"  # hits of the cache, and a hash


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become a user without a home")
def test_a_user_without_a_home_has_a_temporary_folder_of_its_own(tmp_path):
    for folder in (tmp_path, *tmp_path.parents[:2]):
        folder.chmod(0o777)
    said, _ = run(NOBODY, tmp_path)
    assert said == f"{tmp_path}/dllm-cache-12345 0o700 True"


def test_a_temporary_folder_that_others_can_change_is_not_believed(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    folder = temporary_cache()
    assert folder.parent == tmp_path
    folder.chmod(0o777)
    assert temporary_cache() is None
    folder.rmdir()
    folder.symlink_to("/")
    assert temporary_cache() is None


def test_the_embedded_corpus_goes_where_it_can(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "own" / "deep"))
    assert embedded._place("corpus") == tmp_path / "own" / "deep" / "dllm" / "corpus"
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/nothing")
    assert embedded._place("corpus") == pathlib.Path(temporary_cache(), "dllm", "corpus")
