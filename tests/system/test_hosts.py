"""A run over four hosts with a network between them, and a server; the link of one is cut in mid-run, a rank killed."""

import contextlib
import json
import pathlib
import re
import signal
import subprocess
import sys

import pytest
from helpers.launch import Job, flavour, mpirun, train_arguments
from helpers.run_files import column, metrics, same_losses

from benchmarks import hosts as network

STEPS = 150
TOKEN = "for-these-four-hosts"
CLIENT = """
import json, sys, httpx
url, body, token = json.loads(sys.argv[1])
known = {"Authorization": f"Bearer {token}"}
with httpx.stream("POST" if body else "GET", url, json=body, headers=known, timeout=30) as answer:
    if body and body.get("stream"):
        print(answer.headers["x-dllm-rank"], flush=True)
        for _ in answer.iter_lines(): pass
    answer.read()
    print(json.dumps([answer.status_code, answer.headers.get("x-dllm-rank"), answer.json()]))
"""
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


def client(hosts, number, path, body=None):
    """The words that ask host `number`, from that host."""
    url = f"http://{hosts.names[number - 1]}:8000{path}"
    return [*hosts.on(number), sys.executable, "-c", CLIENT, json.dumps([url, body, TOKEN])]


def ask(hosts, number, path, body=None):
    """(status, rank that computed it, answer)"""
    done = subprocess.run(client(hosts, number, path, body), capture_output=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr.decode()
    return json.loads(done.stdout)


@contextlib.contextmanager
def busy(hosts, number):
    """A long stream that a client of a host reads: the rank that computes it."""
    body = {"prompt": "To be", "max_tokens": 10**5, "stream": True}
    with subprocess.Popen(client(hosts, number, "/v1/completions", body), stdout=subprocess.PIPE, text=True) as process:
        try:
            yield int(process.stdout.readline())
        finally:
            process.kill()


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
