"""Beam search against all texts there are, and sampling against the model's own probabilities."""

import functools
import itertools

import numpy as np
import pytest
from helpers.numerics import V, build, configured, reference

from dllm.data.tokenizers import ByteTokenizer
from dllm.errors import UserError
from dllm.inference.generation import DecoderStreams, Sampling, sample
from dllm.inference.search import Beam, search
from dllm.kernels.sample import probabilities_reference
from dllm.model.decoder import Decoder

CONFIG = configured(hidden=18)


@pytest.fixture(scope="module")
def model():
    return build(CONFIG, lanes=1, training=False)


def next_logits(model, text):
    return reference(model, np.array(text)[:, None])[0][-1, 0]


def log_probabilities(model, text):
    logits = next_logits(model, text)
    return logits - logits.max() - np.log(np.exp(logits - logits.max()).sum())


def searched(decoder, prompt, tokens, width, end=None):
    """The best continuation of a prompt."""
    ((best,),) = search(DecoderStreams(decoder, ByteTokenizer()), [np.array(prompt)], tokens, Beam(width=width), end)
    return best


@pytest.mark.parametrize("end", [None, 4])
def test_a_beam_wide_enough_finds_the_best_of_all_texts(model, end):
    prompt, tokens = [3, 1, 4, 1, 5, 9, 2], 3
    cut = lambda text: text[: text.index(end) + 1] if end in text else text
    texts = {cut(text) for text in itertools.product(range(V), repeat=tokens) if end is None or end in text}
    after = functools.cache(lambda text: log_probabilities(model, [*prompt, *text]))
    total = lambda text: sum(after(text[:at])[token] for at, token in enumerate(text))
    best = max(texts, key=lambda text: total(text) / ((5 + len(text)) / 6))
    width = V ** (tokens - 1)
    found = searched(Decoder(model, width), prompt, tokens, width, end)
    assert (*found.tokens, *[end] * found.ended) == best
    assert found.logprob == pytest.approx(total(best), abs=1e-5)


def test_one_beam_takes_the_most_likely_token_each_time_and_more_find_no_worse(model):
    prompt = np.array([2, 7])
    decoder = Decoder(model, 20)
    one = searched(decoder, prompt, 8, 1)
    assert one.tokens == list(sample(decoder, prompt, 8, Sampling(temperature=0)))
    for width in (4, 11, 20):
        found = searched(decoder, prompt, 8, width)
        assert len(found.tokens) == 8
        parts = [log_probabilities(model, [*prompt, *found.tokens[:at]])[token] for at, token in enumerate(found.tokens)]
        assert found.logprob == pytest.approx(sum(parts), abs=1e-5)
        assert found.logprob >= one.logprob - 1e-9


def test_samples_come_as_often_as_the_model_says(model):
    prompt, wants = np.arange(9), {"temperature": 0.7, "top_k": 8, "top_p": 0.9}
    count = 3000
    decoder = Decoder(model, 1)
    first = [next(sample(decoder, prompt, 1, Sampling(seed=seed, **wants))) for seed in range(count)]
    p = probabilities_reference(next_logits(model, prompt), **wants)
    expected, observed = count * p, np.bincount(first, minlength=V)
    assert not observed[p == 0].any()
    assert ((observed - expected)[p > 0] ** 2 / expected[p > 0]).sum() < 40  # 7 degrees of freedom


def test_a_model_that_is_not_finite_is_refused():
    broken = build(CONFIG, lanes=1, training=False)
    broken.theta[:] = np.nan
    decoder = Decoder(broken, 2)
    for find in (
        lambda: list(sample(decoder, [1], 2, Sampling())),
        lambda: searched(decoder, [1], 2, 2),
        lambda: searched(decoder, [1], 2, 1),
    ):
        with pytest.raises(UserError, match="not finite"):
            find()
