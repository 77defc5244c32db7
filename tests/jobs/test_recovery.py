"""Ranks die while they train, at random: the run goes on, and every loss is that of the undisturbed run.

DLLM_CHAOS=100 python -m pytest tests/jobs/test_recovery.py     more runs than the few of every day
"""

import os
import pathlib
import re
import signal
import time

import numpy as np
import pytest
from helpers.launch import Job, flavour, train_arguments
from helpers.run_files import same_losses

RUNS = int(os.environ.get("DLLM_CHAOS", 4))
STEPS = 60
pytestmark = pytest.mark.skipif(flavour() == "mpich", reason="MPICH ends the job where a rank dies; test_launch.py has that")
SETTINGS = (
    "train.precision=fp64", "model.hidden=96", "model.embedding=96", "train.lanes=24", "train.window=32", "train.threads=1",
    f"train.max_steps={STEPS}", "train.clip=1.0", "log.sample=0", "checkpoint.every_steps=10", "train.eval_every=25",
)  # fmt: skip


def arguments(data, run, ranks):
    """Of Python: the launcher with a training job that takes a few seconds."""
    train = train_arguments(data, run, *SETTINGS)[2:]
    return ["-m", "dllm.launch", "-n", ranks, "--", *train]


@pytest.fixture(scope="module")
def undisturbed(tiny, tmp_path_factory):
    run = tmp_path_factory.mktemp("undisturbed") / "run"
    with Job(0, *arguments(tiny, run, 4)) as job:
        done = job.wait()
        assert done.returncode == 0, str(job)
    return run


def steps_done(run):
    try:
        return pathlib.Path(run, "metrics.jsonl").read_bytes().count(b"\n")
    except OSError:
        return 0


def check(run, undisturbed):
    same_losses(run, undisturbed)
    assert pathlib.Path(run, "DONE").read_text() == f"{STEPS}\n"


def disturbed(tiny, run, ranks, kills):
    """Run to the end; kills: (steps done, seconds then, ranks) of each blow. Returns the Job's end and its standard error."""
    with Job(0, *arguments(tiny, run, ranks), timeout=120) as job:
        for step, pause, victims in kills:
            job.until(lambda step=step: steps_done(run) >= step, f"step {step}")
            time.sleep(pause)
            alive = job.ranks()
            job.signal(signal.SIGKILL, [alive[rank] for rank in victims if rank in alive])
        done = job.wait()
        assert done.returncode == 0, str(job)
        return done


def test_a_rank_dies_and_the_others_go_on(tiny, undisturbed, tmp_path):
    for victim in (0, 3):
        run = tmp_path / f"run-{victim}"
        done = disturbed(tiny, run, 4, [(20, 0.0, [victim])])
        assert re.search(rf"rank {victim} of 4 died; 3 go on from step \d+", done.stderr), done.stderr
        assert "starting it again" not in done.stderr, done.stderr
        check(run, undisturbed)


@pytest.mark.parametrize("seed", range(int(os.environ.get("DLLM_CHAOS_FROM", 0)), RUNS))
def test_ranks_die_at_random(tiny, undisturbed, tmp_path, seed):
    rng = np.random.default_rng(seed)
    ranks, deaths = int(rng.integers(4, 7)), int(rng.integers(1, 4))
    victims = [0] * int(rng.random() < 0.4) + rng.permutation(np.arange(1, ranks)).tolist()
    kills = [(int(rng.integers(1, 45)), float(rng.random() * 0.05), [victim]) for victim in victims[:deaths]]
    if rng.random() < 0.4:  # within 50 ms of each other
        kills = [(kills[0][0], pause, victim) for _, pause, victim in kills]
    done = disturbed(tiny, tmp_path / "run", ranks, sorted(kills, key=lambda kill: kill[0]))
    check(tmp_path / "run", undisturbed)
    seconds = re.findall(r"go on from step \d+, ([\d.]+) s later", done.stderr)
    print(f"seed {seed}: in memory after {seconds} s, {done.stderr.count('starting it again')} relaunched")


def test_a_rank_that_was_stopped_is_named_and_nothing_is_lost(tiny, undisturbed, tmp_path):
    run = tmp_path / "run"
    with Job(0, *arguments(tiny, run, 4)) as job:
        job.until(lambda: steps_done(run) >= 20, "step 20")
        stopped = [job.ranks()[2]]
        job.signal(signal.SIGSTOP, stopped)
        time.sleep(5)
        job.signal(signal.SIGCONT, stopped)
        done = job.wait()
    assert done.returncode == 0, done.stderr
    assert re.search(r"rank 2 was silent for [45] s", done.stderr), done.stderr
    assert "go on from step" not in done.stderr
    check(run, undisturbed)


def test_a_rank_that_stays_stopped_is_ended_by_the_others(tiny, undisturbed, tmp_path):
    run = tmp_path / "run"
    with Job(0, *arguments(tiny, run, 4), "--set", "resilience.deadline=3") as job:
        job.until(lambda: steps_done(run) >= 20, "step 20")
        job.signal(signal.SIGSTOP, [job.ranks()[1]])
        done = job.wait()
    assert done.returncode == 0, done.stderr
    assert "rank 1 has been silent for 3 s and is ended" in done.stderr
    assert "rank 1 of 4 died; 3 go on from step" in done.stderr
    check(run, undisturbed)
