"""A run over four hosts with a network between them, and a server; the link of one is cut in mid-run, a rank killed."""

import pathlib
import re
import signal
import subprocess
import sys

import pytest
from helpers.faults import slow_steps
from helpers.host_clients import TOKEN, ask, busy
from helpers.launch import Job, flavour, mpirun, train_arguments
from helpers.run_files import column, metrics, same_losses
from helpers.wire import Capture

from benchmarks import hosts as network

STEPS = 150
KNOCK = """
import socket, sys
for port in map(int, sys.argv[2:]):
    with socket.socket() as knocking:
        knocking.settimeout(2)
        if knocking.connect_ex((sys.argv[1], port)) == 0: print(port)
"""
SILENCE = 10  # seconds; MPICH notices a cut link after many minutes only
pytestmark = pytest.mark.skipif(bool(network.missing()), reason=str(network.missing()))
SETTINGS = (
    "train.precision=fp64", "model.hidden=96", "model.embedding=96", "train.lanes=16", "train.window=32", "train.threads=1",
    f"train.max_steps={STEPS}", "train.clip=1.0", "log.sample=0", "checkpoint.every_steps=25", "train.eval_every=50",
)  # fmt: skip


@pytest.fixture(scope="module")
def hosts(tmp_path_factory):
    with network.Hosts(tmp_path_factory.mktemp("hosts"), networks=2) as hosts:
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


def test_with_an_interface_named_nothing_goes_by_another(hosts, tiny, tmp_path):
    train = train_arguments(tiny, tmp_path / "run", "train.max_steps=20", "model.hidden=128")[2:]
    words = "-m", "dllm.launch", "--hostfile", hosts.file, "--interface", "e1", "--", *train
    with Capture(hosts.switch, tmp_path) as wire:  # noqa: SIM117, the job ends first
        with Job(0, *words, timeout=100, env=hosts.agents(), before=hosts.on(1)) as started:
            done = started.wait()
            assert done.returncode == 0, str(started)
    addresses = {address for stream in wire.streams for address in (stream[0], stream[2])}
    assert addresses == {f"10.77.1.{number}" for number in range(1, network.COUNT + 1)}
    assert sum(map(len, wire.streams.values())) > 20 * 4 * 200_000  # bytes: ranks, steps, gradients
    assert "--interface" not in done.stderr


def test_without_one_the_user_is_told_that_nothing_is_encrypted(hosts, tiny, tmp_path):
    train = train_arguments(tiny, tmp_path / "run", "train.max_steps=2")[2:]
    words = "-m", "dllm.launch", "--hostfile", hosts.file, "--", *train
    with Job(0, *words, timeout=100, env=hosts.environment(), before=hosts.on(1)) as started:
        done = started.wait()
        assert done.returncode == 0, str(started)
    assert done.stderr.count("does not encrypt") == 1


def test_a_run_on_one_host_cannot_be_reached_from_another(hosts, tiny, tmp_path):
    train = train_arguments(tiny, tmp_path / "run", "train.max_steps=2000")[2:]
    words = "-m", "dllm.launch", "-n", 2, "--", *train
    with Job(0, *words, timeout=100, env=slow_steps(tmp_path, 0.05), before=hosts.on(1)) as started:
        started.until_step(tmp_path / "run", 3)
        found = subprocess.run([*hosts.on(1), "ss", "-HlntO"], capture_output=True, text=True, check=True, timeout=20).stdout
        ports = sorted({int(line.split()[3].rpartition(":")[2]) for line in found.splitlines()})
        asked = subprocess.run([*hosts.on(2), sys.executable, "-c", KNOCK, hosts.names[0], *map(str, ports)],
            capture_output=True, text=True, check=True, timeout=60)  # fmt: skip
        assert len(ports) >= 3
        assert asked.stdout == ""


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
        last = len(metrics(run, "train"))
        try:
            if flavour() == "openmpi":
                started.until(lambda: len(metrics(run, "train")) > last + 3, "a step of the survivors")
                assert "nothing was heard of the job" not in started.err  # they went on by themselves
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


def test_each_host_serves_hands_on_what_is_too_much_for_it_and_outlives_another(hosts, world):
    options = "-n", 4, "--hostfile", hosts.file, "--host", "0.0.0.0", "--slots", 1, "--max-tokens", 10**5
    env = hosts.environment() | {"DLLM_TOKEN": TOKEN}
    text, places = {"prompt": "To be", "max_tokens": 50, "seed": 7}, range(1, network.COUNT + 1)
    with Job(0, "-m", "dllm", "serve", world / "run", *options, timeout=150, env=env, before=hosts.on(1)) as server:
        well = lambda number: [e["rank"] for e in ask(hosts, number, "/health")[2].get("ranks", ()) if e["state"] == "ok"]
        server.until(lambda: "at http://" in server.out, "server")
        server.until(lambda: all(well(number) == [0, 1, 2, 3] for number in places), "ranks that know each other")
        answers = [ask(hosts, number, "/v1/completions", text) for number in places]
        assert [rank for _, rank, _ in answers] == ["0", "1", "2", "3"]
        with busy(hosts, 3) as first, busy(hosts, 3) as second:
            assert first == 2
            assert second != 2
            answers.append(ask(hosts, 3, "/v1/completions", text))
            assert int(answers[-1][1]) not in (first, second)
        if flavour() == "openmpi":
            pids = {entry["rank"]: entry["pid"] for entry in ask(hosts, 1, "/health")[2]["ranks"]}
            server.signal(signal.SIGKILL, [pids[3]])
            server.until(lambda: all(well(number) == [0, 1, 2] for number in (1, 2, 3)), "news of the death", 20)
            answers += [ask(hosts, number, "/v1/completions", text) for number in (1, 2, 3)]
        assert {status for status, _, _ in answers} == {200}
        assert len({answer["choices"][0]["text"] for _, _, answer in answers}) == 1
        server.signal(signal.SIGTERM, [server.launcher()])
        assert server.process.wait(60) == 0, str(server)
