"""Rows turned round within lengths, and rows taken and put, against NumPy's own indexing."""

import numpy as np
import pytest
from helpers.numerics import DTYPES, in_panels, nan_panels, out_of_panels
from hypothesis import given, settings
from hypothesis import strategies as st

from dllm.kernels import panel_rows, reverse
from dllm.kernels.team import Team


def turned(x, lengths, add=False, out_row=2, x_row=3, threads=1):
    """x (T,B,N) by the kernel; with `add`, onto itself."""
    T, B, N = x.shape
    flat = x.reshape(T * B, N)
    source = in_panels(np.concatenate([np.full((x_row, N), np.nan, x.dtype), flat]))
    out = in_panels(np.concatenate([np.full((out_row, N), 7, x.dtype), flat if add else np.full_like(flat, np.nan)]))
    work = lambda a, b: reverse.reverse_rows(out[a:b], out_row, source[a:b], x_row, lengths, T, B, add)
    Team(threads).share(work, len(out))
    assert (out_of_panels(out, N)[:out_row] == 7).all()
    return out_of_panels(out, N, out_row).reshape(x.shape)


@DTYPES
@settings(deadline=None, max_examples=40)
@given(st.data())
def test_rows_are_turned_within_their_lengths_and_back(dtype, data):
    T, B, N = (data.draw(st.integers(1, most)) for most in (7, 5, 40))
    lengths = np.array(data.draw(st.lists(st.integers(0, T), min_size=B, max_size=B)), np.int64)
    x, dy = np.random.default_rng(B).standard_normal((2, T, B, N)).astype(dtype)
    y = turned(x, lengths)
    np.testing.assert_array_equal(y, reverse.reverse_reference(x, lengths))
    np.testing.assert_array_equal(turned(y, lengths), x)
    np.testing.assert_array_equal(turned(x, lengths, add=True), x + y)
    for threads in (2, 3):
        np.testing.assert_array_equal(turned(x, lengths, threads=threads), y)
    inner = lambda a, b: (a.astype(np.float64) * b).sum()
    assert inner(y, dy) == pytest.approx(inner(x, turned(dy, lengths)), abs=1e-9)  # its own gradient


@DTYPES
def test_rows_are_taken_and_put_and_others_are_not_touched(dtype):
    rng = np.random.default_rng(1)
    x, values = rng.standard_normal((9, 20)).astype(dtype), rng.standard_normal((3, 20)).astype(dtype)
    rows = np.array([5, 0, 3])
    panels, out = in_panels(x), nan_panels(3, 20, dtype)
    panel_rows.take_rows(out, panels, 2, rows)
    np.testing.assert_array_equal(out_of_panels(out, 20), x[2 + rows])
    panel_rows.put_rows(panels, 2, in_panels(values), rows)
    x[2 + rows] = values
    np.testing.assert_array_equal(out_of_panels(panels, 20), x)
    panel_rows.put_rows(panels, 2, panels[:, :0], rows[:0])
    np.testing.assert_array_equal(out_of_panels(panels, 20), x)
