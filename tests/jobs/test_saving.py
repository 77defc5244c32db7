"""Checkpoints are written while training goes on; a death at any stage of it, a bad disk or a second job costs nothing."""

import json
import re
import subprocess
import time
import types

import numpy as np
import pytest
from helpers.faults import fault
from helpers.launch import REFUSED, Job, complaint, flavour, mpirun, train_arguments
from helpers.run_files import checkpoints, column, metrics

from dllm.config import CheckpointConfig
from dllm.runs.checkpoint_writer import LONGEST, SHORTEST, Saver

STEPS = 40
SETTINGS = (
    "train.precision=fp64", "model.hidden=64", "model.embedding=64", "train.lanes=12", "train.threads=1", "log.sample=0",
    f"train.max_steps={STEPS}", "checkpoint.every_steps=10", "train.eval_every=1000",
)  # fmt: skip


@pytest.fixture(scope="module")
def undisturbed(tiny, tmp_path_factory):
    run = tmp_path_factory.mktemp("undisturbed") / "run"
    mpirun(3, *train_arguments(tiny, run, *SETTINGS), check=True)
    return run


def check(run, undisturbed):
    ours, theirs = metrics(run, "train"), metrics(undisturbed, "train")
    assert column(ours, "step").tolist() == column(theirs, "step").tolist()
    np.testing.assert_allclose(column(ours, "loss"), column(theirs, "loss"), rtol=1e-12)
    assert checkpoints(run)[-1] == STEPS


DIE = """
import signal
def die(): os.kill(os.getpid(), signal.SIGKILL) if rank == {rank} and once("died") else None
"""
STAGE = """
module.Saver.on_stage.append(lambda saver, stage: die() if saver.step == 20 and stage == "{stage}" else None)
"""
STAGES = {
    "before the data": STAGE.format(stage="begin"),
    "between two pieces of the data": STAGE.format(stage="piece"),
    "before a file is renamed": """
def replace(one, other, before=os.replace):
    die() if "step-00000020/rank" in str(other) else None
    before(one, other)
os.replace = replace
""",
    "after the data": STAGE.format(stage="end"),
    "before the manifest is renamed": """
def replace(one, other, before=os.replace):
    die() if str(other).endswith("step-00000020/manifest.json") else None
    before(one, other)
os.replace = replace
""",
    "after the manifest": """
def replace(one, other, before=os.replace):
    before(one, other)
    die() if str(other).endswith("step-00000020/manifest.json") else None
os.replace = replace
""",
}


@pytest.mark.parametrize("stage", STAGES)
def test_killed_at_any_stage_of_a_checkpoint(tiny, undisturbed, tmp_path, stage):
    run, rank = tmp_path / "run", 0 if "manifest" in stage else 1
    env = fault(tmp_path, "dllm.runs.checkpoint_writer", DIE.format(rank=rank) + STAGES[stage])
    launch = ["-m", "dllm.launch", "-n", 3, "--", *train_arguments(tiny, run, *SETTINGS)[2:]]
    done = mpirun(0, *launch, env=env, check=True)
    assert (tmp_path / "fault" / "died").exists()
    if flavour() == "mpich":
        begun = "step 20" if stage == "after the manifest" else "step 10"
        assert f"starting it again from {begun}" in done.stderr, done.stderr
    else:
        assert f"rank {rank} of 3 died; 2 go on" in done.stderr, done.stderr
    assert complaint(done).count("Traceback") == 0, done.stderr
    check(run, undisturbed)


def test_steps_go_on_while_a_disk_is_slow(tiny, undisturbed, tmp_path):
    slow = """
def flush(path, before=module.flush):
    time.sleep(0.5 if "step-00000010" in str(path) else 0)
    before(path)
module.flush = flush
"""
    run = tmp_path / "run"
    often = "checkpoint.every_steps=0", "checkpoint.every_minutes=0.0000001"
    mpirun(3, *train_arguments(tiny, run, *SETTINGS, *often), env=fault(tmp_path, "dllm.files.storage", slow), check=True)
    check(run, undisturbed)
    taken = checkpoints(run)
    assert max(np.diff([0, *taken])) > 1  # several steps while one was written
    assert json.loads((run / "summary.json").read_text())["checkpoint_seconds"] < 1


def test_what_the_disk_gives_back_is_compared(tiny, undisturbed, tmp_path):
    bad = """
def forget(path, before=module.forget):
    if rank == 1 and "step-00000020" in str(path):
        with open(path, "r+b") as file:
            file.seek(-5000, 2)
            file.write(b"rotten")
    before(path)
module.forget = forget
"""
    run = tmp_path / "run"
    done = mpirun(3, *train_arguments(tiny, run, *SETTINGS), env=fault(tmp_path, "dllm.files.storage", bad), check=True)
    assert re.fullmatch(r"dllm: no checkpoint at step 20: .*; training goes on, older ones stay\n", complaint(done))
    assert checkpoints(run) == [10, 30, 40]
    check(run, undisturbed)


@pytest.fixture
def bind():
    """bind(folder, "ro") makes a folder read-only for everybody, bind(folder, "rw") ends that."""
    bound = []

    def run(*words):
        return subprocess.run(["mount", *words], capture_output=True, text=True, timeout=20, check=False)

    def change(folder, how):
        if folder not in bound:
            done = run("--bind", folder, folder)
            if done.returncode:
                pytest.skip(f"cannot make a folder read-only: {done.stderr.strip()}")
            bound.append(folder)
        end = time.monotonic() + 20
        while (done := run("-o", f"remount,bind,{how}", folder)).returncode and time.monotonic() < end:
            time.sleep(0.001)  # somebody has a file open for writing
        assert done.returncode == 0, done.stderr

    yield change
    for folder in reversed(bound):
        subprocess.run(["umount", "-l", folder], timeout=20, check=True)


def test_a_folder_that_becomes_read_only_costs_checkpoints_and_nothing_else(tiny, undisturbed, tmp_path, bind):
    run = tmp_path / "run"
    slow = """
module.Trainer.before_step.append(lambda trainer: time.sleep(0.05 if trainer.state.step > 10 else 0))
"""
    with Job(2, *train_arguments(tiny, run, *SETTINGS), env=fault(tmp_path, "dllm.training.trainer", slow)) as job:
        job.until(lambda: checkpoints(run), "a checkpoint")
        bind(run / "checkpoints", "ro")
        job.until(lambda: "no checkpoint at step" in job.err, "a warning")
        bind(run / "checkpoints", "rw")
        done = job.wait()
    assert done.returncode == 0, done.stderr
    known = r"dllm: no checkpoint at step \d+: Read-only file system; training goes on, older ones stay"
    assert all(re.fullmatch(known, line) for line in complaint(done).splitlines()), done.stderr
    assert checkpoints(run)[0] == 10
    check(run, undisturbed)
    bind(tmp_path, "ro")
    for refused in (train_arguments(tiny, tmp_path / "other"), ["-m", "dllm.train", "--resume", run]):
        done = mpirun(2, *refused)
        assert done.returncode == REFUSED
        assert re.fullmatch(r"dllm: cannot write to the run folder .*: Read-only file system.*\n", complaint(done)), done.stderr


def test_the_job_that_took_a_run_last_has_it(tiny, undisturbed, tmp_path):
    run = tmp_path / "run"
    slow = """
module.Trainer.before_step.append(lambda trainer: time.sleep(0.2 if trainer.state.step > 12 else 0))
"""
    with Job(2, *train_arguments(tiny, run, *SETTINGS), env=fault(tmp_path, "dllm.training.trainer", slow)) as first:
        first.until(lambda: checkpoints(run), "a checkpoint")
        mpirun(3, "-m", "dllm.train", "--resume", run, "--progress", "none", check=True)
        done = first.wait()
    assert done.returncode == REFUSED
    assert re.search(rf"another job has taken over {run}: this one ends at step \d+", complaint(done))
    check(run, undisturbed)
    assert (run / "DONE").exists()


def test_the_interval_follows_the_cost_and_the_time_between_failures():
    ranks = types.SimpleNamespace(rank=0, size=4)
    layout = types.SimpleNamespace(parameters=10, tensors={})
    saver = lambda **settings: Saver(ranks, None, layout, 4, "", CheckpointConfig(**settings), print)
    assert saver(every_minutes=3.0).interval() == 180
    assert saver(every_minutes=0.0).interval() == 0
    chosen = saver(mtbf_hours=40.0)
    chosen.cost = 0.5
    assert chosen.interval() == pytest.approx((2 * 0.5 * 10 * 3600) ** 0.5)
    chosen.cost = 1e-6
    assert chosen.interval() == SHORTEST
    chosen.cost = 1e6
    assert chosen.interval() == LONGEST
