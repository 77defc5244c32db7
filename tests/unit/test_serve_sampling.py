"""Biases, bans, penalties and the best of several texts over HTTP, against the same drawn without a server."""

import dataclasses
import re

import numpy as np
import pytest
from helpers.asking import answered, refusal, served
from helpers.model_folders import make, make_kind

from dllm.data.tokenizers import WordTokenizer
from dllm.inference.generation import Sampling, continuation, draw_best, never_drawn, sample
from dllm.kernels.sample import Choice
from dllm.model.decoder import Decoder

WORDS = WordTokenizer(["<unk>", "<eos>", *"abcdefghi"])
UNKNOWN, LONG = 0, 60


@pytest.fixture(scope="module")
def asked(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sampling") / "model"
    make(folder, tokenizer=WORDS)
    with served(folder) as asked:
        yield asked


@pytest.fixture(scope="module")
def targets(tmp_path_factory):
    folder = tmp_path_factory.mktemp("targets") / "model"
    make_kind(folder, {"kind": "seq2seq", "bidirectional": True})
    with served(folder) as asked:
        yield asked


def tokens_of(asked, prompt="a b", **body):
    told = asked.choices(prompt, logprobs=0, max_tokens=LONG, **body)[0]["logprobs"]["tokens"]
    return WORDS.encode("".join(told).encode(), False).tolist()


def drawn(asked, prompt="a b", **wants):
    """The same by a plain loop."""
    sampling = Sampling(**{"temperature": 1.0} | wants)
    sampling = dataclasses.replace(sampling, banned=never_drawn(WORDS, sampling.logit_bias))
    tokens = WORDS.encode(prompt.encode(), False)
    return [*sample(Decoder(asked.model.model(16), 1), tokens, LONG, sampling)]


WANTS = {
    "nothing": {}, "presence": {"presence_penalty": 1.5}, "frequency": {"frequency_penalty": -0.7, "temperature": 0.5},
    "repetition": {"repetition_penalty": 1.4, "temperature": 0.0}, "min_p": {"min_p": 0.3},
    "bias": {"logit_bias": ((3, 4.5), (5, -100.0))},
    "all": {
        "repetition_penalty": 0.8, "presence_penalty": 0.3, "frequency_penalty": 0.2, "min_p": 0.05,
        "logit_bias": ((1, -3.0),), "top_k": 7, "top_p": 0.95,
    },
}  # fmt: skip


@pytest.mark.parametrize("wants", WANTS.values(), ids=WANTS)
def test_a_server_draws_what_generate_draws(asked, wants):
    body = wants | {"logit_bias": {str(token): value for token, value in wants.get("logit_bias", ())}}
    assert tokens_of(asked, seed=9, **body) == drawn(asked, seed=9, **wants)


def test_what_the_vocabulary_lacks_is_not_said_unless_its_token_is_named(asked):
    for seed in range(5):
        assert UNKNOWN not in tokens_of(asked, seed=seed)
    plain = [token for seed in range(5) for token in tokens_of(asked, seed=seed, logit_bias={"0": 0})]
    assert UNKNOWN in plain
    assert set(tokens_of(asked, logit_bias={"0": 100})) == {UNKNOWN}
    assert [*continuation(asked.model, np.array([2]), 20, Sampling(logit_bias=((0, 100.0),)))] == [UNKNOWN] * 20
    assert UNKNOWN not in [*continuation(asked.model, np.array([2]), 200, Sampling())]


def test_a_greedy_loop_is_broken_and_a_bias_chooses_alone(asked):
    loop = tokens_of(asked, temperature=0)
    other = tokens_of(asked, temperature=0, frequency_penalty=2)
    assert len(set(other)) > len(set(loop))
    assert max(np.bincount(other)) < max(np.bincount(loop))
    assert set(tokens_of(asked, logit_bias={"7": 100})) == {7}
    assert 7 not in tokens_of(asked, logit_bias={"7": -100}, seed=3)


def test_log_probabilities_are_the_models_own_whatever_is_drawn(asked):
    (choice,) = asked.choices("a", max_tokens=8, logprobs=3, logit_bias={"4": 100}, repetition_penalty=1.1, echo=True)
    told = choice["logprobs"]
    score = answered(asked("/v1/score", {"text": choice["text"]}))
    np.testing.assert_allclose(told["token_logprobs"][1:], score["token_logprobs"][1:], atol=1e-5)
    for token, value, top in list(zip(told["tokens"], told["token_logprobs"], told["top_logprobs"], strict=True))[1:]:
        assert top[token] == value
        assert 3 <= len(top) <= 4


def test_the_best_of_some_texts_is_that_with_the_best_mean(asked):
    body = {"max_tokens": 12, "seed": 20, "logprobs": 0}
    all_of_them = asked.choices("a b", n=6, **body)
    means = [np.mean(choice["logprobs"]["token_logprobs"]) for choice in all_of_them]
    order = np.argsort(means, kind="stable")[::-1]
    answer = answered(asked("/v1/completions", {"prompt": ["a b", "c"], "n": 2, "best_of": 6, **body}))
    assert [choice["text"] for choice in answer["choices"][:2]] == [all_of_them[at]["text"] for at in order[:2]]
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2, 3]
    assert answer["usage"] == {"prompt_tokens": 3, "completion_tokens": 144, "total_tokens": 147}
    sampling = Sampling(temperature=1.0, seed=20, best_of=6, banned=(UNKNOWN,))
    found = draw_best(Decoder(asked.model.model(16), 6), WORDS.encode(b"a b", False), 12, sampling, None)
    assert WORDS.spell_all(found, True)[0].decode() == answer["choices"][0]["text"]


def test_an_end_counts_in_the_mean_and_ends_a_text_alone(tmp_path):
    tokenizer = WordTokenizer(["<unk>", *"abcdefgh"])
    tokenizer.pairs = True
    make(tmp_path / "pairs", tokenizer=tokenizer)
    with served(tmp_path / "pairs") as asked:
        decoder = Decoder(asked.model.model(16), 5)
        prompt = asked.model.tokenizer.encode(b"a b", False)
        prompt = np.array([tokenizer.end, *prompt, tokenizer.sep])
        sampling = Sampling(temperature=1.0, seed=3, best_of=5, banned=never_drawn(tokenizer))
        texts, means = [], []
        for seed in range(3, 8):
            text = [*sample(Decoder(asked.model.model(16), 1), prompt, 30, dataclasses.replace(sampling, seed=seed))]
            text = text[: text.index(tokenizer.end) + 1] if tokenizer.end in text else text
            choice, slot = Choice(1), np.zeros(1, np.int64)
            decoder.states[:1] = 0
            decoder.read_texts([prompt[:-1]], slot)
            total = 0.0
            for before, token in zip([prompt[-1], *text], text, strict=False):
                decoder.read(np.array([[before]]), slot)
                choice.given[:] = token
                decoder.choose(choice, slot)
                total += choice.logprob[0]
            texts.append(text)
            means.append(total / len(text))
        best = texts[int(np.argmax(means))]
        assert draw_best(decoder, prompt, 30, sampling, tokenizer.end) == best
        shown = tokenizer.spell_all([token for token in best if token != tokenizer.end])[0].decode()
        assert asked.text("a b", seed=3, best_of=5, max_tokens=30) == shown
        assert len({len(text) for text in texts}) > 1


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ({"logit_bias": {"11": 1}}, "logit_bias maps token numbers from 0 to 10, as strings, to numbers from -100 to 100"),
        ({"best_of": 2, "stream": True}, "stream goes with best_of = n"),
        ({"best_of": 64, "max_tokens": 4096}, "best_of x tokens x .* are 262144"),
        ({"length_penalty": 0.5}, "length_penalty is not supported: leave it, or give 1"),
        ({"truncate_prompt_tokens": 5}, "truncate_prompt_tokens is not supported: leave it, or give null"),
    ],
)
def test_what_cannot_be_drawn_is_refused_in_one_line(asked, body, says):
    assert re.search(says, refusal(asked("/v1/completions", {"prompt": "a", **body})))


@pytest.mark.parametrize("field", ["min_p", "logit_bias", "presence_penalty", "frequency_penalty", "repetition_penalty"])
def test_targets_are_searched_for_and_take_neutral_values_alone(targets, field):
    neutral, other = {"logit_bias": ({}, {"1": 1})}.get(field, (1 if field == "repetition_penalty" else 0, 0.5))
    assert targets.text("ab", **{field: neutral}) == targets.text("ab")
    assert "targets are searched for" in refusal(targets("/v1/completions", {"prompt": "ab", field: other}))
