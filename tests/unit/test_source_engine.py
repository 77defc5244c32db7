"""The engine of sources: batches, company that changes nothing, what is refused, and what comes of each kind of model."""

import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest
from helpers.model_folders import make_kind
from helpers.server import Collected

from dllm.engines import source_engine, workers
from dllm.engines.kinds import make_engine
from dllm.engines.requests import Finished, Full, SourceRequest, Stopped, Stream, Token
from dllm.engines.source_engine import WAITING
from dllm.engines.wire import write_news
from dllm.inference.answering import Answering, pair_losses, streams_of
from dllm.inference.loaded_model import LoadedModel
from dllm.inference.search import Beam
from dllm.kernels.ctc import log_probabilities
from dllm.kernels.softmax import IGNORE
from dllm.model.batch import Batch

OPTIONS = {"slots": 8, "queue": 64, "cache": 0, "precision": "fp32", "max_source": 64}
SHAPES = {
    "seq2seq": {"bidirectional": True, "layers": 2},
    "tagger": {"bidirectional": True},
    "classifier": {"bidirectional": True, "pool": "mean"},
    "ctc": {"bidirectional": True, "features": 5},
}
RNG = np.random.default_rng(8)
SOURCES = [RNG.integers(0, 11, length) for length in (1, 9, 4, 30, 12, 2, 7, 7, 20, 5)]
FRAMES = [RNG.standard_normal((len(source), 5)).astype(np.float32) for source in SOURCES]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    for kind, shape in SHAPES.items():
        make_kind(folder / kind, shape | {"kind": kind})
    return {kind: LoadedModel.open(folder / kind) for kind in SHAPES}


@pytest.fixture
def start(models):
    started = []

    def begin(kind, **options):
        engine = make_engine(models[kind], SimpleNamespace(**OPTIONS | options), 1)
        engine.start()
        started.append(engine)
        return engine

    yield begin
    for engine in started:
        engine.stop()
        assert not engine._thread.is_alive()


def ask(engine, *requests):
    """The events of each request, which are asked at once."""
    inbox = Collected()
    return inbox.whole(*[engine.submit(request, inbox) for request in requests])


def same(one, other):
    return len(one) == len(other) and all(
        a[:3] == b[:3] and (isinstance(a, Token) or all(map(np.array_equal, a.found, b.found)))
        for a, b in zip(one, other, strict=True)
    )


def requests_of(kind):
    if kind == "ctc":
        return [SourceRequest(source=frames) for frames in FRAMES]
    if kind != "seq2seq":
        return [SourceRequest(source=source) for source in SOURCES]
    hows = {"max_tokens": 6}, {"max_tokens": 9, "logprobs": 2}, {"max_tokens": 5, "beams": 3, "best": 2}, {"target": SOURCES[1]}
    return [SourceRequest(source=source, **hows[number % 4]) for number, source in enumerate(SOURCES)]


@pytest.mark.parametrize("kind", SHAPES)
def test_a_source_gets_the_same_bits_alone_and_in_company(start, kind):
    engine, requests = start(kind), requests_of(kind)
    alone = [ask(engine, request)[0] for request in requests]
    together = ask(engine, *requests)
    assert all(map(same, together, alone))
    assert all(events[-1][:2] == ("length", "") for events in together)
    load = engine.load()
    assert (load["active"], load["queued"], load["source_rows"], load["alive"]) == (0, 0, 0, 1)


def test_targets_are_those_of_a_search_and_scores_the_losses(start, models):
    engine, model = start("seq2seq"), models["seq2seq"]
    streams, tokenizer = streams_of(model.network(64, 1), model.tokenizer, 3), model.tokenizer
    for source in SOURCES[:5]:
        greedy, wide = ask(
            engine, SourceRequest(source=source, max_tokens=7), SourceRequest(source=source, max_tokens=7, beams=3, best=3)
        )
        how = Answering(tokenizer=tokenizer, lanes=1, limit=7)
        (best,) = how.search(streams, [source])[0]
        assert [event.number for event in greedy[:-1]] == [*best.tokens, *[tokenizer.end] * best.ended]
        assert sum(event.logprob for event in greedy[:-1]) == pytest.approx(best.logprob)
        every = Answering(tokenizer=tokenizer, lanes=1, limit=7, beam=Beam(width=3, best=3)).search(streams, [source])[0]
        facts, *texts = wide[-1].found
        assert [text.tolist() for text in texts] == [one.tokens for one in every]
        np.testing.assert_array_equal(facts, np.array([[one.ended, one.logprob, one.score] for one in every]).T)
        ((*_, scored),) = ask(engine, SourceRequest(source=source, target=SOURCES[2]))
        (loss,) = pair_losses(model.network(64, 1), tokenizer, [(source, SOURCES[2], "")])
        assert -scored.found[0].sum() == pytest.approx(loss, rel=1e-5)


@pytest.mark.parametrize("kind", ["tagger", "classifier"])
def test_labels_have_the_probabilities_of_the_model(start, models, kind):
    (end,) = ask(start(kind), SourceRequest(source=SOURCES[3]))[0]
    model, tokens = models[kind].network(30, 1), SOURCES[3][:, None]
    model.forward(
        Batch(tokens, np.full((1, 1) if kind == "classifier" else tokens.shape, IGNORE), np.array([30])),
        *np.zeros((2, 0, 1, 0), np.float32),
    )
    labels, probable = end.found
    expected = np.exp(log_probabilities(model.logits()))[:, 0]
    order = np.argsort(-expected, axis=1)[:, : labels.shape[1]]
    np.testing.assert_array_equal(labels, order)
    np.testing.assert_array_equal(probable, np.take_along_axis(expected, order, axis=1))
    assert labels.shape[1] == (3 if kind == "classifier" else 1)


def test_of_many_labels_the_likeliest_are_said_a_block_at_a_time(tmp_path, monkeypatch):
    """All of them would be more than a message between ranks may hold."""
    names = [f"L{number:04}" for number in range(5000)]
    monkeypatch.setattr(workers, "BLOCK", 20_000)
    for kind, rows, said in (("tagger", 500, 1), ("classifier", 1, workers.MOST_LABELS)):
        make_kind(tmp_path / kind, {"kind": kind}, labels=names)
        engine = make_engine(LoadedModel.open(tmp_path / kind), SimpleNamespace(**OPTIONS | {"max_source": 1000}), 1)
        sources = [RNG.integers(0, 11, 500), RNG.integers(0, 11, 3)]
        streams = [Stream(SourceRequest(source=source), print, print) for source in sources]
        ((_, long), (_, short)) = next(engine.worker.run(streams))
        logits = engine.worker.model.logits()
        best = np.argsort(-log_probabilities(logits)[:rows, 0], axis=1, kind="stable")[:, :said]
        np.testing.assert_array_equal(long.found[0], best)
        assert len(write_news([long])) < 100_000
        assert engine.worker.fits(streams[0].request, long.found)
        assert len(short.found[0]) == min(rows, 3)
        assert not engine.worker.fits(streams[0].request, (long.found[0] + 5000, long.found[1]))
        assert not engine.worker.fits(streams[0].request, (long.found[0][:, :0], long.found[1][:, :0]))


def test_what_waits_is_computed_together(start):
    engine, batches = start("tagger"), []
    run = engine.worker.run
    engine.worker.run = lambda streams: batches.append(len(streams)) or run(streams)
    inbox, held = Collected(), threading.Event()
    first = engine.submit(SourceRequest(source=SOURCES[0]), lambda news: held.wait(30))
    engine_is_held = time.monotonic() + 30
    while not first.ended and time.monotonic() < engine_is_held:
        time.sleep(0.01)
    streams = [engine.submit(SourceRequest(source=source), inbox) for source in SOURCES[4:]]
    held.set()
    inbox.whole(*streams)
    assert batches[0] == 1
    assert max(batches) >= 3
    assert sum(batches) == 1 + len(streams)


@pytest.mark.parametrize(
    ("kind", "request_"),
    [
        ("seq2seq", {"source": np.array([11 + 2])}),
        ("seq2seq", {"source": np.array([-1])}),
        ("seq2seq", {"source": SOURCES[0], "target": np.array([99])}),
        ("seq2seq", {"source": SOURCES[0], "beams": 9, "best": 1}),
        ("tagger", {"source": np.zeros(65, np.int64)}),
        ("tagger", {"source": FRAMES[0]}),
        ("ctc", {"source": SOURCES[0]}),
        ("ctc", {"source": np.zeros((3, 4), np.float32)}),
        ("ctc", {"source": np.full((3, 5), np.nan, np.float32)}),
    ],
)
def test_what_the_model_cannot_read_is_refused(start, kind, request_):
    with pytest.raises(ValueError, match=r"are|reads|has at most"):
        start(kind).submit(SourceRequest(**request_), print)


@pytest.mark.parametrize(
    "changes", [{"source": np.zeros(0, np.int64)}, {"max_tokens": 0}, {"beams": 2, "best": 3}, {"logprobs": 99}]
)
def test_requests_that_nobody_can_answer_are_refused(changes):
    with pytest.raises(ValueError, match=r"at least|at most"):
        SourceRequest(**{"source": SOURCES[0]} | changes)


def test_sources_that_wait_are_counted_and_bounded(start):
    engine, held = start("tagger", queue=1000), threading.Event()
    long = SourceRequest(source=np.zeros(64, np.int64))
    engine.submit(long, lambda news: held.wait(30))
    taken = []
    with pytest.raises(Full, match="sources of 2048 tokens or frames"):
        taken += [engine.submit(long, lambda news: None) for _ in range(WAITING + 2)]
    assert engine.load()["source_rows"] >= 64 * (WAITING - 1)
    held.set()


def test_what_is_cancelled_ends_and_a_stopped_engine_takes_nothing(start):
    engine, inbox = start("seq2seq"), Collected()
    engine.worker.never = [*engine.worker.never, engine.worker.end]  # it never ends by itself
    stream = engine.submit(SourceRequest(source=SOURCES[0], max_tokens=100_000), inbox)
    wide = engine.submit(SourceRequest(source=SOURCES[0], max_tokens=100_000, beams=2), inbox)
    inbox.wait(lambda: len(inbox.events.get(stream, [])) > 3)
    stream.cancel()
    wide.cancel()
    assert [inbox.whole(one)[0][-1].reason for one in (stream, wide)] == ["cancelled"] * 2
    engine.stop()
    with pytest.raises(Stopped):
        engine.submit(SourceRequest(source=SOURCES[0]), inbox)


def test_a_long_target_lets_others_have_their_turn_and_stays_the_same(start, monkeypatch):
    """Whatever is in between: targets that come as they are written, searches, and given ones."""
    engine, inbox = start("seq2seq"), Collected()
    long = [{"max_tokens": 3000}, {"max_tokens": 300, "beams": 3, "best": 2}, {"target": np.zeros(1500, np.int64)}]
    wanted = [SourceRequest(source=SOURCES[3], **how) for how in long]
    monkeypatch.setattr(engine.worker, "never", [*engine.worker.never, engine.worker.end])
    alone = [ask(engine, request)[0] for request in wanted]
    monkeypatch.setattr(source_engine, "TURN", 0.01)
    streams = [engine.submit(request, inbox) for request in wanted]
    inbox.wait(lambda: len(inbox.events.get(streams[0], [])) > 3)
    for source in SOURCES[:3]:
        inbox.whole(engine.submit(SourceRequest(source=source, max_tokens=2, beams=2), inbox))
    assert not streams[0].ended  # nobody has waited for its end
    gone = engine.submit(SourceRequest(source=SOURCES[0], max_tokens=100_000, beams=4), inbox)
    gone.cancel()
    assert all(map(same, inbox.whole(*streams), alone))
    assert inbox.whole(gone)[0][-1].reason == "cancelled"
    assert engine.load()["active"] == engine.load()["source_rows"] == 0


@pytest.mark.parametrize("kind", ["tagger", "classifier", "ctc"])
def test_a_source_whose_numbers_are_not_finite_ends_in_an_error_alone(start, monkeypatch, kind):
    """Of a batch of two, by what the model says of the first."""
    engine = start(kind)
    model, sources = engine.worker.model, FRAMES[4:6] if kind == "ctc" else SOURCES[4:6]
    if kind == "ctc":
        read = engine.worker._read
        monkeypatch.setattr(engine.worker, "_read", lambda *given: (read(*given), model.output.logits[:, 0].fill(np.nan)))
    else:
        logits = model.logits
        monkeypatch.setattr(model, "logits", lambda *some: np.where([[[True], [False]]], np.inf, logits(*some)))
    streams = [Stream(SourceRequest(source=source), print, print) for source in sources]
    (_, bad), (_, good) = next(engine.worker.run(streams))
    assert bad == Finished("error", "the model gave numbers that are not finite")
    assert (good.reason, good.message) == ("length", "")


def test_numbers_that_are_not_finite_end_in_an_error_and_the_next_is_answered(start, monkeypatch):
    engine = start("tagger")
    monkeypatch.setattr(engine.worker.model, "logits", lambda *_: np.full((1, 1, 3), np.nan))
    ((end,),) = ask(engine, SourceRequest(source=SOURCES[0]))
    assert end == Finished("error", "the model gave numbers that are not finite")
    monkeypatch.undo()
    assert ask(engine, SourceRequest(source=SOURCES[0]))[0][-1].reason == "length"
