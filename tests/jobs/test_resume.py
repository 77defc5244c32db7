"""Stopped and gone on with: bit for bit the uninterrupted run, after a kill, a signal, a damaged file, a full disk."""

import json
import re
import shutil
import signal
import time

import numpy as np
import pytest
from helpers.faults import fault, slow_steps
from helpers.launch import Job, complaint, flavour, mpirun, train_arguments
from helpers.run_files import arrays, checkpoints, column, metrics
from helpers.several_commands import run_several

from dllm.data.corpus import Corpus

STOPPED_EARLY = 75
SETTINGS = (
    "model.dropout=0.2", "model.layers=2", "train.lanes=6", "train.lr=0.01", "train.clip=1.0", "train.eval_every=20",
    "train.epochs=1000", "checkpoint.every_steps=30", "checkpoint.keep=9", "log.every=7",
)  # fmt: skip


@pytest.fixture(scope="module")
def corpus(prepare, text):
    """So small that an epoch of 6 lanes ends within a run of 60 steps. Its valid text is learnt by heart: the loss falls."""
    return prepare("char", train=text[:2_200], valid=text[200:2_200])


@pytest.fixture(scope="module")
def straight(corpus, tmp_path_factory):
    """60 steps on 2 ranks without a break."""
    run = tmp_path_factory.mktemp("straight") / "run"
    mpirun(2, *train_arguments(corpus, run, *SETTINGS, extra=("--max-steps", 60)), check=True)
    return run


def resume(run, *extra):
    return ["-m", "dllm.train", "--resume", run, "--progress", "none", *extra]


def same(run, other, step):
    """Nothing differs between the checkpoints of two runs, nor between their metrics but what a clock measured."""
    (mine, my_scalars), (theirs, their_scalars) = arrays(run, step), arrays(other, step)
    assert mine.keys() == theirs.keys()
    for name, array in theirs.items():
        assert array.tobytes() == mine[name].tobytes(), name
    assert my_scalars == their_scalars
    assert metrics(run) == metrics(other)


def test_killed_with_sigkill_and_resumed_is_bit_for_bit_the_run_without_a_break(straight, corpus, tmp_path):
    run = tmp_path / "run"
    arguments = train_arguments(corpus, run, *SETTINGS, extra=("--max-steps", 60))
    with Job(2, *arguments, env=slow_steps(tmp_path, 0.2, after=37)) as job:
        log = run / "metrics.jsonl"
        job.until(lambda: log.exists() and '"step": 35,' in log.read_text(), "step 35")
        job.until(lambda: checkpoints(run)[-1] == 30, "the checkpoint of step 30")
        assert set(job.ranks()) == {0, 1}
        job.signal(signal.SIGKILL, job.processes())
        assert job.wait().returncode != 0
    assert not (run / "summary.json").exists()
    done = mpirun(2, *resume(run, "--max-steps", 60), check=True)
    assert complaint(done) == ""
    same(run, straight, 60)
    assert json.loads((run / "summary.json").read_text())["steps"] == 60


def test_stopped_by_steps_and_resumed_on_other_numbers_of_ranks_follows_the_run_on_four(corpus, tmp_path):
    settings = [*SETTINGS, "log.every=1"]
    run, steps = tmp_path / "run", {"four": 60, "run": 20}
    words = [train_arguments(corpus, tmp_path / name, *settings, extra=("--max-steps", steps[name]))[1:] for name in steps]
    run_several(tmp_path / "out", 4, words, check=True)
    mpirun(2, *resume(run, "--max-steps", 40), check=True)
    mpirun(3, *resume(run, "--max-steps", 60), check=True)
    for split in ("train", "valid"):
        alone, moved = metrics(tmp_path / "four", split), metrics(run, split)
        assert column(moved, "step").tolist() == column(alone, "step").tolist()
        np.testing.assert_allclose(column(moved, "loss"), column(alone, "loss"), rtol=1e-4)
    alone, moved = metrics(tmp_path / "four", "train"), metrics(run, "train")
    assert len(moved) == 60
    assert column(moved, "epoch").tolist() == column(alone, "epoch").tolist()  # lanes stand where they would have stood
    assert moved[-1]["epoch"] > 1
    assert moved[:20] == alone[:20]


def test_on_four_three_and_six_ranks_every_token_of_the_epochs_is_seen_once(corpus, tmp_path):
    """Each rank writes down which window of which lane it reads, and what stands there."""
    log = """
def window(self, number, width, before=module.Lanes.window):
    batch = before(self, number, width)
    if self.split == "train":
        with open({folder!r} + f"/{{os.getpid()}}.txt", "a") as file:
            for lane, text in zip(self.numbers, batch.inputs.T):
                file.write(f"{{lane}} {{number}} {{' '.join(map(str, text))}}\\n")
    return batch
module.Lanes.window = window
"""
    (tmp_path / "seen").mkdir()
    env = fault(tmp_path, "dllm.data.lanes", log.format(folder=str(tmp_path / "seen")))
    run = tmp_path / "run"
    settings = [*SETTINGS, "train.eval_every=1000"]
    mpirun(4, *train_arguments(corpus, run, *settings, extra=("--max-steps", 20)), env=env, check=True)
    mpirun(3, *resume(run, "--max-steps", 50), env=env, check=True)
    mpirun(6, *resume(run, "--max-steps", 92), env=env, check=True)
    seen = sorted(line for path in (tmp_path / "seen").iterdir() for line in path.read_text().splitlines())
    tokens = Corpus(corpus).read("train", 0, Corpus(corpus).split("train")["tokens"])
    length = len(tokens) // 6
    expected = []
    for lane in range(6):
        text = tokens[lane * length : (lane + 1) * length - 1]
        pieces = [text[at : at + 8] for at in range(0, len(text), 8)]
        assert len(pieces) == 46  # windows of an epoch; 92 steps are two epochs
        expected += [f"{lane} {8 * number} {' '.join(map(str, piece))}" for number, piece in enumerate(pieces)] * 2
    assert seen == sorted(expected)


def test_a_signal_stops_with_a_checkpoint_and_exit_code_75_and_the_run_goes_on(corpus, tmp_path):
    run, step = tmp_path / "run", 0
    arguments = train_arguments(corpus, run, *SETTINGS, "log.every=1", "checkpoint.every_steps=100000")
    arguments[arguments.index("none")] = "plain"
    forwarded = flavour() == "mpich"  # Open MPI's mpirun ends the job on SIGTERM
    stops = {
        "USR1 to mpirun": lambda job: job.signal(signal.SIGUSR1, [job.launcher()]),
        "TERM": lambda job: job.signal(signal.SIGTERM, [job.launcher()] if forwarded else job.ranks().values()),
        "INT to one rank": lambda job: job.signal(signal.SIGINT, [job.ranks()[1]]),
        "USR1 to one rank": lambda job: job.signal(signal.SIGUSR1, [job.ranks()[1]]),
    }
    env = slow_steps(tmp_path, 0.01)
    for name, stop in stops.items():
        with Job(2, *arguments, env=env) as job:
            job.until(lambda step=step: f"step {step + 3}/" in job.out, f"a step after {step}")
            begin = time.monotonic()
            stop(job)
            done = job.wait()
            assert time.monotonic() - begin < 20, name
        assert done.returncode == STOPPED_EARLY, f"{name}\n{done.stdout}\n{done.stderr}"
        assert checkpoints(run)[-1] > step, name
        step = checkpoints(run)[-1]
        assert done.stdout.splitlines()[-1].startswith(f"stopped at step {step}; go on with "), name
        assert f"mpirun -n 2 python -m dllm.train --resume {run}" in done.stdout
        arguments = ["-m", "dllm.train", "--resume", run, "--progress", "plain"]
    done = mpirun(2, *resume(run, "--max-steps", step + 5), check=True)
    assert complaint(done) == ""
    assert column(metrics(run, "train"), "step").tolist() == list(range(1, step + 6))


def test_out_of_time_ends_with_a_checkpoint_and_exit_code_0(corpus, tmp_path):
    run = tmp_path / "run"
    arguments = train_arguments(corpus, run, *SETTINGS, extra=("--max-seconds", 0.5))
    done = mpirun(2, *arguments, env=slow_steps(tmp_path, 0.02), check=True)
    assert done.seconds < 30
    steps = json.loads((run / "summary.json").read_text())["steps"]
    assert 0 < steps < 60
    assert checkpoints(run)[-1] == steps


@pytest.fixture
def three(straight, tmp_path):
    """A copy of a run with three checkpoints, the newest at step 60."""
    run = tmp_path / "three"
    shutil.copytree(straight, run)
    older = run / "checkpoints" / "step-00000030"
    assert checkpoints(run) == [20, 30, 40, 60]  # 20 and 40 were the best so far
    assert older.exists()
    return run


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def test_a_damaged_checkpoint_is_passed_over_with_one_warning_each(three, straight):
    newest = three / "checkpoints" / "step-00000060"
    flip(newest / "rank-00001-of-00002.h5")
    done = mpirun(2, *resume(three, "--max-steps", 50), check=True)
    warning = complaint(done)
    assert warning.count("\n") == 1
    assert re.fullmatch(r"dllm: .*step-00000060/rank-00001-of-00002.h5 is damaged.*trying the one before\n", warning)
    assert checkpoints(three)[-2:] == [40, 50]  # the run went back behind that of step 60
    mpirun(2, *resume(three, "--max-steps", 60), check=True)
    assert checkpoints(three)[-2:] == [50, 60]

    cut(three / "checkpoints" / "step-00000050" / "rank-00000-of-00002.h5")
    manifest = newest / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"step": 60', '"step": 61'))
    done = mpirun(2, *resume(three, "--max-steps", 60), check=True)
    lines = r"dllm: .*step-00000060/manifest.json is damaged.*\ndllm: .*step-00000050/rank-00000-of-00002.h5 is damaged.*\n"
    assert re.fullmatch(lines, complaint(done))
    same(three, straight, 60)


def test_where_every_checkpoint_is_damaged_the_command_is_refused(three):
    for path in three.glob("checkpoints/*/rank-00000-of-00002.h5"):
        cut(path)
    done = mpirun(0, *resume(three))
    assert done.returncode == 2
    assert re.fullmatch(r"dllm: no checkpoint of .* is whole: .*damaged.*\n", done.stderr)


def test_the_best_checkpoint_stays_besides_the_newest(corpus, tmp_path):
    run = tmp_path / "run"
    settings = "train.eval_every=10", "checkpoint.every_steps=5", "checkpoint.keep=2", "train.lr=0.003"
    mpirun(0, *train_arguments(corpus, run, *SETTINGS, *settings, extra=("--max-steps", 20)), check=True)
    losses = column(metrics(run, "valid"), "loss")
    assert losses[1] < losses[0]
    assert checkpoints(run) == [15, 20]
    mpirun(0, *resume(run, "--max-steps", 50, "--set", "train.lr=3.0"), check=True)
    assert column(metrics(run, "valid"), "loss")[2:].min() > losses[1]
    assert checkpoints(run) == [20, 45, 50]
    evaluated = mpirun(0, "-m", "dllm.evaluate", run, "--split", "valid", check=True).stdout
    assert ", step 20, valid split" in evaluated
    assert json.loads(evaluated.splitlines()[-1])["loss"] == pytest.approx(losses[1], rel=1e-6)
