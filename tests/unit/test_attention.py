"""Attention against its plain reference, the reference by complex step, the kernels by differences, all beside PyTorch's."""

import numpy as np
import pytest
from helpers.numerics import (
    CLOSE,
    DTYPES,
    check_by_complex_step,
    check_by_differences,
    in_panels,
    nan_panels,
    out_of_panels,
    padding,
    relative,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from dllm.kernels import attention
from dllm.kernels.team import Team

# T, S, B, H, M
SHAPES = [(1, 1, 1, 1, 1), (3, 4, 2, 5, 7), (5, 9, 3, 16, 32), (14, 13, 4, 40, 50), (9, 33, 2, 64, 130)]


def arrays(shape, dtype, seed=1):
    T, S, B, H, M = shape
    rng = np.random.default_rng(seed)
    sizes = {"h": (T, B, H), "k": (S, B, H), "m": (S, B, M)}
    found = {name: rng.standard_normal(size).astype(dtype) for name, size in sizes.items()}
    return found, rng.standard_normal((T, B, M)).astype(dtype), rng.standard_normal((B, T, S)).astype(dtype), rng


def attended(h, k, m, lengths, dc=None, dA=None, threads=1, h_row=3):
    """c and A of the kernels, and with dc the gradients, in memory that was no number before."""
    (T, B, H), (S, _, M), dtype, team = h.shape, m.shape, h.dtype, Team(threads)
    flat = lambda x: in_panels(x.reshape(-1, x.shape[2]))
    whole = lambda x, N: out_of_panels(x, N).reshape(-1, B, N)
    before = np.full((h_row, H), np.nan, dtype)
    inputs = in_panels(np.concatenate([before, h.reshape(-1, H)])), h_row, flat(k), flat(m), np.asarray(lengths, np.int64)
    c, A = nan_panels(T * B, M, dtype), np.full((B, T, S), np.nan, dtype)
    attention.attend(c, A, *inputs, S, T, B, team)
    assert not padding(c, M).any()
    if dc is None:
        return whole(c, M), A
    dh, dk, dm = nan_panels(T * B, H, dtype), nan_panels(S * B, H, dtype), nan_panels(S * B, M, dtype)
    scratch = np.full_like(A, np.nan) if dA is None else dA.copy()
    attention.attend_backward(dh, dk, dm, A, scratch, flat(dc), *inputs, S, T, B, team, dA is not None)
    assert not any(padding(d, N).any() for d, N in ((dh, H), (dk, H), (dm, M)))
    return whole(c, M), A, {"h": whole(dh, H), "k": whole(dk, H), "m": whole(dm, M)}


def check(dtype, shape, lengths, copying):
    inputs, dc, dA, _ = arrays(shape, dtype)
    c, A, gradients = attended(**inputs, lengths=lengths, dc=dc, dA=dA if copying else None)
    exact = {name: array.astype(np.float64) for name, array in inputs.items()}
    expected = attention.attend_reference(**exact, lengths=lengths)
    assert relative(c, expected[0]) <= CLOSE[dtype]
    assert relative(A, expected[1]) <= CLOSE[dtype]
    wanted = attention.attend_backward_reference(dc.astype(np.float64), dA if copying else 0.0, expected[1], **exact)
    for (name, found), gradient in zip(gradients.items(), wanted, strict=True):
        assert relative(found, gradient) <= 3 * CLOSE[dtype], name
    for n, length in enumerate(lengths):
        assert not A[n, :, length:].any()
        assert not gradients["k"][length:, n].any()
        assert not gradients["m"][length:, n].any()
        assert length or not (c[:, n].any() or gradients["h"][:, n].any())
    return inputs, dc, dA, (c, A, *gradients.values())


@DTYPES
@pytest.mark.parametrize("shape", SHAPES)
def test_attention_equals_its_reference_with_any_threads(dtype, shape):
    lengths = np.random.default_rng(2).integers(0, shape[1] + 1, shape[2])
    lengths[0] = shape[1]
    inputs, dc, dA, found = check(dtype, shape, lengths, True)
    for threads in (2, 3):
        *states, gradients = attended(**inputs, lengths=lengths, dc=dc, dA=dA, threads=threads)
        for ours, theirs in zip(found, (*states, *gradients.values()), strict=True):
            np.testing.assert_array_equal(ours, theirs)


@DTYPES
@settings(deadline=None, max_examples=40)
@given(st.data())
def test_attention_equals_its_reference_for_any_lengths(dtype, data):
    T, S, B, H, M = (data.draw(st.integers(1, most)) for most in (9, 11, 4, 70, 70))
    lengths = data.draw(st.lists(st.integers(0, S), min_size=B, max_size=B))
    check(dtype, (T, S, B, H, M), lengths, data.draw(st.booleans()))


@DTYPES
def test_rows_that_share_a_memory_have_what_lanes_of_their_own_have(dtype):
    T, S, B, H, M = 1, 9, 3, 40, 50
    inputs, _, _, _ = arrays((T, S, B, H, M), dtype)
    lengths, source = np.array([9, 0, 4]), np.array([2, 0, 0, 1, 2])  # neighbours with one lane, and others
    h = np.random.default_rng(5).standard_normal((1, 5, H)).astype(dtype)
    shared = {name: np.ascontiguousarray(inputs[name][:, source]) for name in ("k", "m")}
    expected, weights = attended(h, **shared, lengths=lengths[source])
    panels = [in_panels(x.reshape(-1, x.shape[2])) for x in (h, inputs["k"], inputs["m"])]
    for threads in (1, 2, 3):
        c, A = nan_panels(5, M, dtype), np.full((5, S), np.nan, dtype)
        attention.attend_rows(c, A, panels[0], 0, *panels[1:], source, lengths, S, B, Team(threads))
        np.testing.assert_array_equal(out_of_panels(c, M), expected[0])
        np.testing.assert_array_equal(A, weights[:, 0])


def test_attention_by_complex_step_and_central_differences():
    shape, lengths = (3, 4, 3, 5, 7), [4, 0, 2]
    inputs, dc, dA, rng = arrays(shape, np.float64)

    def loss(by, **inputs):
        c, A = by(**inputs, lengths=lengths)
        return (dc * c).sum() + (dA * A).sum()

    A = attention.attend_reference(**inputs, lengths=lengths)[1]
    expected = attention.attend_backward_reference(dc, dA, A, **inputs)
    exact = dict(zip(inputs, expected, strict=True))
    check_by_complex_step(lambda **inputs: loss(attention.attend_reference, **inputs), inputs, exact, rng)
    found = attended(**inputs, lengths=lengths, dc=dc, dA=dA)[2]
    check_by_differences(lambda **inputs: loss(attended, **inputs), inputs, found, rng)


def test_attention_equals_pytorchs():
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    (T, S, B, H, M), lengths = (5, 7, 3, 20, 33), [7, 1, 4]
    inputs, dc, _, _ = arrays((T, S, B, H, M), np.float64)
    there = {name: torch.tensor(array, requires_grad=True) for name, array in inputs.items()}
    mask = (torch.arange(S) < torch.tensor(lengths)[:, None])[:, None]
    lanes = [array.transpose(0, 1) for array in there.values()]
    theirs = torch.nn.functional.scaled_dot_product_attention(*lanes, attn_mask=mask, scale=1.0).transpose(0, 1)
    (theirs * torch.tensor(dc)).sum().backward()
    c, _, gradients = attended(**inputs, lengths=lengths, dc=dc)
    assert relative(c, theirs.detach().numpy()) <= 1e-9
    for name, gradient in gradients.items():
        assert relative(gradient, there[name].grad.numpy()) <= 1e-9, name


@DTYPES
def test_huge_scores_do_not_overflow_and_what_is_no_number_is_seen(dtype):
    inputs, dc, _, _ = arrays((2, 3, 2, 16, 16), dtype)
    inputs["h"][:, 0] *= 1e4
    c, A, gradients = attended(**inputs, lengths=[3, 3], dc=dc)
    assert all(np.isfinite(array).all() for array in (c, A, *gradients.values()))
    np.testing.assert_allclose(A.sum(axis=2), 1, rtol=1e-5)
    inputs["k"][1, 0, 3] = np.nan
    c, A = attended(**inputs, lengths=[3, 3])
    assert np.isnan(c[:, 0]).all()
    assert np.isfinite(c[:, 1]).all()
    assert np.isfinite(attended(**inputs, lengths=[1, 3])[0]).all()  # behind its length nobody looks
