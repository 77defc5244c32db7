"""Products of matrices in panels against BLAS: any shape, at the edges of memory, in float32, float64 and bfloat16."""

import os
import subprocess
import sys

import numpy as np
import pytest
from helpers.numerics import (
    CLOSE,
    DTYPES,
    SpoiltOperands,
    guarded,
    in_panels,
    nan_panels,
    out_of_panels,
    padding,
    relative,
    rounded,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from dllm.kernels import gemm, processor
from dllm.kernels.operands import bf16, transpose

SHAPES = [(1, 1, 1), (1, 3, 5), (13, 2, 32), (14, 7, 33), (15, 1, 31), (29, 5, 64), (7, 17, 131), (253, 515, 33)]
SIZE = st.one_of(st.integers(1, 40), st.sampled_from([1, 2, 3, 5, 7, 13, 16, 17, 31, 32, 33, 61, 127, 227, 521]))
needs_bf16 = pytest.mark.skipif(not processor.BF16, reason="this processor has no bfloat16 instructions")


def matrices(shape, dtype, seed=1):
    M, K, N = shape
    rng = np.random.default_rng(seed)
    return [rng.standard_normal(size).astype(dtype) for size in ((M, K), (K, N), (M, N))]


def exact(a, b):
    return a.astype(np.float64) @ b.astype(np.float64)


@DTYPES
@pytest.mark.parametrize(("M", "N"), [(1, 1), (3, 8), (5, 16), (2, 17), (7, 40)])
def test_panels_hold_every_element_once_and_zeros_beyond(dtype, M, N):
    x = np.random.default_rng(1).standard_normal((M, N)).astype(dtype)
    panels = in_panels(x)
    assert panels.shape == (-(-N * panels.itemsize // 64), M, 64 // panels.itemsize)
    assert panels.ctypes.data % 64 == 0
    np.testing.assert_array_equal(out_of_panels(panels, N), x)
    assert not padding(panels, N).any()


def check_products(shape, dtype, place=lambda array: array):
    """multiply and multiply_transposed, with and without adding, with offsets, against BLAS."""
    M, K, N = shape
    a, b, start = matrices(shape, dtype)
    product = exact(a, b)
    pad = lambda x, rows: np.concatenate([np.full((rows, x.shape[1]), np.nan, dtype), x])
    for add in (False, True):
        expected = product + start if add else product
        c = place(in_panels(pad(start, 2) if add else np.full((M + 2, N), np.nan, dtype)))
        gemm.multiply(c, 2, place(in_panels(pad(a, 3))), 3, place(in_panels(b)), M, K, add)
        assert relative(out_of_panels(c, N, 2), expected) <= CLOSE[dtype]
        assert not padding(c[:, 2:], N).any()
        c = place(in_panels(pad(start, 1) if add else np.full((M + 1, N), np.nan, dtype)))
        gemm.multiply_transposed(c, 1, place(in_panels(pad(a.T, 2))), 2, place(in_panels(pad(b, 4))), 4, M, K, add)
        assert relative(out_of_panels(c, N, 1), expected) <= CLOSE[dtype]
        assert not padding(c[:, 1:], N).any()


@DTYPES
@pytest.mark.parametrize("shape", SHAPES)
def test_products_stay_within_their_arrays(dtype, shape):
    check_products(shape, dtype, guarded)


@DTYPES
@given(shape=st.tuples(SIZE, SIZE, SIZE))
@settings(max_examples=60, deadline=None)
def test_products_of_any_shape_equal_blas(dtype, shape):
    check_products(shape, dtype)


@DTYPES
@given(K=SIZE, N=SIZE, row=st.integers(0, 5))
@settings(max_examples=40, deadline=None)
def test_transposes_of_any_shape(dtype, K, N, row):
    x = np.random.default_rng(2).standard_normal((K + row, N)).astype(dtype)
    panels = in_panels(x)
    rows = panels.shape[0] * panels.shape[2]
    out = guarded(nan_panels(rows, K, dtype))
    transpose(out, guarded(panels), row, K)
    np.testing.assert_array_equal(out_of_panels(out, K)[:N], x[row:].T)
    assert not padding(out, K).any()
    assert not out[:, N:].any()


@pytest.mark.parametrize("hidden", ["avx512f,avx512bf16", pytest.param("avx512f,avx512bf16,avx2", marks=pytest.mark.slow)])
def test_products_and_activations_with_narrower_vectors(hidden):
    """What a processor without these features would run."""
    program = """
import numpy as np, test_activations, test_gemm
test_activations.check_all()
for shape in test_gemm.SHAPES:
    for dtype in (np.float32, np.float64):
        test_gemm.check_products(shape, dtype, test_gemm.guarded)
print(test_gemm.processor.VECTOR)
"""
    environment = {**os.environ, "DLLM_HIDE_FEATURES": hidden, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) == (16 if "avx2" in hidden else min(32, processor.VECTOR))


@pytest.mark.skipif(not processor.AVX512, reason="tall tiles are of processors with AVX-512")
def test_products_with_tall_tiles():
    """What a processor would run that multiplies twice in a cycle."""
    program = """
import numpy as np
from dllm.kernels import processor
processor.TWICE = True
import test_gemm
from dllm.kernels import tiles
assert tiles.TALLEST == 2 * tiles.ROWS
for M in (14, 15, 20, 27, 28, 29):
    for dtype in (np.float32, np.float64):
        test_gemm.check_products((M, 67, 83), dtype, test_gemm.guarded)
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr


# bfloat16


def test_rounding_to_bfloat16_is_to_nearest_even_and_keeps_infinity_and_nan():
    x = np.float32([1, 1.00390625, 1.01171875, -1.00390625, 3e38, np.inf, -np.inf, np.nan, 0, -0.0, 1e-30])
    found = np.array([bf16(value) for value in x], np.uint32) << np.uint32(16)
    np.testing.assert_array_equal(found.view(np.float32), rounded(x))
    np.testing.assert_array_equal(found.view(np.float32)[:4], [1, 1, 1.015625, -1])


def check_bfloat16_products(shape, rows, add, place=lambda array: array):
    """Factors of all kinds, from some rows on; what lies before these and what memory held before is no number."""
    M, K, N = shape
    a, b, start = matrices(shape, np.float32)
    expected = exact(rounded(a), rounded(b)) + (start if add else 0)
    operands = SpoiltOperands(np.float32, bf16=True)
    pad = lambda x, count: place(in_panels(np.concatenate([np.full((count, x.shape[1]), np.nan, np.float32), x])))
    left, left_row = operands.words("left", pad(a, rows[0]), rows[0], M)
    right, _ = operands.pairs("right", pad(b, rows[1]), rows[1], K)
    same = operands.transposed("same", pad(np.ascontiguousarray(b.T), rows[1]), rows[1], N)
    for factor in (right, same):
        c = place(in_panels(start) if add else nan_panels(M, N, np.float32))
        gemm.multiply(c, 0, place(left), left_row, place(factor), M, operands.depth(K), add)
        assert relative(out_of_panels(c, N), expected) <= CLOSE[np.float32]
        assert not padding(c, N).any()
    c = place(nan_panels(M, N, np.float32))
    tall = pad(np.ascontiguousarray(a.T), rows[2])
    operands.multiply_transposed(c, "tall", tall, rows[2], place(right), 0, K)
    assert relative(out_of_panels(c, N), exact(rounded(a), rounded(b))) <= CLOSE[np.float32]
    assert not padding(c, N).any()


@needs_bf16
@given(shape=st.tuples(SIZE, SIZE, SIZE), rows=st.tuples(*[st.integers(0, 3)] * 3), add=st.booleans())
@settings(max_examples=80, deadline=None)
def test_bfloat16_products_of_any_shape_round_the_factors_alone(shape, rows, add):
    check_bfloat16_products(shape, rows, add)


@needs_bf16
@pytest.mark.parametrize("shape", [*SHAPES, (33, 65, 49), (100, 545, 17)])
def test_bfloat16_products_stay_within_their_arrays(shape):
    for add in (False, True):
        check_bfloat16_products(shape, (3, 1, 2), add, guarded)
