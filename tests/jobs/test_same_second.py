"""Runs that are started in the same second: each has a folder of its own, or one says that the folder is taken."""

import contextlib
import pathlib

import pytest
from helpers.faults import fault
from helpers.launch import REFUSED, Job, train_arguments

CLOCK = """
import types
module.datetime = types.SimpleNamespace(datetime=types.SimpleNamespace(now=lambda: module_time))
"""
NOW = "import datetime as real\nmodule_time = real.datetime(2026, 1, 2, 3, 4, 5)\n"  # of every process
# All look at the same moment, however long their imports take.
MEET = """
def meet(count, look=module.new_name):
    def together(*words):
        found = look(*words)
        once(f"here-{os.getpid()}")
        end = time.monotonic() + 20
        while time.monotonic() < end and sum(name.startswith("here") for name in os.listdir(FOLDER)) < count:
            time.sleep(0.01)
        return found
    module.new_name = together
if rank == 0:
    meet(COUNT)
"""


def outcomes(folder, count, *words, ranks=2):
    """The CompletedProcess of so many jobs of the same arguments, started in `folder` in the same second."""
    code = NOW + CLOCK.replace("lambda: module_time", "lambda at=module_time: at")
    code += MEET.replace("FOLDER", repr(str(folder / "fault"))).replace("COUNT", str(count))
    variables = fault(folder, "dllm.runs.run_folder", code)
    work = folder / "work"
    work.mkdir()
    with contextlib.ExitStack() as jobs:
        started = [jobs.enter_context(Job(ranks, *words, cwd=work, env=variables)) for _ in range(count)]
        return [job.wait() for job in started]


def test_three_without_a_name_get_three_folders(tiny, tmp_path):
    words = [word for word in train_arguments(tiny, "out", extra=("--max-steps", 2)) if word not in ("--out", "out")]
    found = outcomes(tmp_path, 3, *words, ranks=1)
    assert [done.returncode for done in found] == [0, 0, 0], found
    runs = sorted(path.relative_to(tmp_path / "work") for path in (tmp_path / "work").glob("runs/*/DONE"))
    first = "runs/default-20260102-030405"
    assert [str(path.parent) for path in runs] == [first, f"{first}-2", f"{first}-3"]


def test_of_two_with_the_same_name_one_has_it_and_the_other_says_so(tiny, tmp_path):
    found = outcomes(tmp_path, 2, *train_arguments(tiny, "out", extra=("--max-steps", 2)))
    assert sorted(done.returncode for done in found) == [0, REFUSED], found
    assert [done.stderr.count("--out out exists") for done in sorted(found, key=lambda done: done.returncode)] == [0, 1]
    assert pathlib.Path(tmp_path, "work", "out", "DONE").read_text() == "2\n"


def test_two_launchers_without_a_name_come_to_two_runs(tiny, tmp_path):
    words = [word for word in train_arguments(tiny, "out", extra=("--max-steps", 2)) if word not in ("--out", "out")][2:]
    found = outcomes(tmp_path, 2, "-m", "dllm.launch", "-n", 2, "--", *words, ranks=0)
    assert [done.returncode for done in found] == [0, 0], found
    assert len(list(tmp_path.glob("work/runs/*/DONE"))) == 2


@pytest.mark.parametrize("words", [("--data", "nothing"), ("--set", "train.lanes=1")])
def test_what_is_refused_leaves_no_folder(tiny, tmp_path, words):
    data = () if "--data" in words else ("--data", tiny)
    with Job(2, "-m", "dllm.train", *data, *words, cwd=tmp_path) as job:
        assert job.wait().returncode == REFUSED
    assert list(tmp_path.iterdir()) == []
