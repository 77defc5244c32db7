"""A few real jobs on two ranks, the only ones of the plain run: each command once, a stop, a death, a refusal."""

import json
import re
import signal

import numpy as np
import pytest
from helpers.faults import slow_steps
from helpers.launch import REFUSED, Job, complaint, mpirun, train_arguments
from helpers.model_folders import commands
from helpers.run_files import arrays, checkpoints, column, metrics
from helpers.server import Server, texts

STEPS, STOPPED_EARLY = 40, 75
SETTINGS = (
    "model.dropout=0.2", "train.lr=0.02", "train.eval_every=20", "checkpoint.every_steps=10", "checkpoint.keep=9",
    "log.sample=0", f"train.max_steps={STEPS}",
)  # fmt: skip


@pytest.fixture(scope="module")
def run(tiny, tmp_path_factory):
    """A run that nothing disturbed."""
    run = tmp_path_factory.mktemp("smoke") / "run"
    done = mpirun(2, *train_arguments(tiny, run, *SETTINGS), check=True)
    assert complaint(done) == ""
    return run


@pytest.fixture(scope="module")
def ends(run, tiny):
    """How commands of one process ended, which take the run and write beside it."""
    lines = {
        "evaluate": f"evaluate {run} --split valid --checkpoint last",
        "generate": f"generate {run} --prompt import --tokens 40 --seed 5",
        "export": f"export {run} --out model --checkpoint last",
        "of the export": "generate model --prompt import --tokens 40 --seed 5",
        "of another seed": "generate model --prompt import --tokens 40 --seed 6",
    }
    return dict(zip(lines, commands(run.parent / "out", *lines.values(), cwd=run.parent), strict=True))


def same(run, other):
    """Nothing differs between the last checkpoints of two runs, nor between the losses and parameters of their steps."""
    (ours, scalars), (theirs, their_scalars) = arrays(run, STEPS), arrays(other, STEPS)
    assert ours.keys() == theirs.keys()
    assert not [name for name in ours if not np.array_equal(ours[name], theirs[name])]
    assert scalars == their_scalars
    for name in ("step", "loss", "parameters"):
        assert column(metrics(run, "train"), name).tolist() == column(metrics(other, "train"), name).tolist()
    assert metrics(run, "valid") == metrics(other, "valid")


def test_two_ranks_learn(run):
    losses = column(metrics(run, "train"), "loss")
    assert len(losses) == STEPS
    assert losses[-1] < 0.9 * losses[0]
    assert checkpoints(run) == [10, 20, 30, 40]
    assert (run / "DONE").read_text() == f"{STEPS}\n"


def test_stopped_by_a_signal_and_resumed_is_the_run_without_a_break_to_the_bit(tiny, run, tmp_path):
    stopped = tmp_path / "run"
    with Job(2, *train_arguments(tiny, stopped, *SETTINGS), env=slow_steps(tmp_path, 0.5, after=15)) as job:
        job.until_step(stopped, 15)
        job.signal(signal.SIGUSR1, [job.launcher()])
        assert job.wait().returncode == STOPPED_EARLY, str(job)
    assert 15 <= checkpoints(stopped)[-1] < STEPS
    assert not (stopped / "DONE").exists()
    mpirun(2, "-m", "dllm.train", "--resume", stopped, "--progress", "none", check=True)
    same(stopped, run)
    assert metrics(stopped) == metrics(run)  # under the launcher, ranks that may die send more


def test_killed_under_the_launcher_it_comes_to_the_same_end(tiny, run, tmp_path):
    killed = tmp_path / "run"
    words = ["-m", "dllm.launch", "-n", 2, "--", *train_arguments(tiny, killed, *SETTINGS)[2:]]
    with Job(0, *words, env=slow_steps(tmp_path, 0.1)) as job:
        job.until(lambda: checkpoints(killed), "a checkpoint")
        job.signal(signal.SIGKILL, job.ranks().values())
        done = job.wait()
    assert done.returncode == 0, done.stderr
    assert re.search("starting it again from step [123]0", done.stderr), done.stderr
    same(killed, run)


def test_evaluate_finds_the_loss_of_the_run(run, ends):
    code, text = ends["evaluate"]
    assert code == 0, text
    found, last = json.loads(text.splitlines()[-1]), metrics(run, "valid")[-1]
    assert found["tokens"] == last["tokens"]
    assert found["loss"] == pytest.approx(last["loss"], rel=1e-6)


def test_the_exported_model_says_what_the_run_says(run, ends):
    assert [code for code, _ in ends.values()] == [0] * len(ends), ends
    assert ends["generate"][1].startswith("import")
    assert ends["generate"] == ends["of the export"] != ends["of another seed"]
    assert {"model.safetensors", "config.json", "README.md"} <= {path.name for path in (run.parent / "model").iterdir()}


def test_a_server_completes(run):
    with Server(run, ranks=2) as server:
        answers = [server.complete("import", max_tokens=20, seed=3) for _ in range(4)]
        assert len({texts(answer)[0] for answer in answers}) == 1
        server.signal(signal.SIGTERM, server.alive().values())
        assert server.process.wait(30) == 0


def test_bad_input_is_refused_in_one_line_by_one_rank_and_nothing_is_left(tiny, tmp_path):
    done = mpirun(2, *train_arguments(tiny, tmp_path / "run", "model.hiden=4"), cwd=tmp_path)
    assert done.returncode == REFUSED
    assert re.fullmatch(r"dllm: .*unknown key 'model\.hiden'; did you mean 'model\.hidden'.*\n", complaint(done))
    assert not list(tmp_path.iterdir())
