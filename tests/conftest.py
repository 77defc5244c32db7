"""Which tests run; small corpora and a short run for all of them; under mpirun, a failure on one rank ends all ranks.

Every test is marked by its folder: unit, ranks, jobs, system.

    python -m pytest                             unit but for what is slow, ranks on 3 ranks, and the jobs of test_smoke.py
    python -m pytest tests/jobs/test_launch.py   all of what is named
    python -m pytest --full                      everything
    python -m pytest --full --leave-out FILE     but for the tests that FILE names, one a line; the gate has run them
"""

import json
import os
import pathlib
import shutil
import sys
import time

import pytest
from helpers.launch import mpirun, train_arguments
from helpers.text import standard_library

TESTS = pathlib.Path(__file__).parent
KINDS = ("unit", "ranks", "jobs", "system")
SMOKE = "test_smoke.py"


def pytest_addoption(parser):
    text = "all tests: also slow ones, real jobs, and those that mount, make network namespaces or start Slurm"
    parser.addoption("--full", action="store_true", help=text)
    parser.addoption("--leave-out", type=pathlib.Path, metavar="FILE", help="no test that a line of this file names")


def _named(config):
    """The files and folders below tests/ that the command line names."""
    if config.args_source is not config.ArgsSource.ARGS:
        return []
    named = [(config.invocation_params.dir / argument.partition("::")[0]).resolve() for argument in config.args]
    return [path for path in named if TESTS in path.parents]


def _is_left_out(item, kind, named, full):
    if "mpi" in item.keywords and not item.config.getoption("--with-mpi"):
        return item.path not in named  # test_start_ranks.py starts them
    if full or not {item.path, *item.path.parents}.isdisjoint(named):
        return False
    return "slow" in item.keywords or kind == "system" or (kind == "jobs" and item.path.name != SMOKE)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config, items):
    named, full, kept, left_out = _named(config), config.getoption("--full"), [], []
    file = config.getoption("--leave-out")
    done = set(file.read_text().splitlines()) if file else set()
    if not full and any(TESTS / "system" in (path, *path.parents) for path in named):
        raise pytest.UsageError("tests/system mounts, makes network namespaces or starts Slurm: it needs --full")
    for item in items:
        kind = next((name for name in KINDS if TESTS / name in item.path.parents), None)
        if kind:
            item.add_marker(kind)
        (left_out if item.nodeid in done or _is_left_out(item, kind, named, full) else kept).append(item)
    if left_out:
        config.hook.pytest_deselected(items=left_out)
    # Unit tests go first: one process compiles the kernels then, and ranks find them in the cache.
    items[:] = sorted(kept, key=lambda item: [TESTS / name in item.path.parents for name in KINDS], reverse=True)


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
    """One line a rank, in one write, that test_start_ranks.py counts."""
    if config.getoption("--with-mpi", False):
        from mpi4py import MPI

        passed = len(terminalreporter.stats.get("passed", []))
        os.write(1, f"\nrank {MPI.COMM_WORLD.rank} passed {passed} tests\n".encode())


@pytest.fixture(scope="session")
def text():
    """1.2 MB of ASCII that every machine has: sources of the standard library."""
    return standard_library(1_200_000)


@pytest.fixture(scope="session")
def prepare(tmp_path_factory):
    """prepare(kind, train=bytes, valid=bytes, ..., options=()): the path of a corpus; kind "": options say it."""

    def make(kind, options=(), **splits):
        folder = tmp_path_factory.mktemp(kind or "corpus")
        vocabulary = ("--tokenizer", kind) if kind else ()
        arguments = ["-m", "dllm.prepare", *vocabulary, "--out", folder / "corpus", *options]
        for split, text in splits.items():
            (folder / f"{split}.txt").write_bytes(text)
            arguments += [f"--{split}", folder / f"{split}.txt"]
        mpirun(0, *arguments, check=True)
        return folder / "corpus"

    return make


@pytest.fixture(scope="session")
def tiny(prepare, text):
    """200 kB of text by characters, with train, valid and test."""
    parts = {"train": text[:200_000], "valid": text[-40_000:-20_000], "test": text[-20_000:]}
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
