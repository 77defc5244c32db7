"""Pooling over time against its reference, the reference by complex step, and both against PyTorch."""

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
    relative,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from dllm.kernels import pool

EVERY_WAY = pytest.mark.parametrize(("how", "directions"), [("max", 1), ("mean", 1), ("last", 1), ("last", 2), ("max", 2)])


def pooled(x, lengths, how, directions, dy=None, x_row=3):
    """(B,N) of x (T,B,N), and with dy its gradient, in memory that was no number before."""
    (T, B, N), dtype = x.shape, x.dtype
    flat = in_panels(np.concatenate([np.full((x_row, N), np.nan, dtype), x.reshape(T * B, N)]))
    out = nan_panels(B, N, dtype)
    arg, lengths = np.full(out.shape, -7, np.int32), np.asarray(lengths, np.int64)
    pool.pool_forward(out, arg, flat, x_row, lengths, T, B, pool.HOW[how], directions)
    if dy is None:
        return out_of_panels(out, N)
    dx = nan_panels(x_row + T * B, N, dtype)
    pool.pool_backward(dx, x_row, in_panels(dy), arg, lengths, T, B, pool.HOW[how], directions)
    assert np.isnan(dx[:, :x_row]).all()
    return out_of_panels(out, N), out_of_panels(dx, N, x_row).reshape(x.shape)


def arrays(T, B, N, dtype, seed=1):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((T, B, N))
    return np.where(rng.random(x.shape) < 0.5, np.round(x), x).astype(dtype), rng.standard_normal((B, N)).astype(dtype), rng


@DTYPES
@EVERY_WAY
@settings(deadline=None, max_examples=30)
@given(st.data())
def test_pooling_equals_its_reference_with_ties_and_any_lengths(dtype, how, directions, data):
    T, B, N = (data.draw(st.integers(1, most)) for most in (7, 5, 2))
    lengths = data.draw(st.lists(st.integers(0, T), min_size=B, max_size=B))
    x, dy, _ = arrays(T, B, N * 32, dtype)
    y, dx = pooled(x, lengths, how, directions, dy)
    way, exact, exact_dy = (pool.HOW[how], directions), x.astype(np.float64), dy.astype(np.float64)
    assert relative(y, pool.pool_reference(exact, lengths, *way)) <= CLOSE[dtype]
    assert relative(dx, pool.pool_backward_reference(exact_dy, exact, lengths, *way)) <= CLOSE[dtype]
    for n, length in enumerate(lengths):
        assert not dx[length:, n].any()
        assert length or not y[n].any()


@EVERY_WAY
def test_pooling_by_complex_step_and_central_differences(how, directions):
    lengths = [4, 0, 2]
    x, dy, rng = arrays(4, 3, 32, np.float64)
    x += rng.standard_normal(x.shape)  # no ties
    expected = {"x": pool.pool_backward_reference(dy, x, lengths, pool.HOW[how], directions)}
    check_by_complex_step(
        lambda x: (dy * pool.pool_reference(x, lengths, pool.HOW[how], directions)).sum(), {"x": x}, expected, rng
    )
    found = {"x": pooled(x, lengths, how, directions, dy)[1]}
    check_by_differences(lambda x: (dy * pooled(x, lengths, how, directions)).sum(), {"x": x}, found, rng)


@pytest.mark.parametrize("how", ["max", "mean"])
def test_pooling_equals_pytorchs(how):
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    x, dy, _ = arrays(5, 1, 16, np.float64)
    x = np.random.default_rng(2).standard_normal(x.shape)
    y, dx = pooled(x, [3], how, 1, dy)
    there = torch.tensor(x, requires_grad=True)
    theirs = there[:3].amax(0) if how == "max" else there[:3].mean(0)
    (theirs * torch.tensor(dy)).sum().backward()
    assert relative(y, theirs.detach().numpy()) <= 1e-9
    assert relative(dx, there.grad.numpy()) <= 1e-9


@DTYPES
@pytest.mark.parametrize("place", [0, 1, 2])
def test_what_is_no_number_is_seen_in_the_largest(dtype, place):
    x = arrays(3, 1, 16, dtype)[0]
    x[place, 0, 5] = np.nan
    y = pooled(x, [3], "max", 1)
    assert np.isnan(y[0, 5])
    assert np.isfinite(np.delete(y[0], 5)).all()
