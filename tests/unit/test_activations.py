"""exp, tanh and sigma of float32 by their stated bounds, in the kernels that use them."""

import numpy as np
import pytest

from dllm.kernels.activations import cell_forward_row, exp_rows
from dllm.kernels.compile import kernel
from dllm.kernels.tiles import ROW


@kernel
def map_exp(x, b, shift, sums):
    for v in range(0, len(x), 2):
        exp_rows(v + 1 < len(x), x.ctypes.data + v * ROW, b.ctypes.data + 4 * v, shift.ctypes.data, sums.ctypes.data)


@kernel
def map_cell(gates, b, c, c_next, h):
    for n in range(gates.shape[1]):
        rows = c.ctypes.data + n * ROW, c_next.ctypes.data + n * ROW, h.ctypes.data + n * ROW
        cell_forward_row(gates.ctypes.data + n * ROW, gates.strides[0], b.ctypes.data, *rows)


def exp(x):
    result = x.reshape(-1, 16).copy()
    map_exp(result, np.zeros(len(result), np.float32), np.zeros(16, np.float32), np.zeros(16, np.float32))
    return result.reshape(-1)


def gates(x):
    """The four gates of a cell whose gates are all x."""
    rows = np.tile(x.reshape(-1, 16), (4, 1, 1))
    map_cell(rows, np.zeros((4, 16), np.float32), *np.zeros((3, *rows.shape[1:]), np.float32))
    return rows.reshape(4, -1)


def sigmoid(x):
    i, f, _, o = gates(x)
    assert np.array_equal(i, f, equal_nan=True)
    assert np.array_equal(i, o, equal_nan=True)
    return i


def tanh(x):
    return gates(x)[2]


EXACT = {exp: np.exp, tanh: np.tanh, sigmoid: lambda x: np.where(x < 0, np.exp(x), 1) / (1 + np.exp(-abs(x)))}
BOUNDS = [(exp, -87, 88, 2e-7), (tanh, -20, 20, 4e-7), (sigmoid, -40, 40, 2e-7)]


def check_bound(function, low, high, bound):
    """On a million float32 between low and high, evenly, and a hundred thousand near zero, by size."""
    near = np.float32(10) ** np.linspace(-30, 0, 50_000, dtype=np.float32)
    x = np.concatenate([np.linspace(low, high, 1_000_000, dtype=np.float32), near, -near])
    exact = EXACT[function](x.astype(np.float64))
    error = abs(function(x) - exact)
    assert (error / exact if function is exp else error).max() <= bound


def check_beyond():
    """What is too large for exp is what the softmax notices; the others stay at their limits."""
    x = np.tile(np.float32([-1000, -np.inf, 1000, np.inf, -1e30, -88, 1e30, 88]), 2)
    low, high = x < 0, x > 0
    assert (exp(x)[low] < 2e-38).all()
    assert (exp(x)[high] > 1e38).all()
    for function, least in ((tanh, -1), (sigmoid, 0)):
        found = function(x)
        assert len(set(found[low])) == len(set(found[high])) == 1
        np.testing.assert_allclose([found[0], found[2]], [least, 1], atol=4e-7)


def check_nan():
    x = np.float32([0, np.nan, 1, np.nan, np.inf, -np.inf, -1, np.nan] * 4)
    for function in EXACT:
        np.testing.assert_array_equal(np.isnan(function(x)), np.isnan(x))


def check_all():
    """For a process that has hidden features of the processor."""
    for bound in BOUNDS:
        check_bound(*bound)
    check_beyond()
    check_nan()


@pytest.mark.parametrize(("function", "low", "high", "bound"), BOUNDS)
def test_functions_keep_their_stated_bounds(function, low, high, bound):
    check_bound(function, low, high, bound)


def test_functions_stay_at_their_limits_and_let_nan_through():
    check_beyond()
    check_nan()


@pytest.mark.parametrize("rows", [1, 2, 3, 8])
def test_exp_adds_bias_and_shift_and_sums_up(rows):
    rng = np.random.default_rng(rows)
    x, b, shift = (rng.normal(size=size).astype(np.float32) for size in ((rows, 16), rows, 16))
    result, sums = x.copy(), np.ones(16, np.float32)
    map_exp(result, b, shift, sums)
    exact = np.exp(x + b[:, None].astype(np.float64) - shift)
    np.testing.assert_allclose(result, exact, rtol=1e-6)
    np.testing.assert_allclose(sums, 1 + exact.sum(axis=0), rtol=1e-6)
