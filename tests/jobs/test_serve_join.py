"""A dead rank is replaced while the others go on answering."""

import contextlib
import signal

import httpx
import pytest
from helpers.crowd import TOKENS, Clients, is_gone
from helpers.launch import REFUSED, Job, mpirun
from helpers.scraper import falls, scrape
from helpers.server import SURVIVES, TESTS, Server, texts

pytestmark = pytest.mark.skipif(not SURVIVES, reason="all ranks die with one under MPICH")


SLOTS = 4


@contextlib.contextmanager
def joined(world, path, ranks=0):
    """A process that takes a dead rank's place; with `ranks` started by mpirun."""
    with Job(ranks, "-m", "dllm.serve", world / "run", "--join", path, timeout=200, env={"PYTHONPATH": TESTS}) as job:
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


def check_handed_over(server, stack, expected):
    """Ranks 0 and 2 without a free slot hand what they are asked for to rank 1."""
    held = []
    for _ in range(200):
        if held.count(0) == held.count(2) == SLOTS:
            break
        body = {"prompt": "To be", "max_tokens": 10**5, "stream": True}
        client = httpx.Client(timeout=60)
        answer = client.send(client.build_request("POST", f"{server.url}/v1/completions", json=body), stream=True)
        rank = int(answer.headers["x-dllm-rank"])
        if rank == 1:
            client.close()
        else:
            stack.callback(client.close)
            held.append(rank)
    body = {"prompt": "To be", "max_tokens": TOKENS, "seed": 1}
    for asked in (0, 2):

        def handed_over(asked=asked):
            with (
                httpx.Client(timeout=2) as client,
                contextlib.suppress(httpx.TimeoutException),
            ):  # what waits for a slot waits long
                if client.get(f"{server.url}/health").json()["rank"] == asked:
                    answer = client.post(f"{server.url}/v1/completions", json=body)
                    return answer.headers["x-dllm-rank"] == "1" and texts(answer) == expected
            return False

        server.until(handed_over, "a hand-over", 20)


def test_dead_ranks_are_replaced_twice_while_the_others_answer(world, runtime):
    with Server(world / "run", "--max-tokens", 10**5, "--slots", SLOTS, ranks=3) as server, contextlib.ExitStack() as stack:
        path = join_file(server, runtime)
        assert path.stat().st_mode & 0o777 == 0o600
        assert path.parent.stat().st_mode & 0o777 == 0o700
        expected, pids, before = texts(server.complete(max_tokens=TOKENS, seed=1)), server.alive(), scrape(server)
        clients = Clients(server, 8)
        for ranks in (0, 1):  # by itself, and by mpirun
            kill(server, pids[1], 1)
            lost = len(clients.failed)
            assert {rank for _, _, rank, _ in clients.failed} <= {1, None}  # None: before an answer began
            job = stack.enter_context(joined(world, path, ranks=ranks))
            server.until(lambda: states(server) == dict.fromkeys(range(3), "ok"), "three ranks that are well", 60)
            pids[1] = server.alive()[1]
            assert answers_of(server, 1) == expected
            done = len(clients.done)
            server.until(lambda done=done: len(clients.done) > done + 50, "more answers")
            assert len(clients.failed) == lost, clients.failed
            after = scrape(server)
            assert falls(before, after) == []
            before = after
        clients.end()
        with contextlib.ExitStack() as held:
            check_handed_over(server, held, expected)
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


def test_a_process_that_cannot_be_a_rank_says_why_and_changes_nothing(world, runtime):
    def refused(*options, ranks=0, token="b" * 16):
        done = mpirun(ranks, "-m", "dllm.serve", world / "run", "--join", path, *options, env={"DLLM_TOKEN": token})
        assert (done.returncode, done.stdout) == (REFUSED, "")
        (line,) = [line for line in done.stderr.splitlines() if line.startswith("dllm: ")]
        return line

    with Server(world / "run", ranks=2, token="b" * 16) as server:
        path = join_file(server, runtime)
        assert "no rank of the server is dead: there is no place to take" in refused()
        assert "start it by mpirun -n 1" in refused(ranks=2)
        pids = server.alive()
        kill(server, pids[1], 1)
        assert "do not have the same tokens: give the same --token-file" in refused(token="c" * 16)
        assert "do not agree on the option --slots: it has 64, here is 5" in refused("--slots", 5)
        assert states(server) == {0: "ok", 1: "dead"}
        server.signal(signal.SIGKILL, [pids[0]])
        server.until(lambda: is_gone(pids[0]), "the end of a process", 10)
        assert "the server has ended; start it anew" in refused()
