"""Ranks that die, or are told to end, while clients are served; streams that a rank computes for another."""

import asyncio
import collections
import contextlib
import json
import signal
import threading
import time

import httpx
import numpy as np
import pytest
from helpers.launch import mpirun
from helpers.server import SURVIVES, Server, texts

from dllm.inference.loaded_model import LoadedModel
from dllm.serving.engine import Engine
from dllm.serving.peers import Peers
from dllm.serving.requests import Finished, Request
from dllm.serving.streams import Inbox, LocalStreams

CLIENTS, TOKENS = 64, 100


class Clients:
    """So many clients that ask for the same few texts again and again, on new connections, streaming."""

    def __init__(self, server):
        self.url, self.over = server.url, threading.Event()
        self.done, self.failed = [], []  # (seed, text); (when, rank or None: before the answer began)
        self.threads = [threading.Thread(target=self._run, args=(number,), daemon=True) for number in range(CLIENTS)]
        for thread in self.threads:
            thread.start()

    def _run(self, number):
        seed = number % 4
        while not self.over.is_set():
            rank = None
            body = {"prompt": "To be", "max_tokens": TOKENS, "seed": seed, "stream": True}
            try:
                with httpx.stream("POST", f"{self.url}/v1/completions", json=body, timeout=30) as answer:
                    rank = int(answer.headers["x-dllm-rank"])
                    lines = [line for line in answer.iter_lines() if line]
                    assert lines[-1] == "data: [DONE]"
                    self.done.append((seed, "".join(json.loads(line[6:])["choices"][0]["text"] for line in lines[:-1])))
            except httpx.TransportError:
                self.failed.append((time.monotonic(), rank))

    def end(self):
        self.over.set()
        for thread in self.threads:
            thread.join(40)
        assert not any(thread.is_alive() for thread in self.threads)


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
                killed.append((victim, time.monotonic()))
                server.signal(signal.SIGKILL, [pids[victim]])
                with pytest.raises(httpx.TransportError):
                    collections.deque(lines, maxlen=0)
            if SURVIVES:
                left = {rank: pid for rank, pid in pids.items() if rank not in dict(killed)}
                server.until(lambda: server.alive() == left, "news of the death", 10)
            else:
                server.url = clients.url = server.wait_for_url(after=1)
                server.until(lambda: len(server.alive()) == 4, "four ranks")
            before = len(clients.done)
            server.until(lambda: len(clients.done) > before + 20, "more answers")
        clients.end()
        assert set(clients.done) == set(enumerate(expected))
        for when, rank in clients.failed if SURVIVES else ():
            assert any(rank in (victim, None) and then - 0.1 < when < then + 3 for victim, then in killed)
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


class Rank:
    """One rank's engine and peers, in this process: gossip is what the test says."""

    def __init__(self, bundle, rank, slots=1):
        self.rank, self.known, self.dead = rank, {}, False
        self.engine = Engine(bundle, slots=slots, queue=4)
        self.engine.start()
        self.local = LocalStreams(self.engine, asyncio.get_running_loop())
        self.peers = Peers(self, self.local, b"secret of these")

    def table(self):
        return {rank: (report, 0.1, self.dead) for rank, (_, report) in self.known.items()}

    def hear_of(self, other, port, host="here"):
        load = {name: other.engine.load()[name] for name in ("active", "queued", "slots")}
        self.known[other.rank] = (1, load | {"address": ["127.0.0.1", port], "host": host, "draining": False})


async def collect(inbox):
    events = []
    while not (events and isinstance(events[-1], Finished)):
        events += [event for _, event in await inbox.get()]
    return events


def plain(events):
    """JSON knows no tuples."""
    return json.loads(json.dumps(events))


async def _rest(reader):
    """What comes until the other closes, be it in the midst of what was sent to it."""
    try:
        return await reader.read()
    except ConnectionResetError:
        return b""


@pytest.mark.parametrize("fate", ["lives", "dies", "fails"])
def test_a_stream_of_another_rank_is_the_same_even_if_that_rank_is_lost(world, fate):
    """It goes on from where it broke off, the same to the bit."""

    async def compare():
        bundle = LoadedModel.open(world / "run")
        one, two = Rank(bundle, 0), Rank(bundle, 1)
        writers = []

        async def serve(reader, writer):
            writers.append(writer)
            await two.peers._serve(reader, writer)

        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        one.hear_of(one, 0)
        one.hear_of(two, server.sockets[0].getsockname()[1])
        request = Request(prompt=np.arange(5), max_tokens=3000, seed=3, logprobs=2)
        alone, blocker, inbox = Inbox(), Inbox(), Inbox()
        one.local.submit(request, alone, 0)
        expected = await collect(alone)
        one.local.submit(Request(prompt=np.arange(3), max_tokens=10**6), blocker, 0)
        rank, _ = one.peers.submit({0: request}, inbox)
        assert rank == 1
        got = [event for _, event in await inbox.get()]
        if fate == "fails":
            two.engine.stop()
        if fate == "dies":
            one.dead = True
            writers[0].transport.abort()
            server.close()
        blocker.cancel()
        got += await collect(inbox)
        assert plain(got) == plain(expected)
        server.close()
        for rank in (one, two):
            rank.engine.stop()

    asyncio.run(asyncio.wait_for(compare(), 60))


def test_nothing_is_handed_to_the_loopback_of_another_host(world):
    async def choose():
        bundle = LoadedModel.open(world / "run")
        one, two = Rank(bundle, 0), Rank(bundle, 1)
        one.hear_of(one, 0)
        blocker = Inbox()
        one.local.submit(Request(prompt=np.arange(3), max_tokens=10**6), blocker, 0)
        for host, chosen in (("there", 0), ("here", 1)):
            one.hear_of(two, 1, host)
            assert one.peers.choose_rank(1) == chosen
        blocker.cancel()
        for rank in (one, two):
            rank.engine.stop()

    asyncio.run(asyncio.wait_for(choose(), 30))


@pytest.mark.parametrize("words", [b"16 %s %s\n" % (2 * (b"0" * 64,)), b"16\n", b"\n", b"x" * 100_000])
def test_who_does_not_know_the_secret_gets_nothing(world, words):
    async def knock():
        rank = Rank(LoadedModel.open(world / "run"), 0)
        port = await rank.peers.listen("127.0.0.1")
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        await reader.readline()
        writer.write(words + b'{"prompt": [1]} ')
        assert await asyncio.wait_for(_rest(reader), 5) == b""
        writer.close()
        assert rank.engine.load()["active"] + rank.engine.load()["queued"] == 0
        rank.engine.stop()

    asyncio.run(asyncio.wait_for(knock(), 30))


def test_the_launcher_ends_where_starting_again_would_not_help(world):
    done = mpirun(0, "-m", "dllm", "serve", "nothing", "-n", 2, cwd=world)
    assert done.returncode == 2
    assert "dllm: nothing is not the folder of a run or of a model: it has no config.toml and no config.json\n" in done.stderr
    assert "again" not in done.stderr
