"""slurm/train.sbatch under a real Slurm of four nodes: to the end, stopped and requeued, a node taken down."""

import pathlib

import cluster as slurm
import numpy as np
import pytest
from launch import BIN, SOURCE, environment, mpirun, train_arguments
from runs import column, metrics

STEPS = 60
LIMIT = 150  # seconds for a job, which may be started twice
pytestmark = pytest.mark.skipif(bool(slurm.missing()), reason=str(slurm.missing()))
SETTINGS = (
    "train.precision=fp64", "model.hidden=96", "model.embedding=96", "train.lanes=16", "train.window=32", "train.threads=1",
    f"train.max_steps={STEPS}", "log.sample=0", "checkpoint.every_steps=10", "train.eval_every=25", "resilience.deadline=0",
)  # fmt: skip


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    with slurm.Cluster(tmp_path_factory.mktemp("slurm") / "cluster") as cluster:
        yield cluster


@pytest.fixture(scope="module")
def undisturbed(tiny, tmp_path_factory):
    run = tmp_path_factory.mktemp("undisturbed") / "run"
    mpirun(2, *train_arguments(tiny, run, *SETTINGS), check=True)
    return run


@pytest.fixture
def job(cluster, tiny, tmp_path, monkeypatch):
    """A submitted job of four nodes with a rank each: its number, its run and its output."""
    for name, value in environment({"RUN": tmp_path / "run", "PATH": f"{BIN}:{cluster.environment['PATH']}"}).items():
        monkeypatch.setitem(cluster.environment, name, value)
    arguments = train_arguments(tiny, "", *SETTINGS)[2:]
    del arguments[arguments.index("--out") : arguments.index("--out") + 2]
    del arguments[arguments.index("--progress") : arguments.index("--progress") + 2]
    shape = [
        "--nodes=4",
        "--ntasks-per-node=1",
        "--cpus-per-task=2",
        "--time=5",
        f"--output={tmp_path}/out",
        f"--chdir={tmp_path}",
    ]
    number = cluster.run("sbatch", "--parsable", *shape, SOURCE / "slurm" / "train.sbatch", *arguments)
    yield number, tmp_path / "run", tmp_path / "out"
    cluster.run("scancel", number, check=False)


def until_step(cluster, run, step, out):
    log = pathlib.Path(run, "metrics.jsonl")
    try:
        cluster.until(lambda: log.exists() and f'"step": {step},' in log.read_text(), f"step {step}", 90)
    except AssertionError as error:
        raise AssertionError(f"{error}\n{out.read_text() if out.exists() else ''}") from None


def check(cluster, job, undisturbed):
    number, run, out = job
    try:
        cluster.until(lambda: cluster.state(number) in ("COMPLETED", "FAILED"), "end of the job", LIMIT)
        assert (run / "DONE").exists(), "the job failed"
    except AssertionError as error:
        raise AssertionError(f"{error}; {cluster.state(number)}\n{out.read_text()[-4000:]}") from None
    for split in ("train", "valid"):  # every step once
        ours, theirs = metrics(run, split), metrics(undisturbed, split)
        assert column(ours, "step").tolist() == column(theirs, "step").tolist()
        np.testing.assert_allclose(column(ours, "loss"), column(theirs, "loss"), rtol=1e-12)


def test_a_job_on_four_nodes_comes_to_its_end(cluster, job, undisturbed):
    check(cluster, job, undisturbed)


def test_before_its_limit_a_job_leaves_a_checkpoint_and_goes_back_into_the_queue(cluster, job, undisturbed):
    number, run, out = job
    until_step(cluster, run, 15, out)
    cluster.run("scancel", "--batch", "--signal=USR1", number)  # what --signal=B:USR1 sends
    check(cluster, job, undisturbed)
    assert "back into the queue" in out.read_text()


def test_a_node_goes_down_and_the_job_is_requeued(cluster, job, undisturbed):
    number, run, out = job
    until_step(cluster, run, 15, out)
    cluster.run("scontrol", "update", "nodename=n3", "state=down", "reason=test")
    cluster.until(lambda: cluster.state(number) != "RUNNING", "end of the first run", 30)
    cluster.run("scontrol", "update", "nodename=n3", "state=resume", check=False)  # it may have come back by itself
    check(cluster, job, undisturbed)
