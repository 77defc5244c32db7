"""Hosts that share no disk, and a launcher on a host that has no copy of the run."""

import re
import signal

import pytest
from helpers.faults import slow_steps
from helpers.launch import Job, mpirun, train_arguments
from helpers.run_files import same_losses

from benchmarks import hosts as network

STEPS = 120
pytestmark = pytest.mark.skipif(bool(network.missing()), reason=str(network.missing()))
SETTINGS = (
    "train.precision=fp64", "train.lanes=16", "train.threads=1", "train.clip=1.0", "log.sample=0", "checkpoint.every_steps=20",
    "train.eval_every=50", f"train.max_steps={STEPS}",
)  # fmt: skip
RUN, LAUNCHER = "run", network.COUNT  # the last host launches, on the others


@pytest.fixture(scope="module")
def module_hosts(tmp_path_factory):
    with network.Hosts(tmp_path_factory.mktemp("hosts"), disks=True) as hosts:
        yield hosts


@pytest.fixture
def hosts(module_hosts):
    for number in range(1, network.COUNT + 1):
        module_hosts.wipe(number)
    name_hosts(module_hosts, network.COUNT - 1)
    return module_hosts


@pytest.fixture(scope="module")
def undisturbed(tiny, tmp_path_factory):
    run = tmp_path_factory.mktemp("undisturbed") / "run"
    mpirun(2, *train_arguments(tiny, run, *SETTINGS), check=True)
    return run


def name_hosts(hosts, count):
    hosts.file.write_text("".join(f"{name} slots=1\n" for name in hosts.names[:count]))


def launch(hosts, *words, on=LAUNCHER, env=None):
    words = "-m", "dllm.launch", "--hostfile", hosts.file, "--silence", 20, *words
    return Job(0, *words, timeout=150, env=hosts.environment() | (env or {}), before=hosts.on(on), cwd=hosts.path)


def new(data):
    return ["--run", RUN, "--", *train_arguments(data, RUN, *SETTINGS)[2:4], *train_arguments(data, RUN, *SETTINGS)[6:]]


def finish(job):
    done = job.wait()
    assert done.returncode == 0, str(job)
    return done.stderr


def test_the_end_of_a_run_is_seen_where_it_is(hosts, tiny, undisturbed):
    for said in ("", f"{RUN} is done"):
        with launch(hosts, *new(tiny)) as job:
            assert said in finish(job)
    assert not (hosts.disk(LAUNCHER) / RUN).exists()
    same_losses(hosts.disk(1) / RUN, undisturbed)
    with launch(hosts, "--", "--data", tiny, "--out", RUN) as job:
        assert job.wait().returncode == 2
        assert "exists on another host" in job.err


def test_a_launcher_without_a_copy_brings_a_run_back_and_another_goes_on(hosts, tiny, undisturbed, tmp_path):
    with launch(hosts, *new(tiny), env=slow_steps(tmp_path, 0.02)) as job:
        job.until_step(hosts.disk(1) / RUN, 30)
        job.signal(signal.SIGKILL, job.ranks().values())
        job.until_step(hosts.disk(1) / RUN, 70)
        job.signal(signal.SIGKILL, job.processes())
    assert re.search(r"starting it again from step [24]0", job.err)
    hosts.wipe(LAUNCHER)
    with launch(hosts, "--resume", RUN, "--", "--progress", "none", on=2) as job:
        finish(job)
    same_losses(hosts.disk(1) / RUN, undisturbed)


def test_a_host_joins(hosts, tiny, undisturbed, tmp_path):
    with launch(hosts, *new(tiny), env=slow_steps(tmp_path, 0.1)) as job:
        job.until_step(hosts.disk(1) / RUN, 30)
        name_hosts(hosts, network.COUNT)
        words = "-m", "dllm.resize", RUN, "-n", network.COUNT
        with Job(0, *words, env=hosts.environment(), before=hosts.on(2), cwd=hosts.path) as resize:
            assert resize.wait().returncode == 0, str(resize)
        job.until(lambda: len(job.ranks()) == network.COUNT, "a rank on the new host")
        said = finish(job)
    assert f"going on with {network.COUNT} ranks from step" in said
    assert (hosts.disk(network.COUNT) / RUN / "DONE").read_text() == f"{STEPS}\n"
    same_losses(hosts.disk(1) / RUN, undisturbed)
