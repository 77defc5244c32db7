"""Streams of tokens as they come: many at a time are gathered, and what is said of them stays the same to the byte."""

import asyncio
import json
import time

import h11
import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
from helpers.asking import LIMIT, answered, served
from helpers.model_folders import make
from helpers.numerics import Bundled, build, configured

from dllm.data.tokenizers import CharTokenizer
from dllm.engines.requests import Finished, Request, Token
from dllm.engines.streams import LONGEST_PAUSE, LocalStreams
from dllm.engines.text_engine import TextEngine
from dllm.serving.connection import Requests
from dllm.serving.openai import Answer, choice_body, encode
from dllm.serving.streamed_text import Detokenizer

PROMPT = np.array([5, 3, 9])


@pytest.fixture(scope="module")
def engine():
    engine = TextEngine(Bundled(build(configured(hidden=18, embedding=7), dtype=np.float32, training=False)), slots=16)
    engine.start()
    yield engine
    engine.stop()


@pytest.fixture(scope="module")
def asked(tmp_path_factory):
    folder = tmp_path_factory.mktemp("streams") / "model"
    make(folder, tokenizer=CharTokenizer([*"abcdefghi\n", "\u20ac"]))
    with served(folder, slots=16) as asked:
        yield asked


class Taken:
    """A Sink: the events of each put of each stream, and when it came."""

    def __init__(self, count):
        self.cancels, self.puts, self.times = [], [[] for _ in range(count)], [[] for _ in range(count)]
        self.over = asyncio.Event()

    def put(self, index, *events):
        self.puts[index].append(events)
        self.times[index].append(time.monotonic())
        if all(puts and isinstance(puts[-1][-1], Finished) for puts in self.puts):
            self.over.set()

    def tokens(self, index):
        return [event.number for events in self.puts[index] for event in events if isinstance(event, Token)]


def take(engine, requests, cancel_behind=None):
    """What comes of requests at once; cancel_behind: of the first, until it has so many puts."""

    async def work():
        streams, taken = LocalStreams(engine, asyncio.get_running_loop()), Taken(len(requests))
        for index, request in enumerate(requests):
            streams.submit(request, taken, index)
        while cancel_behind and len(taken.puts[0]) < cancel_behind:
            await asyncio.sleep(0.001)
        if cancel_behind:
            taken.cancels[0]()
        await taken.over.wait()
        return taken

    return asyncio.run(asyncio.wait_for(work(), LIMIT))


def requests(count, tokens):
    return [Request(prompt=PROMPT[:1], max_tokens=tokens, seed=seed) for seed in range(count)]


def test_a_stream_that_is_alone_gets_each_token_at_once(engine):
    (puts,) = take(engine, requests(1, 200)).puts
    assert [len(events) for events in puts] == [1] * 199 + [2]
    assert puts[-1][-1] == Finished("length")


def test_tokens_of_many_streams_are_gathered_but_for_the_first_and_are_those_of_each_alone(engine):
    taken = take(engine, requests(16, 3000))
    begin, end = max(times[0] for times in taken.times), min(times[-1] for times in taken.times)  # while all are under way
    most = 3 + (end - begin) / LONGEST_PAUSE
    for index, (puts, times) in enumerate(zip(taken.puts, taken.times, strict=True)):
        assert len(puts[0]) == 1
        assert len(taken.tokens(index)) == 3000
        assert sum(begin < one < end for one in times) <= most < 1000
    for index in (0, 7, 15):
        assert taken.tokens(index) == take(engine, [requests(16, 3000)[index]]).tokens(0)


def test_a_stream_that_is_cancelled_has_all_that_came_before_and_ends_while_others_are_held(engine):
    taken = take(engine, [Request(prompt=PROMPT, max_tokens=10**6, seed=0), *requests(16, 2000)[1:]], cancel_behind=3)
    whole = take(engine, [Request(prompt=PROMPT, max_tokens=len(taken.tokens(0)), seed=0)])
    assert taken.tokens(0) == whole.tokens(0)
    assert taken.puts[0][-1][-1].reason == "cancelled"
    assert all(len(taken.tokens(index)) == 2000 for index in range(1, 16))


def test_many_texts_that_are_streamed_at_once_are_the_whole_ones(asked):
    bodies = [
        {"prompt": "ab", "seed": seed, "max_tokens": 300, **more}
        for seed in range(4)
        for more in ({}, {"stop": ["cd", "\u20aca"]}, {"logprobs": 2, "n": 2}, {"echo": True, "stop": "ef"})
    ]
    streams = asked.together(*(("/v1/completions", {**body, "stream": True}) for body in bodies))
    for body, stream in zip(bodies, streams, strict=True):
        whole = answered(asked("/v1/completions", body))["choices"]
        found = [{"text": ""} for _ in whole]
        lines = [line for line in stream.text.split("\n") if line]
        assert lines.pop() == "data: [DONE]"
        for line in lines:
            (choice,) = json.loads(line.removeprefix("data: "))["choices"]
            one = found[choice["index"]]
            one["text"] += choice["text"]
            one["finish_reason"] = choice["finish_reason"]
            for name, values in (choice["logprobs"] or {}).items():
                one[name] = one.get(name, []) + values
        for one, choice in zip(found, whole, strict=True):
            assert (one["text"], one["finish_reason"]) == (choice["text"], choice["finish_reason"])
            assert (choice["logprobs"] is None) == ("logprobs" not in body)
            for name, values in (choice["logprobs"] or {}).items():
                assert one[name] == values


@hypothesis.given(st.text(), st.text(), st.integers(0, 127), st.sampled_from([None, "stop", "length"]), st.booleans())
def test_an_event_is_the_body_with_its_choice(model, text, index, reason, usage):
    answer, more = Answer(model, 3), {"usage": None} if usage else {}
    event = answer.events(more)
    for logprobs in (None, {"tokens": [text], "token_logprobs": [-1e-7], "top_logprobs": [{text: -1.0}], "text_offset": [0]}):
        choice = choice_body(index, text, logprobs, reason)
        assert event(choice) == f"data: {encode(answer.body([choice]) | more)}\n\n"


@hypothesis.given(st.lists(st.tuples(st.binary(max_size=5), st.booleans()), max_size=8))
def test_text_is_the_same_whether_its_places_are_wanted_or_not(pieces):
    """pieces : of bytes, and whether the text is taken behind them"""
    spell = lambda number, behind: (pieces[number][0], False)
    plain, placed = (Detokenizer(spell, places=places) for places in (False, True))
    for number, (_, taken) in enumerate(pieces):
        assert plain.add(Token(number, -1.0, [])) == placed.add(Token(number, -1.0, [])) is False
        if taken:
            assert plain.flush() == (placed.flush()[0], [])
    assert plain.flush(final=True)[0] == placed.flush(final=True)[0]


REQUESTS = b"GET / HTTP/1.1\r\nHost: a\r\n\r\n", b"GET / HTTP/1.0\r\n\r\n", b"HEAD / HTTP/1.1\r\nHost: a\r\n\r\n"


@pytest.mark.parametrize("length", [None, 300_000])
@pytest.mark.parametrize("request_head", REQUESTS)
def test_chunks_are_written_as_h11_writes_them(request_head, length):
    ours, theirs = Requests(h11.SERVER), h11.Connection(h11.SERVER)
    headers = [("content-type", "text/event-stream")] + ([("content-length", str(length))] if length else [])
    pieces = [b"", b"a", bytes(range(256)), b"x" * (300_000 - 257)]
    data = pieces if not request_head.startswith(b"HEAD") else [b""] * 4
    events = [h11.Response(status_code=200, headers=headers), *(h11.Data(data=one) for one in data), h11.EndOfMessage()]
    for connection in (ours, theirs):
        connection.receive_data(request_head)
        assert isinstance(connection.next_event(), h11.Request)
        assert isinstance(connection.next_event(), h11.EndOfMessage)
    for event in events:
        assert ours.send(event) == theirs.send(event)
    for connection in (ours, theirs):
        with pytest.raises(h11.LocalProtocolError):
            connection.send(h11.Data(data=b"more"))
