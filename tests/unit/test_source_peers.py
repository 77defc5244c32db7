"""Sources that another rank reads: the same to the bit, even where that rank is lost or lies."""

import asyncio
import contextlib
from types import SimpleNamespace

import numpy as np
import pytest
from helpers.model_folders import make_kind

from dllm.comm.messages import pack
from dllm.engines import wire
from dllm.engines.kinds import make_engine
from dllm.engines.limits import Limits
from dllm.engines.requests import Finished, SourceRequest, Token
from dllm.engines.streams import Inbox, LocalStreams
from dllm.inference.loaded_model import LoadedModel
from dllm.peers.peers import Peers
from dllm.peers.sealed import Keys

LIMIT = 60  # seconds, of any test
LIMITS = Limits(tokens=3000, prompt=500, source=64)
OPTIONS = SimpleNamespace(slots=2, queue=9, cache=0, precision="fp32", max_source=64)
SOURCE = np.array([5, 3, 9, 1, 7])
SHAPES = {"seq2seq": {"layers": 2}, "tagger": {}, "classifier": {}}
WANTED = {
    "greedy": ("seq2seq", {"max_tokens": 9, "logprobs": 2}),
    "a search": ("seq2seq", {"max_tokens": 9, "beams": 2, "best": 2}),
    "a score": ("seq2seq", {"target": np.array([4, 4, 2])}),
    "tags": ("tagger", {}),
    "a class": ("classifier", {}),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    for kind, shape in SHAPES.items():
        make_kind(folder / kind, {"kind": kind} | shape)
    return {kind: LoadedModel.open(folder / kind) for kind in SHAPES}


class Rank:
    """One rank's engine and peers, in this process: gossip is what the test says."""

    def __init__(self, model, rank):
        self.rank, self.known = rank, {}
        self.engine = make_engine(model, OPTIONS, 1)
        self.engine.start()
        self.local, self.keys = LocalStreams(self.engine, asyncio.get_running_loop()), Keys(rank)
        self.peers = Peers(self, self.local, self.keys, LIMITS)

    def table(self):
        return {rank: (report, 0.1, False) for rank, (_, report) in self.known.items()}

    def hear_of(self, rank, port, active):
        report = {"active": active, "queued": 0, "slots": 2, "address": ("127.0.0.1", port), "host": "here", "draining": False}
        self.known[rank] = (1, report)


@contextlib.asynccontextmanager
async def two_ranks(model, serve=None):
    """Two that have agreed on keys; the first says that it has no room, and hands on what it gets."""
    one, two = Rank(model, 0), Rank(model, 1)
    for rank in (one, two):
        rank.keys.agree([one.keys.public, two.keys.public])
    server = await asyncio.start_server(serve(two) if serve else two.peers._serve, "127.0.0.1", 0)
    load = one.engine.load
    one.engine.load = lambda: load() | {"active": 2}
    one.hear_of(0, 0, 2)
    one.hear_of(1, server.sockets[0].getsockname()[1], 0)
    yield one, two
    server.close()
    for rank in (one, two):
        rank.engine.stop()


async def collect(inbox):
    events = []
    while not (events and isinstance(events[-1], Finished)):
        events += [event for _, event in await inbox.get()]
    return events


def same(one, other):
    return len(one) == len(other) and all(
        a[:3] == b[:3]
        and (isinstance(a, Token) or (len(a.found) == len(b.found) and all(map(np.array_equal, a.found, b.found))))
        for a, b in zip(one, other, strict=True)
    )


async def ask(rank, request):
    """By whom a request is computed, and its events."""
    inbox = Inbox()
    chosen, _ = rank.peers.submit({0: request}, inbox)
    return chosen, await collect(inbox)


async def alone(rank, request):
    inbox = Inbox()
    rank.local.submit(request, inbox, 0)
    return await collect(inbox)


def run(work):
    return asyncio.run(asyncio.wait_for(work, LIMIT))


def closing(two):
    async def serve(reader, writer):
        writer.close()

    return serve


@pytest.mark.parametrize("serve", [None, closing], ids=["lives", "is lost"])
@pytest.mark.parametrize("what", WANTED)
def test_another_rank_says_the_same(models, what, serve):
    kind, more = WANTED[what]

    async def compare():
        async with two_ranks(models[kind], serve) as (one, two):
            request = SourceRequest(source=SOURCE, **more)
            chosen, found = await ask(one, request)
            assert chosen == 1
            assert same(found, await alone(two, request))
            assert found[-1].reason == "length"

    run(compare())


FACTS, TEXT = np.zeros((3, 1)), np.array([4, 5])
LIES = {
    "a token of another alphabet": ("greedy", [Token(99, -1.0, []), Finished("length")]),
    "an end too early": ("greedy", [Token(4, -1.0, []), Finished("length")]),
    "a token too many": ("greedy", [Token(4, -1.0, [])] * 10),
    "a token behind the end": ("greedy", [Token(12, -1.0, []), Token(4, -1.0, [])]),
    "alternatives": ("greedy", [Token(4, -1.0, [(4, -1.0)] * 3)]),
    "no probability": ("greedy", [Token(4, None, [])]),
    "a state": ("greedy", [Finished("length", "", FACTS)]),
    "tokens of a search": ("a search", [Token(4, -1.0, [])]),
    "nothing found": ("a search", [Finished("length")]),
    "facts of more texts": ("a search", [Finished("length", found=(np.zeros((3, 2)), TEXT))]),
    "too many texts": ("a search", [Finished("length", found=(np.zeros((3, 3)), TEXT, TEXT, TEXT))]),
    "a long text": ("a search", [Finished("length", found=(FACTS, np.zeros(10, np.int64)))]),
    "floats for a text": ("a search", [Finished("length", found=(FACTS, TEXT * 1.0))]),
    "not finite": ("a score", [Finished("length", found=(np.full(4, np.nan),))]),
    "a short score": ("a score", [Finished("length", found=(np.zeros(3),))]),
    "no probabilities": ("tags", [Finished("length", found=(np.zeros((5, 1), np.int64), np.full((5, 1), 2.0)))]),
    "tags of another text": ("tags", [Finished("length", found=(np.zeros((4, 1), np.int64), np.zeros((4, 1))))]),
    "a tag that is none": ("tags", [Finished("length", found=(np.full((5, 1), 3), np.zeros((5, 1))))]),
    "classes of each token": ("a class", [Finished("length", found=(np.zeros((5, 3), np.int64), np.zeros((5, 3))))]),
    "an end that is none": ("a class", [Finished("cancelled")]),
}


@pytest.mark.parametrize("lie", LIES)
def test_what_cannot_be_true_of_a_source_is_not_believed(models, lie):
    what, events = LIES[lie]
    kind, more = WANTED[what]
    engine = make_engine(models[kind], OPTIONS, 1)
    message = wire.write_news(events)
    with pytest.raises(ValueError, match=r"that|before"):
        engine.expected(SourceRequest(source=SOURCE, **more)).read(message)


def question(**changes):
    return pack(wire.SourceQuestion(**vars(SourceRequest(source=SOURCE)) | changes))


@pytest.mark.parametrize(
    "message",
    [
        b"", pack({}), question(source=np.zeros(65, np.int64)), question(source=np.zeros(0, np.int64)), question(beams=0),
        question(source=SOURCE * 1.0), question(source=SOURCE + 20), question(source=np.zeros((2, 2, 2))), question(beams=41),
        question(max_tokens=3001), question(target=np.zeros(3001, np.int64)), question(target=np.zeros((2, 2), np.int64)),
        question(logprobs=99), question(source=np.array(1)), question(beams=33, max_tokens=3000),
        question(source=np.zeros(64, np.int64), beams=33), question(beams=2, max_tokens=3000, logprobs=20),
    ],
)  # fmt: skip
def test_a_rank_that_asks_for_what_no_client_may_is_refused(models, message):
    engine = make_engine(models["seq2seq"], SimpleNamespace(**vars(OPTIONS) | {"slots": 40}), 1)
    with pytest.raises((ValueError, TypeError)):
        engine.check(engine.read_question(message, LIMITS))


def test_a_question_is_the_same_on_the_other_side():
    request = SourceRequest(source=SOURCE, target=SOURCE[:2], max_tokens=7, beams=3, best=2, logprobs=1)
    found = wire.read_source_question(wire.write_question(request), LIMITS)
    plain = lambda one: {name: np.asarray(value).tolist() for name, value in vars(one).items()}
    assert plain(found) == plain(request)
