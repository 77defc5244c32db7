"""Checkpoints are written while training goes on; a death at any stage of it, a bad disk or a second job costs nothing."""

import json
import re
import types

import numpy as np
import pytest
from helpers.faults import fault, kill_at_rename, kill_at_stage, slow_steps
from helpers.launch import NOT_SAVED, REFUSED, Job, complaint, flavour, mpirun, train_arguments
from helpers.run_files import checkpoints, column, metrics

from dllm.comm.replicas import Domains
from dllm.config import CheckpointConfig, Config
from dllm.runs.checkpoint import facts
from dllm.runs.checkpoint_writer import LONGEST, SHORTEST, Saver
from dllm.runs.provenance import Text

STEPS = 40
MANIFEST = "step-00000020/manifest.json"
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


STAGES = {  # when: (rank that dies, how it is killed)
    "before the data": (1, lambda folder, rank: kill_at_stage(folder, rank=rank, step=20, stage="begin")),
    "between two pieces of the data": (1, lambda folder, rank: kill_at_stage(folder, rank=rank, step=20, stage="piece")),
    "before a file is renamed": (1, lambda folder, rank: kill_at_rename(folder, rank=rank, path="step-00000020/rank")),
    "after the data": (1, lambda folder, rank: kill_at_stage(folder, rank=rank, step=20, stage="end")),
    "before the manifest is renamed": (0, lambda folder, rank: kill_at_rename(folder, rank=rank, path=MANIFEST)),
    "after the manifest": (0, lambda folder, rank: kill_at_rename(folder, rank=rank, path=MANIFEST, after=True)),
}


@pytest.mark.parametrize("stage", STAGES)
def test_killed_at_any_stage_of_a_checkpoint(tiny, undisturbed, tmp_path, stage):
    run, (rank, killed) = tmp_path / "run", STAGES[stage]
    launch = ["-m", "dllm.launch", "-n", 3, "--", *train_arguments(tiny, run, *SETTINGS)[2:]]
    done = mpirun(0, *launch, env=killed(tmp_path, rank), check=True)
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
    assert re.fullmatch(r"dllm: no checkpoint at step 20: .*; older ones stay\n", complaint(done))
    assert checkpoints(run) == [10, 30, 40]
    check(run, undisturbed)


def test_the_job_that_took_a_run_last_has_it(tiny, undisturbed, tmp_path):
    run = tmp_path / "run"
    with Job(2, *train_arguments(tiny, run, *SETTINGS), env=slow_steps(tmp_path, 0.2, after=13)) as first:
        first.until(lambda: checkpoints(run), "a checkpoint")
        mpirun(3, "-m", "dllm.train", "--resume", run, "--progress", "none", check=True)
        done = first.wait()
    assert done.returncode == REFUSED
    assert re.search(rf"another job has taken over {run}: this one ends at step \d+", complaint(done))
    check(run, undisturbed)
    assert (run / "DONE").exists()


def test_the_interval_follows_the_cost_and_the_time_between_failures():
    ranks, folder = types.SimpleNamespace(rank=0, size=4), types.SimpleNamespace(run="run")
    layout, domains = types.SimpleNamespace(parameters=10, tensors={}), Domains(0, (0,) * 4, ("here",) * 4)
    with_settings = lambda settings: Config(checkpoint=CheckpointConfig(**settings))
    saver = lambda **settings: Saver(
        ranks, folder, domains, layout, facts(layout, 4, "", [Text("")], ""), with_settings(settings), print
    )
    assert saver(every_minutes=3.0).interval() == 180
    assert saver(every_minutes=0.0).interval() == 0
    chosen = saver(mtbf_hours=40.0)
    chosen.cost = 0.5
    assert chosen.interval() == pytest.approx((2 * 0.5 * 10 * 3600) ** 0.5)
    chosen.cost = 1e-6
    assert chosen.interval() == SHORTEST
    chosen.cost = 1e6
    assert chosen.interval() == LONGEST


FULL = """
import errno, itertools
tries = itertools.count()
def full(path, *more, before=module.{name}):
    import dllm.training.trainer
    dllm.training.trainer.LAST_NAPS = 0.01, 0.02, 0.03
    if "step-00000040" in str(path) and rank == {rank} and next(tries) < {most}:
        raise OSError(errno.ENOSPC, "No space left on device")
    return before(path, *more)
full.__globals__.update(tries=tries, errno=errno)
module.{name} = full
"""


@pytest.mark.parametrize(
    ("ranks", "module", "name"), [(1, "dllm.files.storage", "write_json"), (3, "dllm.files.hdf5", "write_arrays")]
)
def test_a_run_whose_last_state_is_not_on_disk_is_not_done(tiny, tmp_path, ranks, module, name):
    run = tmp_path / "run"
    words = [word if word != "none" else "plain" for word in train_arguments(tiny, run, *SETTINGS)]
    done = mpirun(ranks, *words, env=fault(tmp_path, module, FULL.format(name=name, rank=ranks - 1, most=99)))
    assert done.returncode == NOT_SAVED
    told = complaint(done).splitlines()
    problem = "No space left on device"
    assert told[0] == f"dllm: no checkpoint at step 40: {problem}; older ones stay"
    assert told[1] == "dllm: the last checkpoint is tried again for 0 s: make room for it"
    ready = f"its newest checkpoint is of step 30. Make room, then --resume {run}"
    assert told[2:] == [f"dllm: the model of step 40 is NOT on disk: {problem}; {ready}"]
    assert "done  " not in done.stdout
    assert "generate  " not in done.stdout
    assert not (run / "DONE").exists()
    assert checkpoints(run) == [10, 20, 30]
    mpirun(1, "-m", "dllm.train", "--resume", run, "--progress", "none", check=True)
    assert (run / "DONE").exists()
    assert checkpoints(run)[-1] == 40


def test_a_disk_that_has_room_again_gets_the_last_state(tiny, undisturbed, tmp_path):
    run, code = tmp_path / "run", FULL.format(name="write_arrays", rank=2, most=2)
    done = mpirun(3, *train_arguments(tiny, run, *SETTINGS), env=fault(tmp_path, "dllm.files.hdf5", code), check=True)
    assert complaint(done).count("\n") == 2
    assert checkpoints(run)[-1] == 40
    assert (run / "DONE").exists()
    check(run, undisturbed)


def test_older_checkpoints_that_cannot_be_removed_cost_a_warning_alone(tiny, undisturbed, tmp_path):
    bad = """
def prune(*words):
    raise OSError(5, "Input/output error")
module.prune = prune
"""
    run = tmp_path / "run"
    settings = *SETTINGS, "checkpoint.keep=1"
    done = mpirun(3, *train_arguments(tiny, run, *settings), env=fault(tmp_path, "dllm.runs.checkpoint", bad), check=True)
    assert set(complaint(done).splitlines()) == {"dllm: older checkpoints could not all be removed: Input/output error"}
    assert checkpoints(run) == [10, 20, 30, 40]
    assert (run / "DONE").exists()
    check(run, undisturbed)
