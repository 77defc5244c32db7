"""Ranks that die, or are told to end, while clients are served."""

import collections
import contextlib
import json
import signal
import time

import httpx
import pytest
from helpers.crowd import TOKENS, Clients, is_gone
from helpers.launch import mpirun
from helpers.scraper import falls, scrape, total
from helpers.server import SURVIVES, Server, texts


@contextlib.contextmanager
def stream_of(server, rank):
    """The lines of a long stream that this rank computes."""
    body = {"prompt": "To be", "max_tokens": 10**5, "stream": True}
    for _ in range(100):
        with httpx.stream("POST", f"{server.url}/v1/completions", json=body, timeout=30) as answer:
            if answer.headers["x-dllm-rank"] == str(rank):
                lines = answer.iter_lines()
                next(lines)
                yield lines
                return
    pytest.fail(f"rank {rank} answers nobody")


def test_a_killed_rank_takes_only_its_own_streams_along(world):
    """First rank 0, then another. Where deaths cannot be survived all end, and the launcher starts them again."""
    with Server(world / "run", "--max-tokens", 10**5, ranks=4, keep=True) as server:
        ask = lambda: [texts(server.complete(max_tokens=TOKENS, seed=seed))[0] for seed in range(4)]
        expected, pids, clients, killed = ask(), server.alive(), Clients(server), []
        for victim in (0, 2) if SURVIVES else (0,):
            with stream_of(server, victim) as lines:
                begin = time.monotonic()
                server.signal(signal.SIGKILL, [pids[victim]])
                server.until(lambda: is_gone(pids[victim]), "the end of a process", 10)
                killed.append((victim, begin, time.monotonic()))
                with pytest.raises(httpx.TransportError):
                    collections.deque(lines, maxlen=0)
            if SURVIVES:
                left = {rank: pid for rank, pid in pids.items() if rank not in [victim for victim, *_ in killed]}
                dead = [pids[victim] for victim, *_ in killed]  # whose places the launcher fills, when it comes to it
                known = lambda: server.alive().items() >= left.items() and not {*server.alive().values()} & {*dead}
                server.until(known, "news of the death", 10)
            else:
                server.url = clients.url = server.wait_for_url(after=1)
                server.until(lambda: len(server.alive()) == 4, "four ranks")
            before = len(clients.done)
            server.until(lambda: len(clients.done) > before + 20, "more answers")
        clients.end()
        assert set(clients.done) == set(enumerate(expected))
        for begun, ended, rank, error in (
            clients.failed if SURVIVES else ()
        ):  # each was under way when its rank died, and none hung
            assert any(rank in (victim, None) and begun < gone and ended > then for victim, then, gone in killed), (
                begun,
                ended,
            )
            assert not isinstance(error, httpx.TimeoutException), error
        assert ask() == expected
        server.signal(signal.SIGTERM, [server.launcher()])
        assert server.process.wait(30) == 0


@pytest.mark.parametrize("which", ["all ranks", "one rank"])
def test_ranks_that_are_told_to_end_finish_what_is_under_way(world, which):
    body = {"prompt": "To be", "max_tokens": 30_000, "seed": 1, "stream": True}
    with Server(world / "run", "--max-tokens", 10**5, ranks=2) as server, httpx.Client(timeout=60) as client:
        ask = lambda: client.send(client.build_request("POST", f"{server.url}/v1/completions", json=body), stream=True)
        pids, answers = server.alive(), [ask() for _ in range(4)]
        server.signal(signal.SIGTERM, pids.values() if which == "all ranks" else [pids[0]])
        lines = [[line for line in answer.iter_lines() if line] for answer in answers]
        assert all(one[-1] == "data: [DONE]" for one in lines)
        choices = [[json.loads(line[6:])["choices"][0] for line in one[:-1]] for one in lines]
        assert all(one[-1]["finish_reason"] == "length" for one in choices)
        assert len({"".join(choice["text"] for choice in one) for one in choices}) == 1
        if which == "one rank":
            server.until(lambda: list(server.alive()) == [1], "one rank", 10)
            assert {server.complete(max_tokens=3).headers["x-dllm-rank"] for _ in range(5)} == {"1"}
            assert server.process.poll() is None
            server.signal(signal.SIGTERM, [pids[1]])
        assert server.process.wait(30) == 0
        assert len(server.log("ended")) == 2


def test_the_launcher_ends_where_starting_again_would_not_help(world):
    done = mpirun(0, "-m", "dllm", "serve", "nothing", "-n", 2, cwd=world)
    assert done.returncode == 2
    assert "dllm: nothing is not the folder of a run or of a model: it has no config.toml and no config.json\n" in done.stderr
    assert "again" not in done.stderr


@pytest.mark.skipif(not SURVIVES, reason="all ranks die with one under MPICH")
def test_a_dead_rank_keeps_what_it_has_counted(world):
    with Server(world / "run", ranks=2) as server:
        for _ in range(20):
            server.complete(max_tokens=3)
        before, pids = scrape(server), server.alive()
        server.signal(signal.SIGKILL, [pids[1]])
        server.until(lambda: list(server.alive()) == [0], "news of the death", 10)
        after = scrape(server)
        assert falls(before, after) == []
        asked = [total(one, "dllm_requests_total", rank=1, route="/v1/completions") for one in (before, after)]
        assert asked[0] == asked[1] > 0
        assert (total(after, "dllm_peer_up"), total(after, "dllm_slots")) == (1, 64)
