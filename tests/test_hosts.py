"""A run over four hosts with a network between them; the link of one is cut in mid-run."""

import pathlib
import re
import time

import pytest
from launch import Job, flavour, mpirun, train_arguments
from runs import column, metrics, same_losses

from benchmarks import hosts as network

STEPS = 150
SILENCE = 10  # seconds; MPICH notices a cut link after many minutes only
pytestmark = pytest.mark.skipif(bool(network.missing()), reason=str(network.missing()))
SETTINGS = (
    "train.precision=fp64", "model.hidden=96", "model.embedding=96", "train.lanes=16", "train.window=32", "train.threads=1",
    f"train.max_steps={STEPS}", "train.clip=1.0", "log.sample=0", "checkpoint.every_steps=25", "train.eval_every=50",
)  # fmt: skip


@pytest.fixture(scope="module")
def hosts(tmp_path_factory):
    with network.Hosts(tmp_path_factory.mktemp("hosts")) as hosts:
        yield hosts


@pytest.fixture(scope="module")
def undisturbed(tiny, tmp_path_factory):
    run = tmp_path_factory.mktemp("undisturbed") / "run"
    mpirun(2, *train_arguments(tiny, run, *SETTINGS), check=True)
    return run


def job(hosts, data, run):
    train = train_arguments(data, run, *SETTINGS)[2:]
    launch = ["-m", "dllm.launch", "--hostfile", hosts.file, "--silence", SILENCE, "--", *train]
    return Job(0, *launch, timeout=150, env=hosts.environment(), before=hosts.on(1))


def test_the_bytes_counted_are_those_that_the_links_carry(hosts, tiny, tmp_path):
    signs = "averaging.method=choco", "averaging.topology=ring", "averaging.compression=sign"
    larger = "model.hidden=256", "model.embedding=256", "train.window=4", "train.eval_every=1000"
    settings = (*SETTINGS, *larger, "checkpoint.every_steps=0", "train.clip=0", "train.optimizer=sgd", *signs)
    counted, carried = [], []
    for steps in (10, 130):  # the difference is 120 steps, and at most a megabyte of what daemons say
        run, before = tmp_path / str(steps), sum(hosts.sent())
        train = train_arguments(tiny, run, *settings, f"train.max_steps={steps}", f"log.every={steps}")[2:]
        launch = ["-m", "dllm.launch", "--hostfile", hosts.file, "--", *train]
        with Job(0, *launch, timeout=100, env=hosts.environment(), before=hosts.on(1)) as started:
            assert started.wait().returncode == 0, str(started)
        carried.append(sum(hosts.sent()) - before)
        counted.append(network.COUNT * column(metrics(run, "train"), "bytes_sent").sum())
    assert carried[1] - carried[0] == pytest.approx(counted[1] - counted[0], rel=0.05)


def check(run, undisturbed):
    assert pathlib.Path(run, "DONE").read_text() == f"{STEPS}\n"
    same_losses(run, undisturbed)


def test_a_run_over_four_hosts_comes_to_its_end(hosts, tiny, undisturbed, tmp_path):
    with job(hosts, tiny, tmp_path / "run") as started:
        done = started.wait()
        assert done.returncode == 0, str(started)
    check(tmp_path / "run", undisturbed)


@pytest.mark.parametrize("victim", [3, 1], ids=["another host", "the launcher's host"])
def test_the_link_of_a_host_is_cut(hosts, tiny, undisturbed, tmp_path, victim):
    run = tmp_path / "run"
    with job(hosts, tiny, run) as started:
        started.until_step(run, 40)
        alone = started.ranks()[victim - 1]
        hosts.cut(victim)
        begin, last = time.monotonic(), len(metrics(run, "train"))
        try:
            if flavour() == "openmpi":
                started.until(lambda: len(metrics(run, "train")) > last + 3, "a step of the survivors")
                assert time.monotonic() - begin < 5
                started.until(lambda: alone not in started.processes(), "the end of the rank that was cut off")
            done = started.wait()
        finally:
            hosts.heal(victim)
        assert done.returncode == 0, str(started)
    if flavour() == "mpich":
        assert "nothing was heard of the job" in done.stderr
        assert "did not answer" in done.stderr
    elif victim > 1:
        assert re.search(rf"rank {victim - 1} of 4 died; 3 go on from step \d+", done.stderr), done.stderr
    check(run, undisturbed)
