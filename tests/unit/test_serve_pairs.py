"""A language model of pairs over HTTP: targets are scored behind their sources, with their ends; the frame is not shown."""

import json
import re

import numpy as np
import pytest
from helpers.asking import answered, refusal, served
from helpers.model_folders import make
from helpers.numerics import reference

from dllm.data.tokenizers import CharTokenizer

LETTERS = CharTokenizer(list("abcdefghi"))
LETTERS.pairs = True
SEP, END = LETTERS.sep, LETTERS.end


@pytest.fixture(scope="module")
def asked(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pairs") / "model"
    make(folder, tokenizer=LETTERS)
    with served(folder) as asked:
        yield asked


def expected(asked, tokens, first):
    """log P of tokens[first:], each behind those before it, by the equations."""
    logits = reference(asked.model.model(1), np.array(tokens[:-1])[:, None])[0][:, 0]
    logp = logits - np.log(np.exp(logits - logits.max(1, keepdims=True)).sum(1, keepdims=True)) - logits.max(1, keepdims=True)
    return [logp[at - 1, tokens[at]] for at in range(first, len(tokens))]


def test_a_target_is_scored_behind_its_source_with_its_end(asked):
    for target in ("bca", ""):
        said = [*LETTERS.encode(target.encode(), False).tolist(), END]
        score = answered(asked("/v1/score", {"source": "abc", "target": target}))
        values = expected(asked, [END, 0, 1, 2, SEP, *said], 5)
        np.testing.assert_allclose(score["token_logprobs"], values, atol=1e-5)
        assert score["logprob"] == pytest.approx(sum(values), abs=1e-4)
        assert score["loss"] == pytest.approx(-np.mean(values), abs=1e-5)
        assert score["token_ids"] == said
        assert score["tokens"] == [*target, "\n"]
    tokens = [END, 0, SEP, 1, END]
    assert answered(asked("/v1/score", {"tokens": tokens}))["token_logprobs"][1:] == pytest.approx(
        expected(asked, tokens, 1), abs=1e-5
    )


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ({"text": "abc"}, "^source must be there, a string: model was trained on pairs, so it says how probable a target is"),
        ({"source": "abc"}, "^target must be there, a string: model was trained on pairs"),
        ({"source": "abc", "target": 5}, "^target must be there, a string"),
        ({"source": "", "target": "a"}, "^source is empty"),
        ({"source": "a", "target": "a", "text": "b"}, "^unknown parameter 'text'"),
        ({"source": "Z", "target": "a"}, "'Z' is not in the vocabulary"),
        ({"source": "a", "target": "b" * 5000}, "^source and target have 5004 tokens; 5003 are allowed"),
    ],
)
def test_a_score_that_says_nothing_is_refused_with_the_reason(asked, body, says):
    assert re.search(says, refusal(asked("/v1/score", body, prompt=5003)))


def test_an_echo_shows_what_was_written_and_not_the_frame(asked):
    plain = asked.choices("abc", max_tokens=9, seed=4)[0]["text"]
    for more in ({}, {"logprobs": 1}):
        body = {"max_tokens": 9, "seed": 4, "echo": True} | more
        (choice,) = asked.choices("abc", **body)
        assert choice["text"] == "abc" + plain == asked.streamed("abc", **body)
    told = choice["logprobs"]
    assert "".join(told["tokens"]) == choice["text"]
    assert told["token_logprobs"][0] is not None  # behind the frame
    values = expected(asked, [END, 0, 1, 2], 1)
    np.testing.assert_allclose(told["token_logprobs"][:3], values, atol=1e-5)
    assert answered(asked("/v1/completions", {"prompt": "abc", "max_tokens": 1}))["usage"]["prompt_tokens"] == 3
    shown = asked.choices([END, 0, SEP], max_tokens=1, echo=True)[0]["text"]
    assert shown.startswith("\na\t")  # which the client has written itself


def test_no_target_holds_what_stands_between_a_source_and_a_target(asked):
    for seed in range(8):
        assert "\t" not in asked.choices("ab", max_tokens=60, seed=seed)[0]["text"]
    named = asked.choices("ab", max_tokens=5, logit_bias={str(SEP): 100})[0]["text"]
    assert named == "\t" * 5


def test_the_description_is_that_of_pairs(asked):
    description = answered(asked("/openapi.json"))
    schemas = description["components"]["schemas"]
    assert set(re.findall(r"#/components/schemas/(\w+)", json.dumps(description))) == set(schemas)
    forms = schemas["PairScoreRequest"]["oneOf"]
    assert [form["required"] for form in forms] == [["source", "target"], ["tokens"]]


def test_tokens_of_a_source_are_framed_as_a_completion_reads_them(asked):
    framed = answered(asked("/tokenize", {"prompt": "abc"}))
    assert framed["tokens"] == [END, 0, 1, 2, SEP]
    bare = answered(asked("/tokenize", {"prompt": "abc", "add_special_tokens": False, "return_token_strs": True}))
    assert (bare["tokens"], bare["count"], bare["token_strs"]) == ([0, 1, 2], 3, ["a", "b", "c"])
    assert asked.text(framed["tokens"], seed=2) == asked.text("abc", seed=2)
    info = answered(asked("/tokenizer_info"))
    assert (info["bos_token"], info["eos_token"], info["vocab_size"]) == (None, None, 11)
