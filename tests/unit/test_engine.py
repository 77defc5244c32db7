"""The serving engine against a plain sampler, one stream at a time: whoever joins, leaves, waits, fails or is cancelled."""

import time
from dataclasses import fields

import numpy as np
import pytest
from helpers.numerics import Bundled, V, build, configured, in_panels, reference
from helpers.server import LIMIT, Collected

from dllm.engines.requests import Finished, Full, Request, Stopped, Token
from dllm.engines.text_engine import TextEngine
from dllm.inference.generation import Sampling, sample, start_tokens
from dllm.inference.loaded_model import LoadedModel
from dllm.kernels.int8 import HOW
from dllm.kernels.penalties import changed_reference
from dllm.kernels.processor import BF16
from dllm.kernels.sample import Choice, Scratch, draw
from dllm.kernels.team import Team
from dllm.model.batch import Batch
from dllm.model.decoder import Decoder

CONFIG = configured(hidden=18, embedding=7)
PRECISIONS = ["fp32", *["bf16"] * bool(BF16), *["int8"] * bool(HOW)]


@pytest.fixture(scope="module")
def model():
    return build(CONFIG, dtype=np.float32, training=False)


@pytest.fixture
def start(model):
    """start(...): a running engine, stopped in the end."""
    started = []

    def begin(**options):
        engine = TextEngine(Bundled(model), **{"slots": 5, **options})
        engine.start()
        started.append(engine)
        return engine

    yield begin
    for engine in started:
        engine.stop()
        assert not engine._thread.is_alive()


def changed(rng):
    """Of half of all requests: how their logits are changed."""
    if rng.integers(2):
        return {}
    return {
        "logit_bias": [(int(token), float(rng.normal(0, 2))) for token in set(rng.integers(0, V, 3).tolist())],
        "banned": rng.integers(0, V, 2).tolist(), "presence_penalty": float(rng.choice([0, 0.5])),
        "frequency_penalty": float(rng.choice([0, 0.3])), "repetition_penalty": float(rng.choice([1, 1.3])),
        "min_p": float(rng.choice([0, 0.1])),
    }  # fmt: skip


def request(rng, **changes):
    """A random one."""
    return Request(**{
        "prompt": rng.integers(0, V, rng.integers(1, 30)), "max_tokens": int(rng.integers(1, 25)),
        "temperature": float(rng.choice([0, 0.5, 1, 1.5])), "top_p": float(rng.choice([1, 0.7])),
        "top_k": int(rng.choice([0, 0, 4])), "seed": int(rng.integers(2**62)), "logprobs": rng.choice([None, 0, 3]),
        "echo": bool(rng.integers(2)), "want_state": bool(rng.integers(2)), **changed(rng),
        **changes,
    })  # fmt: skip


def answers(engine, *requests):
    inbox = Collected()
    return inbox.whole(*[engine.submit(each, inbox) for each in requests])


def same(one, other):
    """Whether two lists of events are the same to the bit."""
    return [event[:2] for event in one] == [event[:2] for event in other] and all(
        a[2:] == b[2:] if isinstance(a, Token) else np.array_equal(a.state, b.state) for a, b in zip(one, other, strict=True)
    )


def log_softmax(logits):
    shifted = logits - logits.max()
    return shifted - np.log(np.exp(shifted).sum())


def plain(wanted):
    """The events of a request by the equations in float64, one token at a time."""
    model = build(CONFIG, training=False, lanes=1, window=1)
    h, c, events, given = None, None, [], wanted.prompt.tolist()
    if wanted.scores_prompt:
        events.append(Token(given[0], None, [], True))
    n, total = len(given), len(given) + wanted.to_generate
    for at in range(total - (wanted.to_generate > 0 or not wanted.want_state)):
        logits, h, c = reference(model, np.array([[given[at]]]), h, c)
        logits = logits[0, 0]
        told, logp = at + 1 < n, log_softmax(logits)
        if not told and wanted.to_generate:
            choice = Choice(1)
            choice.temperature[:], choice.top_k[:], choice.top_p[:] = wanted.temperature, wanted.top_k, wanted.top_p
            choice.seed[:], choice.position[:], choice.min_p[:] = wanted.seed, at + 1 - n, wanted.min_p
            values = changed_reference(logits, wanted, given[:n], given[n:])
            draw(choice, np.zeros(1, np.int64), in_panels(values[None]), np.zeros(V), Scratch(V), Team())
            given.append(int(choice.token[0]))
        if wanted.scores_prompt if told else wanted.to_generate:
            best, token = np.argsort(-logp, kind="stable")[: wanted.logprobs or 0], given[at + 1]
            events.append(Token(token, logp[token], [(int(v), logp[v]) for v in best], told))
    return [*events, Finished("length", "", h[-1, 0] if wanted.want_state else None)]


def check(found, expected):
    assert [type(event) for event in found] == [type(event) for event in expected]
    for mine, theirs in zip(found, expected, strict=True):
        if isinstance(mine, Finished):
            assert mine[:2] == theirs[:2]
            assert (mine.state is None) == (theirs.state is None)
            if mine.state is not None:
                assert mine.state.dtype == np.float32
                np.testing.assert_allclose(mine.state, theirs.state, atol=1e-5)
        else:
            assert (mine.number, mine.prompt) == (theirs.number, theirs.prompt)
            assert mine.logprob == (None if theirs.logprob is None else pytest.approx(theirs.logprob, abs=1e-4))
            assert [v for v, _ in mine.alternatives] == [v for v, _ in theirs.alternatives]
            np.testing.assert_allclose([p for _, p in mine.alternatives], [p for _, p in theirs.alternatives], atol=1e-4)


@pytest.mark.parametrize("seed", [1, 2])
def test_streams_that_come_and_go_get_what_a_plain_sampler_gives_each(start, seed):
    rng, engine, inbox = np.random.default_rng(seed), start(), Collected()
    wanted = [request(rng) for _ in range(40)]
    wanted += [request(rng, score_only=True), request(rng, max_tokens=0, echo=True), request(rng, max_tokens=0, echo=False)]
    streams = []
    for number in rng.permutation(len(wanted)):
        streams.append((engine.submit(wanted[number], inbox), wanted[number]))
        if rng.random() < 0.3:
            time.sleep(0.003)
    for stream, each in streams:
        check(inbox.whole(stream)[0], plain(each))
    assert engine.load()["active"] == engine.load()["queued"] == 0


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_stream_gets_the_same_bits_alone_and_among_63_others_however_its_prompt_is_cut(start, precision):
    rng = np.random.default_rng(3)
    wanted = [request(rng, prompt=rng.integers(0, V, 40), max_tokens=30) for _ in range(6)]
    engine = start(slots=1, cache_bytes=0, precision=precision)
    alone = [answers(engine, each)[0] for each in wanted]
    for window, threads in ((64, 2), (7, 1), (1, 1)):
        others = [request(rng) for _ in range(64 - len(wanted))]
        others += [request(rng, prompt=each.prompt[: rng.integers(2, 40)]) for each in wanted]  # prefixes that will be known
        engine = start(slots=64, threads=threads, precision=precision, window=window)
        answers(engine, *others[-6:])
        found = answers(engine, *wanted, *others[:-6])[: len(wanted)]
        assert all(map(same, found, alone))
        assert all(map(same, answers(engine, *wanted), alone))
        assert engine.load()["cache_hits"] > 0


def test_a_prompt_that_goes_on_where_another_ended_starts_from_its_state(start):
    rng, engine = np.random.default_rng(4), start()
    first = request(rng, echo=False, max_tokens=10)
    tokens = [event.number for event in answers(engine, first)[0][:-1]]
    hits, reads = engine.load()["cache_hits"], []
    read = engine.decoder.read
    engine.decoder.read = lambda tokens, *rest: (reads.append(tokens.size), read(tokens, *rest))
    longer = request(rng, prompt=np.concatenate([first.prompt, tokens, [1, 2]]), echo=False, max_tokens=1, want_state=False)
    found = answers(engine, longer)[0]
    assert engine.load()["cache_hits"] == hits + 1
    assert sum(reads) == 3  # what the state had not seen: the last token that was made, and two more
    check(found, plain(longer))


def test_a_trained_model_says_in_the_engine_what_it_says_alone(world):
    trained = LoadedModel.open(world / "run")
    model, rng = trained.model(16), np.random.default_rng(14)
    wanted = [request(rng, prompt=start_tokens(trained.tokenizer, text), echo=False) for text in ("", "First", "All:\n" * 20)]
    engine = TextEngine(Bundled(model))
    engine.start()
    for each, events in zip(wanted, answers(engine, *wanted), strict=True):
        shared = {field.name for field in fields(Sampling)} & {field.name for field in fields(each)}
        wants = Sampling(**{name: getattr(each, name) for name in shared})
        alone = sample(Decoder(model, 1), each.prompt, each.max_tokens, wants)
        assert [event.number for event in events[:-1]] == list(alone)
    engine.stop()


def test_scores_are_the_losses_of_the_model(start, model):
    tokens = np.random.default_rng(5).integers(0, V, 300)
    events = answers(start(), Request(prompt=tokens, score_only=True, want_state=True, logprobs=2))[0]
    whole = build(CONFIG, dtype=np.float32, training=False, window=300, lanes=1)
    h = np.zeros((CONFIG.layers, 1, CONFIG.hidden), np.float32)
    c = np.zeros_like(h)
    losses = whole.forward(Batch(tokens[:-1, None], tokens[1:, None]), h, c)[:, 0].copy()
    assert events[0] == Token(tokens[0], None, [], True)
    np.testing.assert_allclose([-event.logprob for event in events[1:-1]], losses, atol=1e-5)
    assert all(event.prompt and len(event.alternatives) == 2 for event in events[1:-1])
    whole.forward(Batch(tokens[-1:, None], tokens[-1:, None]), h, c)
    np.testing.assert_allclose(events[-1].state, h[-1, 0], atol=1e-6)


def endless(rng, **changes):
    return request(rng, max_tokens=10**9, echo=False, **changes)


def test_a_full_queue_refuses_and_a_cancelled_stream_makes_room_wherever_it_is(start):
    rng, engine, inbox = np.random.default_rng(6), start(slots=2, queue=3), Collected()
    running = [engine.submit(endless(rng), inbox) for _ in range(2)]
    inbox.wait(lambda: all(stream in inbox.events for stream in running))
    waiting = [engine.submit(endless(rng), inbox) for _ in range(3)]
    with pytest.raises(Full):
        engine.submit(endless(rng), inbox)
    load = engine.load()
    assert (load["active"], load["queued"], load["slots"], load["alive"]) == (2, 3, 2, 1)
    assert load["tokens"] >= load["steps"] > 0
    waiting[1].cancel()
    assert inbox.whole(waiting[1]) == [[Finished("cancelled")]]
    running[0].cancel()
    running[0].cancel()
    assert inbox.whole(running[0])[0][-1][:1] == ("cancelled",)
    inbox.wait(lambda: waiting[0] in inbox.events)
    assert waiting[2] not in inbox.events
    for stream in (running[1], waiting[0], waiting[2]):
        stream.cancel()
    for events in inbox.whole(*running, *waiting):
        assert [type(event) for event in events].count(Finished) == 1
    assert engine.load()["active"] == 0
    check(answers(engine, last := request(rng))[0], plain(last))


def test_all_news_of_a_step_come_in_one_call(start):
    rng, engine, inbox = np.random.default_rng(7), start(slots=8), Collected()
    streams = [engine.submit(request(rng, echo=False, max_tokens=20), inbox) for _ in range(8)]
    inbox.whole(*streams)
    for news in inbox.calls:
        made = [stream for stream, event in news if isinstance(event, Token)]
        assert len(made) == len(set(made))
    assert max(map(len, inbox.calls)) >= 8


def test_stop_finishes_what_is_there_and_takes_nothing_more(start):
    rng, engine, inbox = np.random.default_rng(8), start(slots=2), Collected()
    streams = [engine.submit(request(rng, max_tokens=50), inbox) for _ in range(4)]
    engine.stop(LIMIT)
    assert [events[-1].reason for events in inbox.whole(*streams)] == ["length"] * 4
    with pytest.raises(Stopped):
        engine.submit(request(rng), inbox)
    assert engine.load()["alive"] == 0


def test_stop_ends_with_an_error_what_does_not_end_in_time(start):
    rng, engine, inbox = np.random.default_rng(9), start(slots=1), Collected()
    streams = [engine.submit(endless(rng), inbox) for _ in range(2)]
    begin = time.monotonic()
    engine.stop(0.2)
    assert 0.2 <= time.monotonic() - begin < 20
    assert [events[-1].reason for events in inbox.whole(*streams)] == ["error"] * 2


def test_a_state_that_is_not_finite_ends_its_stream_alone(start):
    rng, engine = np.random.default_rng(10), start(slots=6)
    wanted = [request(rng, max_tokens=30) for _ in range(5)]
    expected, inbox = [answers(engine, each)[0] for each in wanted], Collected()

    def spoil(news):  # in the engine's thread
        if news[0][0].slot is not None:
            engine.decoder.states[news[0][0].slot, 0, 1, 0, 0] = np.nan
        inbox(news)

    bad = engine.submit(endless(rng), spoil)
    good = [engine.submit(each, inbox) for each in wanted]
    events = inbox.whole(bad)[0]
    assert events[-1].reason == "error"
    assert "not finite" in events[-1].message
    assert all(map(same, inbox.whole(*good), expected))
    check(answers(engine, wanted[0])[0], plain(wanted[0]))  # in the slot where that was


def test_whoever_listens_badly_loses_its_streams_alone(start):
    rng, engine, inbox = np.random.default_rng(11), start(), Collected()

    def broken(news):
        raise RuntimeError("nobody is there")

    engine.submit(endless(rng), broken)
    check(inbox.whole(engine.submit(last := request(rng), inbox))[0], plain(last))
    for _ in range(1000):
        if engine.load()["active"] == 0:
            break
        time.sleep(0.01)
    assert engine.load()["active"] == 0


def test_an_engine_that_fails_says_so_to_all(start, capsys):
    rng, engine, inbox = np.random.default_rng(12), start(slots=2), Collected()
    streams = [engine.submit(endless(rng), inbox) for _ in range(4)]
    inbox.wait(lambda: len(inbox.events) >= 2)

    def fails(*arguments):
        raise MemoryError("no memory")

    engine.decoder.read = fails
    for events in inbox.whole(*streams):
        assert events[-1] == Finished("error", "the engine failed: MemoryError: no memory")
    engine._thread.join(LIMIT)
    assert engine.load()["alive"] == 0
    with pytest.raises(Stopped, match="no memory"):
        engine.submit(request(rng), inbox)
    assert "MemoryError" in capsys.readouterr().err


IMPOSSIBLE = [
    {"prompt": []}, {"prompt": [[1]]}, {"max_tokens": -1}, {"top_k": -1}, {"temperature": -1.0}, {"temperature": float("nan")},
    {"temperature": float("inf")}, {"top_p": 1.1}, {"top_p": float("nan")}, {"logprobs": 1000}, {"logprobs": -1},
    {"min_p": -0.1}, {"min_p": float("nan")}, {"presence_penalty": 2.1}, {"frequency_penalty": float("nan")},
    {"repetition_penalty": 0.0}, {"repetition_penalty": float("nan")}, {"logit_bias": [(0, 101.0)]},
    {"logit_bias": [(0, float("nan"))]}, {"logit_bias": [(0, 1.0)] * 301}, {"banned": range(9)},
]  # fmt: skip


@pytest.mark.parametrize("changes", IMPOSSIBLE, ids=str)
def test_requests_that_nobody_can_answer_are_refused(changes):
    with pytest.raises(ValueError):  # noqa: PT011
        Request(**{"prompt": [1], **changes})


@pytest.mark.parametrize("token", [-1, V])
def test_tokens_that_the_model_does_not_have_are_refused(start, token):
    with pytest.raises(ValueError, match="numbers from 0 to 10"):
        start().submit(Request(prompt=[1, token]), print)
    for changes in ({"banned": [token]}, {"logit_bias": [(token, 1.0)]}):
        with pytest.raises(ValueError, match="numbers from 0 to 10"):
            start().submit(Request(prompt=[1], **changes), print)


def test_a_prompt_of_another_client_is_read_as_if_nobody_had_said_it(start):
    """And gets the same bits; all of its tokens are read, whoever said them before or says them now."""
    rng, engine = np.random.default_rng(15), start(slots=3)
    first = request(rng, prompt=rng.integers(0, V, 200), echo=False, max_tokens=5)
    ask = lambda salt: Request(**vars(first) | {"salt": salt})
    reads, read = [], engine.decoder.read
    engine.decoder.read = lambda tokens, slots, lengths=None: (
        reads.append(tokens.size if lengths is None else int(np.sum(lengths))),
        read(tokens, slots) if lengths is None else read(tokens, slots, lengths),
    )
    expected = answers(engine, ask(b"one"))[0]
    alone = sum(reads)
    for salts, times in (([b"one"], 0), ([b"other"], 1), ([b"one"], 0), ([b"third", b"fourth", b"third"], 2)):
        hits, _ = engine.load()["cache_hits"], reads.clear()
        assert all(same(found, expected) for found in answers(engine, *map(ask, salts)))
        assert sum(reads) == alone * times + (len(salts) - times) * first.max_tokens
        assert (engine.load()["cache_hits"] > hits) == (times < len(salts))


def test_the_cache_of_an_engine_keeps_to_its_bytes(start):
    rng, engine = np.random.default_rng(13), start(cache_bytes=20_000)
    for _ in range(4):
        answers(engine, *[request(rng, echo=False) for _ in range(20)])
        assert 0 < engine.load()["cache_bytes"] <= 20_000
