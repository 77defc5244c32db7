"""Small corpora and a short run for all tests; under mpirun, a test that fails on one rank ends all ranks."""

import json
import os
import shutil
import subprocess
import sys
import time

import pytest
from helpers.launch import mpirun, train_arguments
from paths import DATA


def _world(config):
    """COMM_WORLD where pytest runs with --with-mpi on several ranks, else None."""
    if not config.getoption("--with-mpi", False):
        return None
    from mpi4py import MPI

    return MPI.COMM_WORLD if MPI.COMM_WORLD.size > 1 else None


def _end_all_ranks(config, what, text):
    """Say what failed in one write, then end the job: the other ranks wait for this one."""
    comm = _world(config)
    if comm is None:
        return
    capture = config.pluginmanager.getplugin("capturemanager")
    with capture.global_and_fixture_disabled():
        sys.stdout.flush()
        os.write(2, f"\nrank {comm.rank} of {comm.size}: {what}\n{text}\n".encode())
        time.sleep(0.2)  # let mpirun pass it on
        comm.Abort(1)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    if report.failed:
        _end_all_ranks(item.config, f"{item.nodeid} failed in {report.when}", report.longreprtext)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector):
    report = yield
    if report.failed:
        _end_all_ranks(collector.config, f"cannot collect {collector.nodeid}", report.longreprtext)
    return report


def pytest_terminal_summary(terminalreporter, config):
    """One line a rank, in one write, that tests/test_mpi.py counts."""
    if config.getoption("--with-mpi", False):
        from mpi4py import MPI

        passed = len(terminalreporter.stats.get("passed", []))
        os.write(1, f"\nrank {MPI.COMM_WORLD.rank} passed {passed} tests\n".encode())


@pytest.fixture(scope="session")
def shakespeare():
    """The bytes of tiny Shakespeare."""
    path = DATA / "tinyshakespeare" / "input.txt"
    assert path.exists(), f"{path} is missing; set DLLM_DATA to the folder with tinyshakespeare/input.txt"
    return path.read_bytes()


@pytest.fixture(scope="session")
def prepare(tmp_path_factory):
    """prepare(kind, train=bytes, valid=bytes, ..., options=()): the path of a corpus, made by dllm.prepare."""

    def make(kind, options=(), **splits):
        folder = tmp_path_factory.mktemp(kind)
        arguments = ["-m", "dllm.prepare", "--tokenizer", kind, "--out", folder / "corpus", *options]
        for split, text in splits.items():
            (folder / f"{split}.txt").write_bytes(text)
            arguments += [f"--{split}", folder / f"{split}.txt"]
        mpirun(0, *arguments, check=True)
        return folder / "corpus"

    return make


@pytest.fixture(scope="session")
def tiny(prepare, shakespeare):
    """200 kB of Shakespeare by characters, with train, valid and test."""
    parts = {"train": shakespeare[:200_000], "valid": shakespeare[-40_000:-20_000], "test": shakespeare[-20_000:]}
    return prepare("char", **parts)


@pytest.fixture(scope="session")
def world(tmp_path_factory, tiny):
    """A folder with `tiny`, the same without valid and test, and a run of 20 steps that was made by 2 ranks."""
    world = tmp_path_factory.mktemp("world")
    for name in ("tiny", "train-only"):
        shutil.copytree(tiny, world / name)
    path = world / "train-only" / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["splits"] = {"train": manifest["splits"]["train"]}
    path.write_text(json.dumps(manifest))
    settings = "train.eval_every=8", "train.lr=0.02"
    mpirun(2, *train_arguments("tiny", "run", *settings, extra=("--max-steps", 20)), cwd=world, check=True)
    return world


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 3 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=3m", "none", folder]
    done = subprocess.run(mount, capture_output=True, text=True, timeout=20, check=False)
    if done.returncode:
        pytest.skip(f"cannot mount a small file system: {done.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "-l", folder], timeout=20, check=True)
