"""Output layer, softmax and cross-entropy against their plain reference, which is held to the complex step."""

import numpy as np
import pytest
from helpers.numerics import (
    CLOSE,
    DTYPES,
    check_by_complex_step,
    check_by_differences,
    in_panels,
    out_of_panels,
    padding,
)

from dllm.kernels import softmax
from dllm.kernels.operands import Operands


def softmax_arrays(N, V, H, dtype, seed):
    rng = np.random.default_rng(seed)
    sizes = {"y": (N, H), "W": (V, H), "b": (V,)}
    arrays = {name: rng.standard_normal(size).astype(dtype) for name, size in sizes.items()}
    targets = rng.integers(0, V, N)
    targets[rng.random(N) < 0.3] = softmax.IGNORE
    return arrays, targets, rng


def softmax_compiled(R, y, W, b, targets, scale=None, between=None):
    """Losses and, where a scale is given, gradients, with every output full of NaN before, R tokens at a time."""
    (N, H), V, dtype = y.shape, len(b), y.dtype
    operands = Operands(dtype)
    chunk = softmax.Chunk(R, H, V, operands, scale is not None)
    loss, inputs, weights = np.full(N, np.nan, dtype), in_panels(y), in_panels(np.column_stack([W, b]))
    if scale is None:
        softmax.softmax_cross_entropy(loss, None, None, chunk, inputs, 0, weights, targets, 0.0)
        return loss
    dy, dW = np.full_like(inputs, np.nan), np.full_like(weights, np.nan)
    softmax.softmax_cross_entropy(loss, dy, dW, chunk, inputs, 0, weights, targets, scale, between)
    assert not padding(dy, H).any()
    assert not padding(dW, H + 1).any()
    dW = out_of_panels(dW, H + 1)
    return loss, {"y": out_of_panels(dy, H), "W": dW[:, :H], "b": dW[:, H]}


# N, V, H, R
SOFTMAX_SHAPES = [(1, 1, 1, 1), (1, 2, 3, 1), (7, 5, 1, 3), (12, 11, 7, 5), (13, 17, 5, 13), (6, 3, 2, 100)]


@DTYPES
@pytest.mark.parametrize(("N", "V", "H", "R"), SOFTMAX_SHAPES)
def test_softmax_in_chunks_equals_its_reference(dtype, N, V, H, R):
    arrays, targets, _ = softmax_arrays(N, V, H, dtype, 8)
    chunks = []
    loss, gradients = softmax_compiled(R, **arrays, targets=targets, scale=0.37, between=lambda: chunks.append(1))
    exact = {name: array.astype(np.float64) for name, array in arrays.items()}
    expected, *expected_gradients = softmax.softmax_cross_entropy_reference(**exact, targets=targets, scale=0.37)
    tiny = 20 * np.finfo(dtype).eps  # V = 1 and padding: losses and gradients that are zero but for rounding
    np.testing.assert_allclose(loss, expected, rtol=CLOSE[dtype], atol=tiny)
    for name, gradient in zip(gradients, expected_gradients, strict=True):
        np.testing.assert_allclose(gradients[name], gradient, rtol=0, atol=CLOSE[dtype] * abs(gradient).max() + tiny)
    assert len(chunks) == -(-N // R)
    np.testing.assert_array_equal(softmax_compiled(R, **arrays, targets=targets), loss)


def test_padded_rows_have_no_loss_and_no_gradient():
    arrays, targets, _ = softmax_arrays(9, 5, 4, np.float64, 9)
    targets[[0, 4, 8]] = softmax.IGNORE
    loss, gradients = softmax_compiled(2, **arrays, targets=targets, scale=1.0)
    padded = targets == softmax.IGNORE
    assert not loss[padded].any()
    assert not gradients["y"][padded].any()
    rest = {**arrays, "y": arrays["y"][~padded]}
    alone_loss, alone = softmax_compiled(2, **rest, targets=targets[~padded], scale=1.0)
    np.testing.assert_allclose(loss[~padded], alone_loss, rtol=1e-13)
    for name in ("W", "b"):
        np.testing.assert_allclose(gradients[name], alone[name], rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(("N", "V", "H", "R"), SOFTMAX_SHAPES[2:5])
def test_softmax_reference_by_complex_step(N, V, H, R):
    arrays, targets, rng = softmax_arrays(N, V, H, np.float64, 10)
    reference = lambda **arrays: softmax.softmax_cross_entropy_reference(**arrays, targets=targets, scale=0.37)
    gradients = dict(zip(("y", "W", "b"), reference(**arrays)[1:], strict=True))
    check_by_complex_step(lambda **arrays: 0.37 * reference(**arrays)[0].sum(), arrays, gradients, rng)


@pytest.mark.parametrize(("N", "V", "H", "R"), SOFTMAX_SHAPES[2:5])
def test_softmax_kernel_by_central_differences(N, V, H, R):
    arrays, targets, rng = softmax_arrays(N, V, H, np.float64, 11)
    _, gradients = softmax_compiled(R, **arrays, targets=targets, scale=0.37)
    loss = lambda **arrays: 0.37 * softmax_compiled(R, **arrays, targets=targets).sum()
    check_by_differences(loss, arrays, gradients, rng)


@DTYPES
def test_softmax_of_huge_logits_does_not_overflow(dtype):
    y, W, b = np.ones((1, 1), dtype), np.array([[1e4], [-1e4], [1e4]], dtype), np.zeros(3, dtype)
    loss, gradients = softmax_compiled(1, y, W, b, np.array([0]), scale=1.0)
    assert loss[0] == pytest.approx(np.log(2), rel=1e-6)
    np.testing.assert_allclose(gradients["b"], [-0.5, 0, 0.5], atol=1e-6)


@DTYPES
def test_a_logit_that_is_not_a_number_shows_in_the_loss(dtype):
    for place in range(3):
        b = np.zeros(3, dtype)
        b[place] = np.nan
        zero = np.zeros((1, 1), dtype), np.zeros((3, 1), dtype)
        assert np.isnan(softmax_compiled(1, *zero, b, np.array([0])))
