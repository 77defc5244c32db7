"""A dead rank is replaced while the others go on answering."""

import contextlib
import signal

import pytest
from helpers.crowd import TOKENS, Clients, is_gone
from helpers.launch import Job
from helpers.scraper import falls, scrape
from helpers.server import SURVIVES, TESTS, Server, texts

pytestmark = pytest.mark.skipif(not SURVIVES, reason="all ranks die with one under MPICH")


@contextlib.contextmanager
def joined(world, path, *options, ranks=0):
    """A process that takes a dead rank's place; with `ranks` started by mpirun."""
    job = Job(ranks, "-m", "dllm.serve", world / "run", "--join", path, *options, timeout=200, env={"PYTHONPATH": TESTS})
    with job:
        yield job


@pytest.fixture
def runtime(tmp_path, monkeypatch):
    """The folder for join files."""
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    return tmp_path / "dllm"


def join_file(server, runtime):
    """The file of the server, once all its ranks are in it."""
    found = lambda: [path for path in runtime.glob("serve-*.json") if path.read_text().count('"door"') == server.size]
    server.until(found, "a join file", 10)
    return found()[0]


def states(server):
    return {entry["rank"]: entry["state"] for entry in server.health()["ranks"]}


def kill(server, pid, rank):
    server.signal(signal.SIGKILL, [pid])
    server.until(lambda: is_gone(pid), "the end of a process", 10)
    server.until(lambda: states(server).get(rank) == "dead", "news of the death", 15)


def answers_of(server, rank):
    """What the rank itself says."""
    for _ in range(200):
        answer = server.complete(max_tokens=TOKENS, seed=1)
        if answer.headers["x-dllm-rank"] == str(rank):
            return texts(answer)
    pytest.fail(f"rank {rank} answers nobody")


def test_dead_ranks_are_replaced_twice_while_the_others_answer(world, runtime):
    with Server(world / "run", "--max-tokens", 10**5, "--slots", 8, ranks=3) as server, contextlib.ExitStack() as stack:
        path = join_file(server, runtime)
        assert path.stat().st_mode & 0o777 == 0o600
        assert path.parent.stat().st_mode & 0o777 == 0o700
        expected, pids, before = texts(server.complete(max_tokens=TOKENS, seed=1)), server.alive(), scrape(server)
        kill(server, pids[1], 1)
        clients = Clients(server, 8)
        for ranks in (0, 1):  # by itself, and by mpirun
            job = stack.enter_context(joined(world, path, ranks=ranks))
            server.until(lambda: states(server) == dict.fromkeys(range(3), "ok"), "three ranks that are well", 60)
            (pid,) = {server.alive()[1]} - {pids[1]}
            assert answers_of(server, 1) == expected
            done = len(clients.done)
            server.until(lambda: len(clients.done) > done + 50, "more answers")
            assert clients.failed == []
            after = scrape(server)
            assert falls(before, after) == []
            pids[1], before = pid, after
            if ranks == 0:
                clients.end()
                kill(server, pid, 1)
                clients = Clients(server, 8)
        clients.end()
        for pid in server.alive().values():
            server.signal(signal.SIGTERM, [pid])
        assert job.process.wait(30) == 0
        assert server.process.wait(30) == 0
        assert not path.exists()


def test_the_launcher_replaces_dead_ranks_by_itself(world, runtime):
    with Server(world / "run", ranks=2, keep=True) as server:
        join_file(server, runtime)
        expected = texts(server.complete(max_tokens=TOKENS, seed=1))
        for rank in (1, 0):  # then mpirun has none left
            pids = server.alive()
            server.signal(signal.SIGKILL, [pids[rank]])
            server.until(lambda: len(server.alive()) == 2 and pids[rank] not in server.alive().values(), "a new rank", 60)
            assert answers_of(server, rank) == expected
        assert server.err.count("starting another in its place") == 2
        assert "again" not in server.err
        server.signal(signal.SIGTERM, [server.launcher()])
        assert server.process.wait(30) == 0
        assert len(server.log("ended")) == 2
        assert not [*runtime.iterdir()]
