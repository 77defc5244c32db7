"""Streams that a rank computes for another: with honest ranks, with strangers in their place, and with ranks that lie."""

import asyncio
import contextlib
import secrets
import time

import numpy as np
import pytest
from helpers.numerics import Bundled, V, build, configured

from dllm.comm.messages import pack
from dllm.engines import wire
from dllm.engines.limits import Limits
from dllm.engines.requests import Finished, Request, Token
from dllm.engines.streams import Inbox, LocalStreams
from dllm.engines.text_engine import TextEngine
from dllm.peers import peers, sealed
from dllm.peers.peers import STRANGERS, Peers
from dllm.peers.sealed import Keys

LIMIT = 60  # seconds, of any test
CONFIG = configured(hidden=18, embedding=7)
LIMITS = Limits(tokens=3000, prompt=500)
PROMPT = np.array([5, 3, 9, 1, 7, 2, 8, 4, 6, 10])


@pytest.fixture(scope="module")
def bundle():
    return Bundled(build(CONFIG, dtype=np.float32, training=False))


class Rank:
    """One rank's engine and peers, in this process: gossip is what the test says."""

    def __init__(self, bundle, rank, slots=1):
        self.rank, self.known, self.dead = rank, {}, False
        self.engine = TextEngine(bundle, slots=slots, queue=4)
        self.engine.start()
        self.local = LocalStreams(self.engine, asyncio.get_running_loop())
        self.keys = Keys(rank)
        self.peers = Peers(self, self.local, self.keys, LIMITS)

    def table(self):
        return {rank: (report, 0.1, self.dead) for rank, (_, report) in self.known.items()}

    def hear_of(self, other, port, host="here"):
        load = {name: other.engine.load()[name] for name in ("active", "queued", "slots")}
        self.known[other.rank] = (1, load | {"address": ("127.0.0.1", port), "host": host, "draining": False})

    def busy(self):
        return self.engine.load()["active"] + self.engine.load()["queued"]


@contextlib.contextmanager
def two_ranks(bundle):
    """Two that have agreed on keys; the first has no room, so that it hands on what it gets."""
    one, two = Rank(bundle, 0), Rank(bundle, 1)
    for rank in (one, two):
        rank.keys.agree([one.keys.public, two.keys.public])
    one.hear_of(one, 0)
    one.blocker = Inbox()
    one.local.submit(Request(prompt=np.arange(3), max_tokens=10**6), one.blocker, 0)
    yield one, two
    one.blocker.cancel()
    for rank in (one, two):
        rank.engine.stop()


def run(work):
    return asyncio.run(asyncio.wait_for(work, LIMIT))


async def collect(inbox):
    events = []
    while not (events and isinstance(events[-1], Finished)):
        events += [event for _, event in await inbox.get()]
    return events


async def alone(rank, request):
    """What a rank itself says, in one go."""
    inbox = Inbox()
    rank.local.submit(request, inbox, 0)
    return await collect(inbox)


def same(one, other):
    return [event[:2] for event in one] == [event[:2] for event in other] and all(
        a[2:] == b[2:] if isinstance(a, Token) else np.array_equal(a.state, b.state) for a, b in zip(one, other, strict=True)
    )


@pytest.mark.slow
@pytest.mark.parametrize("fate", ["lives", "dies", "fails"])
def test_a_stream_of_another_rank_is_the_same_even_if_that_rank_is_lost(bundle, fate):
    """It goes on from where it broke off, the same to the bit."""

    async def compare():
        with two_ranks(bundle) as (one, two):
            writers = []

            async def serve(reader, writer):
                writers.append(writer)
                await two.peers._serve(reader, writer)

            server = await asyncio.start_server(serve, "127.0.0.1", 0)
            one.hear_of(two, server.sockets[0].getsockname()[1])
            changes = {"repetition_penalty": 1.1, "frequency_penalty": 0.01, "banned": (4,), "logit_bias": ((2, -1.0),)}
            request = Request(prompt=PROMPT, max_tokens=3000, seed=3, logprobs=2, echo=True, want_state=True, **changes)
            expected, inbox = await alone(two, request), Inbox()
            rank, _ = one.peers.submit({0: request}, inbox)
            assert rank == 1
            got = [event for _, event in await inbox.get()]
            if fate == "fails":
                two.engine.stop()
            if fate == "dies":
                one.dead = True
                writers[0].transport.abort()
                server.close()
            one.blocker.cancel()
            got += await collect(inbox)
            assert same(got, expected)
            server.close()

    run(compare())


@pytest.mark.slow
def test_a_stream_that_waits_for_its_turn_is_waited_for(bundle, monkeypatch):
    """As long as that rank says that it is there."""
    monkeypatch.setattr(peers, "BEAT", 0.05)
    monkeypatch.setattr(peers, "PATIENCE", 3.0)  # of a busy machine, too

    async def wait():
        with two_ranks(bundle) as (one, two):
            one.hear_of(two, await two.peers.listen("127.0.0.1"))
            blocker, inbox = Inbox(), Inbox()
            two.local.submit(Request(prompt=np.arange(3), max_tokens=10**6), blocker, 0)
            one.peers.submit({0: Request(prompt=PROMPT, max_tokens=5)}, inbox)
            await asyncio.sleep(4)
            assert two.peers.callers == 1
            blocker.cancel()
            events = await collect(inbox)
            assert events[-1] == Finished("length")
            assert one.busy() == 1  # the blocker: nothing was computed here

    run(wait())


def test_nothing_is_handed_to_the_loopback_of_another_host(bundle):
    async def choose():
        with two_ranks(bundle) as (one, two):
            for host, chosen in (("there", 0), ("here", 1)):
                one.hear_of(two, 1, host)
                assert one.peers.choose_rank(1) == chosen

    run(choose())


async def says_nothing(reader, writer):
    await reader.read()


async def closes(reader, writer):
    pass


async def says_hello(reader, writer):
    """What ranks of earlier versions believed, word by word."""
    writer.write(b"hello\n" + bytes(26))
    await reader.read(1000)
    writer.write(b'[]\n[[7,-0.1,[],false]]\n[["length","",null]]\n')
    await reader.read()


async def forges(reader, writer):
    """Frames of the right form, sealed by keys of its own."""
    own = Keys(1)
    own.agree([Keys(0).public, own.public])
    hello = await answer_as(own, reader, writer)
    assert hello is None


async def floods(reader, writer):
    writer.write(secrets.token_bytes(sealed.NONCE) + b"\0\xff\xff\xff" + bytes(1 << 20))
    await reader.read()


async def answer_as(keys, reader, writer):
    """A conversation that checks no hello: whoever does not know the key goes on as if it did."""
    nonce = secrets.token_bytes(sealed.NONCE)
    writer.write(nonce)
    hello = await reader.readexactly(sealed.RANK + sealed.NONCE)
    _, closing = keys.of_connection(0, 1, hello[sealed.RANK :] + nonce)
    channel = sealed.Channel(reader, writer, closing, None)
    for events in ([], [Token(7, -0.1, [])], [Finished("length")]):
        await channel.send(wire.write_news(events))
    await reader.read()


@pytest.mark.parametrize("stranger", [says_nothing, closes, says_hello, forges, floods], ids=lambda each: each.__name__)
def test_a_stranger_at_the_port_of_a_rank_reads_no_token_and_is_not_believed(bundle, stranger, monkeypatch):
    """The stream is computed by the rank that asked, the same to the bit, and that port is left alone for a while."""
    monkeypatch.setattr(peers, "PATIENCE", 1.0)

    async def ask():
        with two_ranks(bundle) as (one, two):
            heard = bytearray()

            async def serve(reader, writer):
                feed = reader.feed_data
                reader.feed_data = lambda data: (heard.extend(data), feed(data))
                with contextlib.suppress(OSError, EOFError):
                    await stranger(reader, writer)
                writer.close()

            server = await asyncio.start_server(serve, "127.0.0.1", 0)
            request = Request(prompt=PROMPT, max_tokens=50, seed=3, salt=b"salt of a client")
            expected, inbox = await alone(two, request), Inbox()
            one.hear_of(two, server.sockets[0].getsockname()[1])
            begin = time.monotonic()
            assert one.peers.submit({0: request}, inbox)[0] == 1
            one.blocker.cancel()
            assert same(await collect(inbox), expected)
            assert time.monotonic() - begin < 5
            one.local.submit(Request(prompt=np.arange(3), max_tokens=10**6), one.blocker, 0)
            assert one.peers.choose_rank(1) == 0
            server.close()
            readable = [PROMPT.tobytes(), PROMPT[:2].tobytes(), b"5,3,9", b"5, 3, 9", b"prompt", request.salt, b"salt", b"max"]
            assert not any(bytes(heard).count(part) for part in readable)
            if stranger is not closes:
                assert len(heard) < 2000

    run(ask())


@pytest.mark.parametrize(
    "words",
    [b"16 %s %s\n" % (2 * (b"0" * 64,)), b"", b"\0\0\0\0" + bytes(48), b"\0\0\0\1" + bytes(48), b"\xff" * 52, b"x" * 100_000],
    ids=lambda words: f"{len(words)} bytes {words[:4]}",
)
def test_a_stranger_that_calls_gets_a_nonce_and_nothing_else(bundle, words):
    async def knock():
        with two_ranks(bundle) as (_, two):
            port = await two.peers.listen("127.0.0.1")
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(words)
            if words[:2] in (b"16", b""):  # fewer bytes than are waited for: it has had time enough
                writer.write_eof()
            answer = b""
            with contextlib.suppress(ConnectionResetError):
                answer = await asyncio.wait_for(reader.read(), 5)
            writer.close()
            assert len(answer) in (0, sealed.NONCE)  # 0: reset in the midst of what was sent
            assert (two.busy(), two.peers.callers) == (0, 0)

    run(knock())


@pytest.mark.slow
def test_a_slow_stranger_is_sent_away_and_many_do_not_keep_a_rank_from_being_heard(bundle, monkeypatch):
    monkeypatch.setattr(peers, "PATIENCE", 1.0)

    async def crowd():
        with two_ranks(bundle) as (one, two):
            port = await two.peers.listen("127.0.0.1")
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            await reader.readexactly(sealed.NONCE)
            begin = time.monotonic()
            while not (reader.at_eof() or reader.exception()):
                writer.write(b"\0")
                await asyncio.sleep(0.05)
                assert time.monotonic() < begin + 2.5  # all it has to say would take longer
            writer.close()
            crowd = [await asyncio.open_connection("127.0.0.1", port) for _ in range(STRANGERS + 50)]
            one.hear_of(two, port)
            inbox = Inbox()
            assert one.peers.submit({0: Request(prompt=PROMPT, max_tokens=5)}, inbox)[0] == 1
            assert (await collect(inbox))[-1] == Finished("length")
            assert one.busy() == 1
            assert len(two.peers._gate.strangers) <= STRANGERS
            for _, writer in crowd:
                writer.close()

    run(crowd())


def news(*tokens, end=None):
    return pack([list(tokens), end])


FINE = [5, -0.5, [[1, -0.1]], False]
LIES = {
    "nothing": b"",
    "noise": b"\xff" * 100,
    "no list": pack({"tokens": []}),
    "deep": (10**5).to_bytes(8, "little") + b"[" * 10**5,
    "text for a number": news(["5", -0.5, [], False]),
    "a number that no token has": news([V, -0.5, [], False]),
    "a negative number": news([-1, -0.5, [], False]),
    "a number without end": news([10**300, -0.5, [], False]),
    "no log-probability": news([5, None, [], False]),
    "a log-probability that is infinite": news(FINE).replace(b"-0.5", b"-1e999"),
    "an alternative that no token has": news([5, -0.5, [[V, -0.1]], False]),
    "more alternatives": news([5, -0.5, [[1, -0.1], [2, -0.2], [3, -0.3]], False]),
    "a token of the prompt": news([5, -0.5, [], True]),
    "more tokens": news(*[FINE] * 51),
    "an end too soon": news(FINE, end=["length", "", None]),
    "an end of no kind": news(end=["stop", "", None]),
    "an end that nobody asked for": news(end=["cancelled", "", None]),
    "an error": news(end=["error", "\x1b[2J", None]),
    "a state that nobody asked for": news(*[FINE] * 50, end=["length", "", np.zeros(18, np.float32)]),
    "an array that is none": news(end=["length", "", np.zeros(3, np.float32)]).replace(b'"<f4"', b'"|O8"'),
}


@pytest.mark.parametrize("lie", LIES)
def test_what_a_rank_says_that_cannot_be_true_does_not_reach_a_client(bundle, lie):
    """It has the keys, so all of it is opened. What it said before, and could be true, is as if it had died then."""

    async def listen():
        with two_ranks(bundle) as (one, two):

            async def serve(reader, writer):
                with contextlib.suppress(OSError, EOFError):
                    channel = await sealed.welcome(two.keys, reader, writer)
                    await channel.receive()
                    await channel.send(wire.write_news([]))
                    await channel.send(LIES[lie])
                    await reader.read()
                writer.close()

            server = await asyncio.start_server(serve, "127.0.0.1", 0)
            one.hear_of(two, server.sockets[0].getsockname()[1])
            request = Request(prompt=PROMPT, max_tokens=50, seed=3, logprobs=2)
            expected, inbox = await alone(two, request), Inbox()
            assert one.peers.submit({0: request}, inbox)[0] == 1
            one.blocker.cancel()
            assert same(await collect(inbox), expected)
            server.close()

    run(listen())


def question(**changes):
    request = Request(prompt=PROMPT, max_tokens=5)
    return pack(wire.Question(**vars(request) | {"salt": ""} | changes))


IMPOSSIBLE = {
    "nothing": b"", "no list": pack({}), "short": pack([1, 2]), "no prompt": question(prompt=np.zeros(0, np.int64)),
    "floats": question(prompt=PROMPT * 1.0), "two dimensions": question(prompt=PROMPT[None]),
    "small numbers": question(prompt=PROMPT.astype(np.int8)), "unknown tokens": question(prompt=PROMPT + V),
    "negative tokens": question(prompt=-PROMPT), "long": question(prompt=np.zeros(LIMITS.prompt + 1, np.int64)),
    "many tokens": question(max_tokens=LIMITS.tokens + 1), "no tokens": question(max_tokens=-1), "text": question(echo="yes"),
    "top_p": question(top_p=2.0), "top_k": question(top_k=2**40), "logprobs": question(logprobs=10**6),
    "cold": question(temperature=-1.0), "seed": question(seed=2**63).replace(b"9223372036854775808", b"9" * 100),
    "salt": question(salt="00" * 65), "no salt": question(salt="xy"), "a bias beyond": question(logit_bias=[(V, 1.0)]),
    "a large bias": question(logit_bias=[(1, 1e300)]), "a ban before": question(banned=[-1]),
    "many bans": question(banned=[1] * 9), "repetition": question(repetition_penalty=0.0), "min_p": question(min_p=2.0),
}  # fmt: skip


@pytest.mark.parametrize("kind", IMPOSSIBLE)
def test_a_rank_that_asks_for_what_no_client_may_is_refused(bundle, kind):
    async def ask():
        with two_ranks(bundle) as (one, two):
            port = await two.peers.listen("127.0.0.1")
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            channel = await sealed.call(one.keys, 1, reader, writer, IMPOSSIBLE[kind])
            with pytest.raises((EOFError, ConnectionError)):
                await asyncio.wait_for(channel.receive(), 5)
            writer.close()
            assert two.busy() == 0
            one.hear_of(two, port)
            inbox = Inbox()
            assert one.peers.submit({0: Request(prompt=PROMPT, max_tokens=5)}, inbox)[0] == 1
            assert (await collect(inbox))[-1] == Finished("length")

    run(ask())


def test_a_request_and_its_news_are_the_same_on_the_other_side():
    request = Request(
        prompt=PROMPT, max_tokens=7, temperature=0.3, top_p=0.1, top_k=3, seed=2**63 - 1, logprobs=2, salt=b"\0\xff", min_p=0.2,
        logit_bias=((3, 1.5),), banned=(0,), repetition_penalty=1.1, presence_penalty=-0.5, frequency_penalty=0.25,
    )  # fmt: skip
    found = wire.read_question(wire.write_question(request), LIMITS)
    assert {**vars(found), "prompt": found.prompt.tolist()} == {**vars(request), "prompt": PROMPT.tolist()}
    answer = wire.Answer(Request(prompt=[3, 5], max_tokens=2, logprobs=1, echo=True, want_state=True), V, 2)
    state = np.array([1 / 3, -0.0], np.float32)
    told = [Token(3, None, [], True), Token(5, -0.1, [(1, 1 / 3 - 1)], True), Token(1, -1e-300, [(1, -2e-308)])]
    assert answer.read(wire.write_news(told)) == told
    last = answer.read(wire.write_news([Token(1, float("-inf"), [(2, float("-inf"))]), Finished("length", "", state)]))
    assert last[0] == Token(1, -1e9, [(2, -1e9)])  # which is what a client is told of it, see openai.json_number
    assert (last[1][:2], last[1].state.tobytes()) == (("length", ""), state.tobytes())
