"""Rows of a table against NumPy's own indexing, with random rows in any order, none and all."""

import numpy as np
import pytest
from helpers.numerics import DTYPES
from hypothesis import given, settings
from hypothesis import strategies as st

from dllm.kernels import rows as kernels


@DTYPES
@settings(deadline=None)
@given(V=st.integers(1, 40), E=st.integers(1, 70), share=st.floats(0, 1), seed=st.integers(0, 1000))
def test_rows_are_what_numpy_says(dtype, V, E, share, seed):
    rng = np.random.default_rng(seed)
    table, other = rng.standard_normal((2, V, E)).astype(dtype)
    rows = rng.permutation(V)[: round(share * V)]
    out, values = rng.standard_normal((2, len(rows), E)).astype(dtype)
    kernels.gather_rows(out, table, rows)
    np.testing.assert_array_equal(out, table[rows])
    squares = kernels.squares_of_rows(table, rows)
    assert squares == pytest.approx((table[rows].astype(np.float64) ** 2).sum(), rel=1e-5 if dtype == np.float32 else 1e-13)
    for kernel, arguments, new in (
        (kernels.scatter_rows, (rows, values), values),
        (kernels.copy_rows, (other, rows), other[rows]),
        (kernels.clear_rows, (rows,), 0),
    ):
        expected, found = table.copy(), table.copy()
        expected[rows] = new
        kernel(found, *arguments)
        np.testing.assert_array_equal(found, expected)


@DTYPES
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_squares_tell_of_a_number_that_is_none(dtype, bad):
    table = np.ones((5, 3), dtype)
    table[3, 1] = bad
    assert np.isfinite(kernels.squares_of_rows(table, np.array([0, 4, 1])))
    assert not np.isfinite(kernels.squares_of_rows(table, np.array([4, 3])))
