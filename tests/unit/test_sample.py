"""kernels/sample.py against exact probabilities: what is drawn, how often, with which log-probability, from any row."""

import numpy as np
import pytest
from helpers.numerics import DTYPES, in_panels
from hypothesis import given, settings
from hypothesis import strategies as st

from dllm.kernels.dropout import philox_reference
from dllm.kernels.sample import BAD, Choice, Scratch, draw, probabilities_reference, uniform
from dllm.kernels.team import Team


def drawn(logits, b=None, dtype=np.float32, team=None, most=0, **wants):
    """A Choice of logits (N,V), with its fields as `wants` says."""
    N, V = logits.shape
    z = in_panels(logits.astype(dtype))
    z.transpose(1, 0, 2).reshape(N, -1)[:, V:] = 0
    choice, team = Choice(N, most), team or Team()
    choice.position[:] = np.arange(N)
    for name, value in wants.items():
        getattr(choice, name)[:] = value
    draw(choice, np.arange(N), z, np.zeros(V, dtype) if b is None else b, Scratch(V, team.size), team)
    return choice


def log_softmax(logits):
    shifted = logits - logits.max(axis=1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))


WANTS = {
    "plain": {},
    "warm": {"temperature": 1.7},
    "cold": {"temperature": 0.3},
    "top-k": {"top_k": 7},
    "top-p": {"top_p": 0.6},
    "all": {"temperature": 0.8, "top_k": 12, "top_p": 0.85},
}


@DTYPES
@pytest.mark.parametrize("wants", WANTS.values(), ids=WANTS)
@pytest.mark.parametrize("V", [9, 50, 3000])
def test_tokens_are_drawn_as_often_as_their_probabilities_say(wants, V, dtype):
    rng = np.random.default_rng(V)
    logits = rng.standard_normal(V).astype(np.float32) * 3
    N = 20_000 if V < 1000 else 4000
    found = drawn(np.broadcast_to(logits, (N, V)), dtype=dtype, seed=5, **wants)
    p = probabilities_reference(logits, **wants)
    counts = np.bincount(found.token, minlength=V)
    assert not counts[p == 0].any()
    likely = N * p >= 10
    observed, expected = np.append(counts[likely], counts[~likely].sum()), np.append(N * p[likely], N * p[~likely].sum())
    squares = ((observed - expected) ** 2 / np.maximum(expected, 1)).sum()
    freedom = likely.sum()
    assert squares < freedom + 5 * np.sqrt(2 * freedom) + 5
    exact = log_softmax(logits[None].astype(np.float64))[0]
    np.testing.assert_allclose(found.logprob, exact[found.token], atol=1e-5)


@settings(max_examples=150, deadline=None)
@given(
    st.integers(1, 2500), st.integers(0, 2**32), st.sampled_from([0, 1, 5, 40, 1500]),
    st.sampled_from([0.0, 0.1, 0.5, 0.9, 1.0]),
    st.sampled_from([0.0, 0.01, 0.7, 1.0, 3.0]), st.sampled_from([0.1, 3.0, 30.0]), st.booleans(),
)  # fmt: skip
def test_only_tokens_within_the_cuts_are_drawn(V, seed, top_k, top_p, temperature, scale, ties):
    rng = np.random.default_rng(seed)
    logits = (rng.standard_normal(V) * scale).astype(np.float32)
    if ties:
        logits = np.round(logits)
    N = 40
    found = drawn(np.broadcast_to(logits, (N, V)), seed=seed, temperature=temperature, top_k=top_k, top_p=top_p)
    near = [max(0, top_p - 1e-4), top_p, min(1, top_p + 1e-4)]  # rounding may shift the nucleus by a token
    allowed = sum(probabilities_reference(logits, temperature, top_k, p) for p in near)
    assert (allowed[found.token] > 0).all()


def test_the_seed_and_the_position_name_the_number():
    for seed, position in [(0, 0), (1, 2), (2**63 + 5, 2**33 + 1)]:
        counter, key = (position & 0xFFFFFFFF, position >> 32, 0, 0), (seed & 0xFFFFFFFF, seed >> 32)
        one, other, _, _ = philox_reference(counter, key)
        assert uniform(np.uint64(seed), np.uint64(position)) == (one << 21 | other >> 11) * 2.0**-53


@DTYPES
def test_a_row_gets_the_same_bits_wherever_it_stands(dtype):
    rng = np.random.default_rng(4)
    N, V = 33, 1500
    logits = rng.standard_normal((N, V)) * 4
    b = rng.standard_normal(V).astype(dtype)
    wants = {
        "temperature": rng.choice([0, 0.5, 1, 2], N), "top_k": rng.choice([0, 0, 10, 2000], N), "wanted": rng.integers(0, 6, N),
        "top_p": rng.choice([1, 0.8, 0.3], N), "seed": rng.integers(0, 2**60, N), "position": rng.integers(0, 1000, N),
    }  # fmt: skip
    whole, shared = (drawn(logits, b, dtype, team, 5, **wants) for team in (None, Team(2)))
    for n in range(N):
        alone = drawn(logits[n : n + 1], b, dtype, None, 5, **{name: value[n] for name, value in wants.items()})
        for name in ("token", "logprob", "tokens", "logprobs"):
            for other in (whole, shared):
                np.testing.assert_array_equal(getattr(other, name)[n], getattr(alone, name)[0], err_msg=name)


def test_alternatives_are_the_most_likely_in_order_of_equal_ones_the_lower_number():
    rng = np.random.default_rng(6)
    for V in (3, 100, 5000):
        logits = np.round(rng.standard_normal((8, V)) * 3).astype(np.float32)
        found = drawn(logits, most=6, wanted=6)
        count = min(6, V)
        order = np.argsort(-logits, axis=1, kind="stable")[:, :count]
        np.testing.assert_array_equal(found.tokens[:, :count], order)
        np.testing.assert_allclose(found.logprobs[:, :count], np.take_along_axis(log_softmax(logits), order, 1), atol=1e-5)
        assert (found.tokens[:, count:] == BAD).all()
        np.testing.assert_array_equal(drawn(logits, temperature=0).token, order[:, 0])
        np.testing.assert_array_equal(drawn(logits, top_k=1).token, order[:, 0])
        np.testing.assert_array_equal(drawn(logits, top_p=0).token, order[:, 0])


def test_a_given_token_is_told_and_not_drawn():
    logits = np.random.default_rng(7).standard_normal((5, 40))
    found = drawn(logits, given=[3, 39, 0, 7, 7])
    np.testing.assert_array_equal(found.token, [3, 39, 0, 7, 7])
    np.testing.assert_allclose(found.logprob, log_softmax(logits)[range(5), found.token], atol=1e-5)


@pytest.mark.parametrize("temperature", [0, 1, 0.5])
@pytest.mark.parametrize("top_p", [0.5, 1])
def test_rows_without_a_distribution_give_no_token_and_leave_the_others_alone(temperature, top_p):
    logits = np.random.default_rng(8).standard_normal((7, 30))
    logits[1, 4], logits[2, 5], logits[3, :] = np.nan, np.inf, -np.inf
    logits[4, 1:] = -np.inf  # one token is left
    logits[6, :2] = np.nan
    found = drawn(logits, temperature=temperature, top_p=top_p)
    np.testing.assert_array_equal(found.token == BAD, [False, True, True, True, False, False, True])
    np.testing.assert_array_equal(np.isnan(found.logprob), found.token == BAD)
    assert (found.token[4], found.logprob[4]) == (0, 0)
    fine = drawn(logits[[0, 5]], temperature=temperature, top_p=top_p, position=[0, 5])
    np.testing.assert_array_equal(found.token[[0, 5]], fine.token)


def test_logits_far_apart_do_not_overflow():
    logits = np.zeros((3, 20))
    logits[:, 7], logits[:, 3] = 3e4, -3e4
    for temperature in (1e-300, 1e-9, 1, 1e9):
        found = drawn(logits, temperature=temperature, top_p=0.9)
        assert (found.token >= 0).all()
        if temperature <= 1:
            assert (found.token == 7).all()
