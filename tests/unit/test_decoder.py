"""dllm/decoder.py against LanguageModel, and against itself: one stream or many, windows or single tokens, any threads."""

import numpy as np
import pytest
from helpers.numerics import DTYPES, EVERY_KIND, KINDS, V, build, configured, reference

from dllm.kernels.int8 import HOW
from dllm.kernels.processor import BF16
from dllm.kernels.sample import Choice
from dllm.kernels.team import Team
from dllm.model.decoder import Decoder

T, B = 8, 5
SLOTS = np.array([3, 1, 8, 0, 5])
LAST = np.arange(B) + (T - 1) * B


def made(kind, hidden, dtype):
    wide = {"embedding": hidden} if KINDS[kind].get("tied") else {}
    config = configured(kind, hidden=hidden, **wide)
    return config, build(config, lanes=B, window=T, dtype=dtype, training=False)


def told(decoder, wants, rows=None):
    """The log-probabilities of all tokens, from the largest."""
    choice = Choice(9, V)
    choice.wanted[:] = V
    decoder.choose(choice, wants, rows)
    return choice.tokens[wants], choice.logprobs[wants]


@DTYPES
@EVERY_KIND
@pytest.mark.parametrize("hidden", [6, 16, 33])
def test_states_and_probabilities_are_those_of_the_model(kind, hidden, dtype):
    config, model = made(kind, hidden, dtype)
    tokens = np.random.default_rng(1).integers(0, V, (T, B))
    logits, h, c = reference(model, tokens)
    logits = logits[-1]
    decoder = Decoder(model, 9)
    decoder.read(tokens, SLOTS)
    found = decoder.states[SLOTS].reshape(B, config.layers, 2, -1)[..., :hidden].transpose(2, 1, 0, 3)
    np.testing.assert_allclose(found, [h, c], atol=1e-6)
    np.testing.assert_allclose(decoder.top(8), h[-1, 2], atol=1e-6)
    numbers, logprobs = told(decoder, SLOTS)
    logits -= logits.max(axis=1, keepdims=True)
    logits -= np.log(np.exp(logits).sum(axis=1, keepdims=True))
    np.testing.assert_allclose(logprobs, np.take_along_axis(logits, numbers, axis=1), atol=1e-5)
    for same in zip(told(decoder, SLOTS, LAST), (numbers, logprobs), strict=True):
        np.testing.assert_array_equal(*same)


@EVERY_KIND
@pytest.mark.parametrize("hidden", [6, 33])
@pytest.mark.parametrize("precision", ["fp32", "fp64", *["bf16"] * bool(BF16), *["int8"] * bool(HOW)])
def test_a_stream_is_the_same_to_the_bit_alone_token_by_token_and_by_two_threads(kind, hidden, precision):
    _, model = made(kind, hidden, np.float64 if precision == "fp64" else np.float32)
    tokens = np.random.default_rng(2).integers(0, V, (T, B))
    lengths = np.array([8, 3, 5, 1, 8])
    decoder = Decoder(model, 9, precision)
    decoder.read(tokens, SLOTS, lengths)
    expected = told(decoder, SLOTS, (lengths - 1) * B + np.arange(B))
    for threads in (1, 2):
        model.operands.team = Team(threads)
        other = Decoder(model, 2, precision)
        for n in range(B):
            other.states[1] = 0
            for t in range(lengths[n]):
                other.read(tokens[t : t + 1, n : n + 1].copy(), np.array([1]))
            np.testing.assert_array_equal(other.states[1], decoder.states[SLOTS[n]])
            for same, whole in zip(told(other, SLOTS[n : n + 1]), expected, strict=True):
                np.testing.assert_array_equal(same[0], whole[n])
