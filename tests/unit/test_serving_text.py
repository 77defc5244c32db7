"""Text from tokens in pieces against the same done at once; requests that must be refused."""

import hypothesis
import hypothesis.strategies as st
import pytest

from dllm.data.tokenizers import ByteTokenizer
from dllm.engines.errors import Refused
from dllm.engines.requests import Token
from dllm.serving.fields import read_json
from dllm.serving.openai import Completion
from dllm.serving.streamed_text import Detokenizer, Vocabulary

BYTES = ByteTokenizer()
TEXTS = st.text(alphabet="ab\u00e9\u20ac\U0001f600", max_size=12)


def run(data, stops, prompt=b""):
    """(text, [(start, byte)], whether a stop string came) by Detokenizer, a byte a token, taken after each."""
    text, shown, pieces = Detokenizer(BYTES.spell, stops), "", []
    for place, number in enumerate(prompt + data):
        ended = text.add(Token(number, -1.0, [], place < len(prompt)))
        new, more = text.flush(final=place + 1 == len(prompt + data) and not ended)
        shown, pieces = shown + new, pieces + more
        if ended:
            break
    return shown, [(piece.start, piece.token.number) for piece in pieces], text.ended


@hypothesis.given(TEXTS, st.lists(TEXTS.filter(len), max_size=4), TEXTS)
def test_text_ends_before_the_stop_string_that_is_complete_first(written, stops, prompt):
    """Plainly: after each character, look for every stop string behind the prompt."""
    ends = [
        (end, start)
        for end in range(1, len(written) + 1)
        for stop in stops
        if (start := written[:end].find(stop)) >= 0 and start + len(stop) <= end
    ]
    stop_at = min(start for end, start in ends if end == min(ends)[0]) if ends else None
    shown, pieces, ended = run(written.encode(), stops, prompt.encode())
    assert ended == (stop_at is not None)
    assert shown == prompt + written[:stop_at]
    assert bytes(number for _, number in pieces) == shown.encode()


@hypothesis.given(st.binary(max_size=20))
def test_any_bytes_become_the_text_that_they_are_at_once(data):
    shown, pieces, _ = run(data, ())
    assert shown == data.decode(errors="replace")
    assert bytes(number for _, number in pieces) == data


def test_offsets_say_where_in_the_text_a_token_begins():
    shown, pieces, _ = run("a\u20acb".encode(), ())
    assert [start for start, _ in pieces] == [0, 1, 1, 1, 2]
    assert shown[2:] == "b"


def test_what_may_become_a_stop_string_is_held_back_until_it_does_not():
    text = Detokenizer(BYTES.spell, ["abc"])
    taken = [(text.add(Token(byte, -1.0, [])), text.flush()[0])[1] for byte in b"xababd"]
    assert taken == ["x", "", "", "ab", "", "abd"]


def test_bytes_that_are_no_characters_have_a_name():
    vocabulary = Vocabulary(BYTES)
    assert vocabulary.name(0x61, False) == "a"
    assert vocabulary.name(0xE2, False) == "bytes:\\xe2"


def read(**body):
    return Completion.read({"prompt": "x", **body}, "model", 256, 100)


@pytest.mark.parametrize(
    "body",
    [
        {"prompt": None}, {"prompt": []}, {"prompt": [256]}, {"prompt": [-1]}, {"prompt": [True]}, {"prompt": [[]]},
        {"prompt": 3}, {"prompt": ["a"] * 65}, {"prompt": "\ud800"}, {"prompt": ["a", 1]}, {"prompt": {"a": 1}},
        {"max_tokens": 101}, {"max_tokens": -1}, {"max_tokens": 1.5}, {"max_tokens": "1"}, {"max_tokens": True},
        {"max_tokens": 1e999}, {"temperature": -0.1}, {"temperature": 2.1}, {"temperature": 1e999}, {"temperature": [1]},
        {"top_p": 1.1}, {"n": 0}, {"n": 65}, {"n": 2, "prompt": ["a"] * 33}, {"seed": -1},
        {"seed": 1 << 63}, {"logprobs": 21}, {"stop": ""}, {"stop": ["a"] * 17}, {"stop": [1]}, {"stop": "a" * 257},
        {"echo": 1}, {"stream": "yes"}, {"stream_options": {}}, {"stream": True, "stream_options": {"other": 1}},
        {"suffix": "x"}, {"logit_bias": {"256": 2}}, {"logit_bias": {"-1": 2}}, {"logit_bias": {"a": 2}},
        {"logit_bias": {"1": 101}}, {"logit_bias": {"1": True}}, {"logit_bias": {"1": "2"}}, {"logit_bias": [1]},
        {"logit_bias": {"\u0663": 1}},
        {"logit_bias": dict.fromkeys(map(str, range(301)), 1)}, {"presence_penalty": 2.1}, {"frequency_penalty": "1"},
        {"repetition_penalty": 0}, {"repetition_penalty": 11}, {"min_p": 1.1}, {"top_k": -2}, {"n": 2, "best_of": 1},
        {"best_of": 2, "stream": True}, {"best_of": 33, "prompt": ["a", "b"]}, {"use_beam_search": True}, {"length_penalty": 2},
        {"ignore_eos": 0}, {"min_tokens": False}, {"stop_token_ids": [1]}, {"response_format": {"type": "json_object"}},
        {"unknown": None}, {"model": 3}, {"model": "other"},
    ],
)  # fmt: skip
def test_what_cannot_be_done_is_refused(body):
    with pytest.raises(Refused) as refused:
        read(**body)
    error = refused.value.body()["error"]
    assert refused.value.status in (400, 404)
    assert error["type"] == "invalid_request_error"
    assert error["message"]


def test_what_asks_for_nothing_is_let_through():
    wanted = read(
        suffix="", logit_bias={}, presence_penalty=0.0, frequency_penalty=None, user="me", best_of=2, n=2, stop=None, min_p=0,
        repetition_penalty=1, top_k=-1, use_beam_search=False, length_penalty=1.0, skip_special_tokens=True, stop_token_ids=[],
        ignore_eos=False, min_tokens=0, response_format={"type": "text"},
    )  # fmt: skip
    assert (wanted.top_k, read(top_k=1000).top_k) == (0, 256)
    assert (wanted.n, wanted.stop, wanted.max_tokens) == (2, (), 16)
    assert 0 <= wanted.seed < 1 << 53


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{",
        b"[1]",
        b'"a"',
        b'{"a": NaN}',
        b'{"a": -Infinity}',
        b'{"a": "\xff"}',
        b"[" * 100_000,
        b'{"a": ' + b"1" * 5000 + b"}",
    ],
)
def test_a_body_that_is_no_json_object_is_refused(data):
    with pytest.raises(Refused):
        read_json(data)
