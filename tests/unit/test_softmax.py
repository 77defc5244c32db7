"""Output layer, softmax and cross-entropy against their plain reference, which is held to the complex step."""

import numpy as np
import pytest
from helpers.numerics import (
    CLOSE,
    DTYPES,
    SpoiltOperands,
    check_by_complex_step,
    check_by_differences,
    in_panels,
    out_of_panels,
    padding,
    rounded,
    spoil,
)

from dllm.kernels import processor, softmax
from dllm.kernels.team import Team


def softmax_arrays(N, V, H, dtype, seed):
    rng = np.random.default_rng(seed)
    sizes = {"y": (N, H), "W": (V, H), "b": (V,)}
    arrays = {name: rng.standard_normal(size).astype(dtype) for name, size in sizes.items()}
    targets = rng.integers(0, V, N)
    targets[rng.random(N) < 0.3] = softmax.IGNORE
    return arrays, targets, rng


def softmax_compiled(R, y, W, b, targets, scale=None, between=None, bf16=False, threads=1, smoothing=0.0, weights=None):
    """Losses and, where a scale is given, gradients, with every output full of NaN before, R tokens at a time."""
    (N, H), V, dtype = y.shape, len(b), y.dtype
    operands = SpoiltOperands(dtype, bf16, Team(threads))
    chunk = softmax.Chunk(R, H, V, operands, scale is not None)
    spoil(chunk.z, chunk.words, chunk.pairs)
    if bf16 and scale is not None:
        spoil(chunk.left, chunk.of_transpose, chunk.dyT)
    loss, inputs, columns = np.full(N, np.nan, dtype), in_panels(y), in_panels(np.column_stack([W, b]))
    weigh = weights if callable(weights) or weights is None else lambda part, losses: weights[part]
    if scale is None:
        softmax.softmax_cross_entropy(loss, None, None, chunk, inputs, 0, columns, targets, 0.0)
        return loss
    dy, dW = np.full_like(inputs, np.nan), np.full_like(columns, np.nan)
    softmax.softmax_cross_entropy(loss, dy, dW, chunk, inputs, 0, columns, targets, scale, between, smoothing, weigh)
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


# N, V, H and tokens of a chunk: one chunk, or whole pairs of panels; one group of the vocabulary or more
BF16_SHAPES = [
    (1, 1, 1, 1),
    (7, 5, 1, 7),
    (12, 11, 7, 32),
    (33, 40, 31, 64),
    (70, 61, 33, 32),
    (40, 459, 17, 32),
    (5, 225, 64, 5),
]
needs_bf16 = pytest.mark.skipif(not processor.BF16, reason="products of bfloat16 are no faster than float32's here")


@needs_bf16
@pytest.mark.parametrize(("N", "V", "H", "R"), BF16_SHAPES)
def test_bfloat16_softmax_follows_its_reference(N, V, H, R):
    """With factors that bfloat16 holds nothing but exp(z) and f y are rounded, and losses are those of float32."""
    arrays, targets, _ = softmax_arrays(N, V, H, np.float32, 12)
    arrays |= {"y": rounded(arrays["y"]), "W": rounded(arrays["W"])}
    loss, gradients = softmax_compiled(R, **arrays, targets=targets, scale=0.37, bf16=True)
    exact = {name: array.astype(np.float64) for name, array in arrays.items()}
    expected, *expected_gradients = softmax.softmax_cross_entropy_reference(**exact, targets=targets, scale=0.37)
    np.testing.assert_allclose(loss, expected, rtol=CLOSE[np.float32], atol=1e-5)
    for name, gradient in zip(gradients, expected_gradients, strict=True):
        np.testing.assert_allclose(gradients[name], gradient, rtol=0, atol=1e-2 * abs(gradient).max() + 1e-2)
    other_loss, others = softmax_compiled(R, **arrays, targets=targets, scale=0.37, bf16=True, threads=3)
    np.testing.assert_array_equal(other_loss, loss)
    for name, gradient in gradients.items():
        np.testing.assert_array_equal(others[name], gradient)
    np.testing.assert_array_equal(softmax_compiled(R, **arrays, targets=targets, bf16=True), loss)


@needs_bf16
def test_bfloat16_softmax_of_biases_whose_exponentials_are_infinite():
    """Tokens that fill up a chunk have the biases as their logits."""
    arrays, targets, _ = softmax_arrays(7, 5, 3, np.float32, 13)
    arrays["y"][:, 0], arrays["W"][:, 0], arrays["b"][:] = 1, -120, 120
    loss, gradients = softmax_compiled(7, **arrays, targets=targets, scale=0.37, bf16=True)
    assert np.isfinite(loss).all()
    assert all(np.isfinite(gradient).all() for gradient in gradients.values())


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


# smoothing, and weights of tokens


def smooth_objective(y, W, b, targets, smoothing, weights):
    """(1 - eps) times the weighted losses, and eps times the mean loss of all classes, of tokens with a target."""
    z = y @ W.T + b
    z = z - z.real.max(axis=1, keepdims=True)
    surprise = np.log(np.exp(z).sum(axis=1, keepdims=True)) - z
    real = np.flatnonzero(targets != softmax.IGNORE)
    own = (1 - smoothing) * weights[real] * surprise[real, targets[real]]
    return (own + smoothing * surprise[real].mean(axis=1)).sum()


SMOOTH = pytest.mark.parametrize(("smoothing", "weighted"), [(0.0, True), (0.1, False), (0.1, True), (1.0, True)])


def smooth_arrays(N, V, H, dtype, weighted):
    arrays, targets, rng = softmax_arrays(N, V, H, dtype, 21)
    weights = rng.random(N) if weighted else np.ones(N)
    weights[::4] *= not weighted  # some are zero
    return arrays, targets, weights.astype(dtype), rng


@SMOOTH
@pytest.mark.parametrize(("N", "V", "H", "R"), [(12, 11, 7, 5), (13, 17, 5, 13)])
def test_smoothed_reference_by_complex_step_and_kernel_by_differences(N, V, H, R, smoothing, weighted):
    arrays, targets, weights, rng = smooth_arrays(N, V, H, np.float64, weighted)
    options = {"targets": targets, "smoothing": smoothing, "weights": weights}
    objective = lambda **arrays: 0.37 * smooth_objective(**arrays, **options)
    expected = softmax.softmax_cross_entropy_reference(**arrays, scale=0.37, **options)[1:]
    check_by_complex_step(objective, arrays, dict(zip("yWb", expected, strict=True)), rng)
    loss, gradients = softmax_compiled(R, **arrays, scale=0.37, **options)
    check_by_differences(objective, arrays, gradients, rng)
    np.testing.assert_array_equal(loss, softmax_compiled(R, **arrays, targets=targets))  # the plain one


@DTYPES
@SMOOTH
@pytest.mark.parametrize(("N", "V", "H", "R"), SOFTMAX_SHAPES)
def test_smoothed_softmax_equals_its_reference_with_any_threads(dtype, N, V, H, R, smoothing, weighted):
    arrays, targets, weights, _ = smooth_arrays(N, V, H, dtype, weighted)
    options = {"targets": targets, "scale": 0.37, "smoothing": smoothing, "weights": weights}
    loss, gradients = softmax_compiled(R, **arrays, **options)
    exact = {name: array.astype(np.float64) for name, array in arrays.items()}
    expected = softmax.softmax_cross_entropy_reference(**exact, **{**options, "weights": weights.astype(np.float64)})[1:]
    tiny = 20 * np.finfo(dtype).eps
    for name, gradient in zip(gradients, expected, strict=True):
        np.testing.assert_allclose(gradients[name], gradient, rtol=0, atol=CLOSE[dtype] * abs(gradient).max() + tiny)
    other = softmax_compiled(R, **arrays, **options, threads=3)
    for ours, theirs in zip((loss, *gradients.values()), (other[0], *other[1].values()), strict=True):
        np.testing.assert_array_equal(ours, theirs)


@needs_bf16
@SMOOTH
@pytest.mark.parametrize(("N", "V", "H", "R"), BF16_SHAPES[3:6])
def test_smoothed_bfloat16_softmax_follows_its_reference(N, V, H, R, smoothing, weighted):
    arrays, targets, weights, _ = smooth_arrays(N, V, H, np.float32, weighted)
    arrays |= {"y": rounded(arrays["y"]), "W": rounded(arrays["W"])}
    options = {"targets": targets, "scale": 0.37, "smoothing": smoothing, "weights": weights}
    gradients = softmax_compiled(R, **arrays, **options, bf16=True)[1]
    exact = {name: array.astype(np.float64) for name, array in arrays.items()}
    for name, gradient in zip(gradients, softmax.softmax_cross_entropy_reference(**exact, **options)[1:], strict=True):
        np.testing.assert_allclose(gradients[name], gradient, rtol=0, atol=1e-2 * abs(gradient).max() + 1e-2)


def test_smoothing_is_that_of_pytorch():
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    arrays, targets, _ = softmax_arrays(13, 17, 5, np.float64, 22)
    there = {name: torch.tensor(array, requires_grad=True) for name, array in arrays.items()}
    z = there["y"] @ there["W"].T + there["b"]
    cross_entropy = torch.nn.functional.cross_entropy
    (0.37 * cross_entropy(z, torch.tensor(targets), ignore_index=-1, reduction="sum", label_smoothing=0.1)).backward()
    loss, gradients = softmax_compiled(6, **arrays, targets=targets, scale=0.37, smoothing=0.1)
    plain = cross_entropy(z, torch.tensor(targets), ignore_index=-1, reduction="none")
    np.testing.assert_allclose(loss, plain.detach().numpy(), rtol=1e-9, atol=1e-12)
    for name, gradient in gradients.items():
        np.testing.assert_allclose(gradient, there[name].grad.numpy(), rtol=0, atol=1e-9)


def test_losses_of_each_chunk_can_be_replaced_as_they_are_weighed():
    arrays, targets, _ = softmax_arrays(7, 5, 3, np.float64, 23)
    plain = softmax_compiled(3, **arrays, targets=targets)
    seen = []

    def weigh(part, losses):
        seen.append((part.start, part.stop))
        np.testing.assert_array_equal(losses, plain[part])
        losses[:] = part.start
        return np.ones(len(losses))

    loss, gradients = softmax_compiled(3, **arrays, targets=targets, scale=1.0, weights=weigh)
    assert seen == [(0, 3), (3, 6), (6, 7)]
    np.testing.assert_array_equal(loss, [0, 0, 0, 3, 3, 3, 6])
    for name, gradient in softmax_compiled(3, **arrays, targets=targets, scale=1.0)[1].items():
        np.testing.assert_array_equal(gradients[name], gradient)
