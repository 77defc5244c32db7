"""slurm/train.sbatch on a real Slurm of four nodes: whatever stops a job on its way, it comes to its end."""

import re

import pytest
from helpers import slurm_cluster as slurm
from helpers.faults import slow_steps
from helpers.launch import OPENMPI, SOURCE, environment, mpirun, train_arguments
from helpers.run_files import same_losses

from dllm.kernels.compile import CACHE

STEPS, SLOW_FROM = 40, 12
LIMIT = 200  # seconds for a job, which may be started several times
pytestmark = pytest.mark.skipif(bool(slurm.missing()), reason=str(slurm.missing()))
SETTINGS = (
    "train.precision=fp64", "train.lanes=16", "train.threads=1", f"train.max_steps={STEPS}", "train.eval_every=25",
    "log.sample=0", "checkpoint.every_steps=10", "resilience.deadline=0",
)  # fmt: skip
# What a job starts first, task 0 of an array excepted, takes more than a minute on any machine.
SLOW = 66 / (STEPS - SLOW_FROM)  # seconds a step
SLOW_START = "'SLURM_RESTART_COUNT' not in os.environ and os.environ.get('SLURM_ARRAY_TASK_ID') != '0'"


@pytest.fixture(scope="module")
def undisturbed(tiny, tmp_path_factory):
    """seed -> a run"""
    folder = tmp_path_factory.mktemp("undisturbed")
    for seed in (0, 1):
        mpirun(2, *train_arguments(tiny, folder / str(seed), *SETTINGS, f"train.seed={seed}"), check=True)
    return lambda seed: folder / str(seed)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    with slurm.Cluster(tmp_path_factory.mktemp("slurm") / "cluster") as cluster:
        yield cluster


@pytest.fixture
def submit(cluster, tiny, tmp_path):
    """submit(*options of sbatch): the number of a job of four nodes with two ranks each, and the run tmp_path/run.

    slow : its first start does not reach the end in a minute
    """
    numbers = []

    def submit(*options, slow=True, seed=1):
        slowly = slow_steps(tmp_path, SLOW, after=SLOW_FROM, when=SLOW_START) if slow else {}
        env = environment({"RUN": tmp_path / "run", "NUMBA_CACHE_DIR": CACHE.parents[1], **slowly})
        env = {name: value for name, value in env.items() if name not in OPENMPI}  # users do without
        arguments = train_arguments(tiny, "", *SETTINGS, f"train.seed={seed}")
        arguments = ["--data", tiny, *arguments[arguments.index("--set") :]]
        shape = ("--nodes=4", "--ntasks-per-node=2", "--time=5", f"--output={tmp_path}/out", f"--chdir={tmp_path}")
        script = SOURCE / "slurm" / "train.sbatch"
        numbers.append(cluster.run("sbatch", "--parsable", *shape, *options, script, *arguments, env=env))
        return numbers[-1]

    yield submit
    for number in numbers:
        cluster.run("scancel", number, check=False)
    for out in tmp_path.glob("out"):  # pytest shows it where the test failed
        print(out.read_text(errors="replace")[-8000:])


def until_slow(cluster, run):
    log = run / "metrics.jsonl"
    cluster.until(lambda: log.exists() and f'"step": {SLOW_FROM},' in log.read_text(), f"step {SLOW_FROM}", 90)


def restarts(cluster, number, run, undisturbed):
    """How often a job was restarted until it completed. Its run has every step once and the undisturbed losses."""
    assert cluster.end(number, LIMIT) == "COMPLETED"
    assert (run / "DONE").read_text() == f"{STEPS}\n"
    same_losses(run, undisturbed)
    return int(cluster.job(number)["Restarts"])


def test_a_job_on_four_nodes_comes_to_its_end(cluster, submit, undisturbed, tmp_path):
    number = submit(slow=False)
    assert restarts(cluster, number, tmp_path / "run", undisturbed(1)) == 0


def test_before_its_time_limit_a_job_leaves_a_checkpoint_and_is_requeued(cluster, submit, undisturbed, tmp_path):
    # Slurm looks at limits every 30 seconds and sends a signal up to a minute too early: this one at its first look. A job
    # that starts right after a look has 30 seconds. Its later starts have fewer: two ranks, which are there soon, need few.
    looks = cluster.looks_at_limits()
    cluster.until(lambda: cluster.looks_at_limits() > looks, "look at the time limits", 60)
    number = submit("--time=1", "--signal=B:USR1@30", "--nodes=2", "--ntasks-per-node=1")
    assert restarts(cluster, number, tmp_path / "run", undisturbed(1)) >= 1
    assert re.search(r"stopped at step (\d+);.*going on from step \1\b", (tmp_path / "out").read_text(), re.DOTALL)


def test_a_node_goes_down_and_the_job_is_requeued(cluster, submit, undisturbed, tmp_path):
    number = submit()
    until_slow(cluster, tmp_path / "run")
    cluster.run("scontrol", "update", "nodename=n3", "state=down", "reason=test")
    cluster.until(lambda: cluster.job(number)["JobState"] != "RUNNING", "end of the first start", 30)
    cluster.run("scontrol", "update", "nodename=n3", "state=resume", check=False)  # it may have come back by itself
    assert restarts(cluster, number, tmp_path / "run", undisturbed(1)) == 1


def test_a_job_that_is_preempted_goes_on_afterwards(cluster, submit, undisturbed, tmp_path):
    number = submit()
    until_slow(cluster, tmp_path / "run")
    urgent = cluster.run("sbatch", "--parsable", "--partition=urgent", "--output=/dev/null", "--wrap=true")
    assert cluster.end(urgent, 60) == "COMPLETED"
    assert restarts(cluster, number, tmp_path / "run", undisturbed(1)) == 1


def test_an_array_is_a_sweep_whose_tasks_are_requeued_one_by_one(cluster, submit, undisturbed, tmp_path):
    number = submit("--array=0-1", "--nodes=2", seed="%a")
    until_slow(cluster, tmp_path / "run-1")
    cluster.run("scancel", "--batch", "--signal=USR1", f"{number}_1")  # what --signal=B:USR1 sends
    assert restarts(cluster, f"{number}_1", tmp_path / "run-1", undisturbed(1)) == 1
    assert restarts(cluster, f"{number}_0", tmp_path / "run-0", undisturbed(0)) == 0


def test_a_cancelled_job_does_not_come_back(cluster, submit, tmp_path):
    number = submit()
    until_slow(cluster, tmp_path / "run")
    cluster.run("scancel", number)
    assert cluster.end(number, 60) == "CANCELLED"
