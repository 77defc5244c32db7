"""kernels/penalties.py against its equations: what is drawn, told and counted where a text wants its logits changed."""

import dataclasses

import numpy as np
import pytest
from helpers.numerics import in_panels
from hypothesis import given, settings
from hypothesis import strategies as st

from dllm.inference.generation import Sampling
from dllm.kernels.penalties import changed_reference
from dllm.kernels.sample import BAD, Choice, Scratch, draw, probabilities_reference, uniform
from dllm.kernels.team import Team

NEUTRAL = Sampling(temperature=1.0)
PENALTIES = st.fixed_dictionaries({
    "presence_penalty": st.sampled_from([0.0, 0.7, -2.0]),
    "frequency_penalty": st.sampled_from([0.0, 1.3, -0.5]),
    "repetition_penalty": st.sampled_from([1.0, 1.4, 0.6, 10.0]),
})  # fmt: skip


def drawn(choice, rows, logits):
    """Draw rows of a Choice from logits (N,V)."""
    N, V = logits.shape
    z = in_panels(logits.astype(np.float32))
    z.transpose(1, 0, 2).reshape(N, -1)[:, V:] = 0
    draw(choice, np.asarray(rows), z, np.zeros(V, np.float32), Scratch(V), Team())


def log_softmax(logits):
    return logits - logits.max() - np.log(np.exp(logits - logits.max()).sum())


@settings(max_examples=80, deadline=None)
@given(PENALTIES, st.integers(2, 300), st.integers(0, 2**32), st.sampled_from([0, 0.7, 1]), st.integers(0, 30))
def test_a_row_follows_the_equations_whatever_it_has_said(penalties, V, seed, temperature, said):
    """The greedy token is that of the changed logits; a drawn one is where their cumulated probabilities pass its number."""
    rng = np.random.default_rng(seed)
    prompt, bias = rng.integers(0, V, 9), dict(zip(rng.integers(0, V, 5).tolist(), rng.normal(0, 4, 5), strict=True))
    banned = tuple({int(token) for token in rng.integers(0, V, 2)} - set(bias))[: V - 1]
    wants = dataclasses.replace(
        NEUTRAL, seed=seed, temperature=temperature, logit_bias=tuple(bias.items()), banned=banned, **penalties
    )
    choice, generated = Choice(3, 2), rng.integers(0, V, said).tolist()
    choice.begin(1, wants, prompt)
    choice.wanted[:] = 2
    for token in generated:
        choice.changes.note(1, token)
    choice.position[1] = said
    logits = rng.normal(0, 3, (1, V)).astype(np.float32)
    drawn(choice, [1], logits)
    changed = changed_reference(logits[0], wants, prompt, generated)
    token = int(choice.token[1])
    if temperature == 0:
        assert changed[token] >= changed.max() - 1e-4
    else:
        p, u = probabilities_reference(changed, temperature), uniform(np.uint64(seed), np.uint64(said))
        assert p[token] > 0
        assert p[:token].sum() - 1e-5 <= u <= p[: token + 1].sum() + 1e-5
    own = log_softmax(logits[0].astype(np.float64))
    assert choice.logprob[1] == pytest.approx(own[token], abs=1e-4)
    np.testing.assert_allclose(choice.logprobs[1], np.sort(own)[::-1][:2], atol=1e-4)


def test_tokens_come_as_often_as_the_changed_logits_say():
    V, N = 40, 20_000
    logits = np.random.default_rng(1).normal(0, 2, V).astype(np.float32)
    wants = dataclasses.replace(
        NEUTRAL, logit_bias=((3, 5.0), (4, -2.0)), banned=(int(logits.argmax()),), presence_penalty=0.5,
        frequency_penalty=0.4, repetition_penalty=1.5, min_p=0.02, top_p=0.9,
    )  # fmt: skip
    choice, prompt, said = Choice(N), np.array([1, 2, 3]), [3, 3, 7, 9]
    for row in range(N):
        choice.begin(row, dataclasses.replace(wants, seed=row), prompt)
        for token in said:
            choice.changes.note(row, token)
    drawn(choice, np.arange(N), np.broadcast_to(logits, (N, V)))
    p = probabilities_reference(changed_reference(logits, wants, prompt, said), 1.0, 0, 0.9, 0.02)
    counts = np.bincount(choice.token, minlength=V)
    assert not counts[p == 0].any()
    seen = N * p >= 10
    squares = ((counts - N * p)[seen] ** 2 / (N * p)[seen]).sum()
    assert squares < seen.sum() + 5 * np.sqrt(2 * seen.sum()) + 5


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 2500), st.integers(0, 2**32), st.sampled_from([0, 1, 7, 1500]), st.sampled_from([0.3, 1.0]),
    st.sampled_from([1e-6, 0.05, 0.5, 1.0]), st.sampled_from([0.5, 1.0, 2.0]),
)  # fmt: skip
def test_min_p_cuts_what_is_too_far_behind_the_likeliest(V, seed, top_k, top_p, min_p, temperature):
    logits = (np.random.default_rng(seed).standard_normal(V) * 4).astype(np.float32)
    choice, N = Choice(30), 30
    for row in range(N):
        wants = Sampling(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, seed=seed + row)
        choice.begin(row, wants, np.zeros(1, np.int64))
    drawn(choice, np.arange(N), np.broadcast_to(logits, (N, V)))
    near = [(p, cut) for p in (max(0, top_p - 1e-4), top_p, min(1, top_p + 1e-4)) for cut in (0.999 * min_p, min_p)]
    allowed = sum(probabilities_reference(logits, temperature, top_k, p, cut) for p, cut in near)
    assert (allowed[choice.token] > 0).all()


def test_neutral_values_change_no_bit_and_are_kept_nowhere():
    rng = np.random.default_rng(3)
    logits, plain, choice = rng.normal(0, 3, (50, 500)), Choice(50), Choice(50)
    for row in range(50):
        for one in (plain, choice):
            one.begin(row, Sampling(temperature=0.9, seed=row, banned=(5,) if one is choice else ()), np.arange(400))
    choice.begin(0, Sampling(repetition_penalty=1.2), np.arange(400))
    for row in range(50):
        choice.begin(row, Sampling(temperature=0.9, seed=row, logit_bias=((7, 0.0),)), np.arange(400))
        choice.changes.note(row, 3)
    drawn(plain, np.arange(50), logits)
    drawn(choice, np.arange(50), logits)
    assert not choice.changes.entries.any()
    np.testing.assert_array_equal(choice.token, plain.token)
    np.testing.assert_array_equal(choice.logprob, plain.logprob)


def test_a_row_without_any_token_left_gives_none_and_leaves_the_others_alone():
    logits = np.random.default_rng(4).normal(size=(3, 4))
    for temperature in (0.0, 1.0):
        choice = Choice(3)
        for row, banned in enumerate([(), (0, 1, 2, 3), (0, 1, 2)]):
            choice.begin(row, Sampling(temperature=temperature, banned=banned), np.zeros(1, np.int64))
        drawn(choice, [0, 1, 2], logits)
        assert choice.token[1] == BAD
        assert np.isnan(choice.logprob[1])
        assert choice.token[0] != BAD
        assert choice.token[2] == 3


def test_a_row_gets_the_same_bits_in_any_company():
    rng = np.random.default_rng(5)
    N, V = 20, 900
    logits, prompts = rng.normal(0, 3, (N, V)), rng.integers(0, V, (N, 30))
    wants = [
        Sampling(
            temperature=float(rng.choice([0, 0.5, 1])), seed=row, repetition_penalty=float(rng.choice([1, 1.3])),
            frequency_penalty=float(rng.choice([0, 0.4])), min_p=float(rng.choice([0, 0.1])), banned=(row,),
        )
        for row in range(N)
    ]  # fmt: skip
    whole = Choice(N)
    for row in range(N):
        whole.begin(row, wants[row], prompts[row])
    for step in range(5):
        whole.position[:] = step
        drawn(whole, np.arange(N), np.roll(logits, step, axis=1))
        for row in range(N):
            whole.changes.note(row, int(whole.token[row]))
    last = whole.token.copy(), whole.logprob.copy()
    for row in range(N):
        alone = Choice(1)
        alone.begin(0, wants[row], prompts[row])
        for step in range(5):
            alone.position[:] = step
            drawn(alone, [0], np.roll(logits, step, axis=1)[row : row + 1])
            alone.changes.note(0, int(alone.token[0]))
        assert (alone.token[0], alone.logprob[0]) == (last[0][row], last[1][row])
