"""Every kernel on its own: the compiled function against its plain reference, the reference by complex step, the
compiled float64 function by central differences, activations by their stated bounds, Philox by the known answers of
Random123, optimiser updates by PyTorch's.
"""

import ctypes
import mmap

import numpy as np
import pytest

from dllm.kernels import dropout, embedding, gemm, lstm, optim, softmax
from dllm.kernels.activations import exp, sigmoid, tanh
from dllm.kernels.compile import kernel

CLOSE = {np.float32: 2e-5, np.float64: 1e-12}  # norm-wise, for sums of some hundred terms
DTYPES = pytest.mark.parametrize("dtype", [np.float32, np.float64])
# T, B, D, H
SHAPES = [(1, 1, 1, 1), (1, 3, 2, 5), (7, 1, 3, 2), (5, 2, 1, 3), (4, 3, 11, 7), (3, 5, 13, 17), (5, 31, 3, 19)]


def relative(found, expected):
    return np.linalg.norm(found - expected) / max(np.linalg.norm(expected), 1e-300)


def central(function, arrays, name, direction, step=1e-5):
    """The derivative of function(**arrays) along `direction` of one array."""
    ahead, behind = (function(**{**arrays, name: arrays[name] + sign * step * direction}) for sign in (1, -1))
    return (ahead - behind) / (2 * step)


def check_by_differences(function, arrays, gradients, rng):
    """Central differences of a scalar function: along a random direction, and where arrays are small, every element."""
    for name, gradient in gradients.items():
        direction = rng.standard_normal(gradient.shape)
        numeric = central(function, arrays, name, direction)
        scale = np.linalg.norm(gradient) * np.linalg.norm(direction)
        assert abs(numeric - (gradient * direction).sum()) <= 1e-6 * max(abs(numeric), 1e-2 * scale), name
        if gradient.size > 100:
            continue
        for place in np.ndindex(gradient.shape):
            unit = np.zeros(gradient.shape)
            unit[place] = 1
            numeric = central(function, arrays, name, unit)
            assert numeric == pytest.approx(gradient[place], rel=1e-6, abs=1e-8 * abs(gradient).max()), (name, place)


def check_by_complex_step(function, arrays, gradients, rng):
    """The derivative along a random direction, exact to rounding: Im f(x + i 1e-30 d) / 1e-30."""
    for name, gradient in gradients.items():
        direction = rng.standard_normal(gradient.shape)
        shifted = {**arrays, name: arrays[name] + 1e-30j * direction}
        derivative = function(**shifted).imag / 1e-30
        scale = np.linalg.norm(gradient) * np.linalg.norm(direction)
        assert abs(derivative - (gradient * direction).sum()) <= 1e-12 * max(abs(derivative), 1e-2 * scale), name


# matrix products


@DTYPES
@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 5, 3), (5, 1, 3), (5, 3, 1), (7, 11, 13), (1, 1, 4)])
@pytest.mark.parametrize("transposed", ["neither", "left", "right", "both"])
def test_matrix_products_take_transposed_views_and_work_in_place(dtype, shape, transposed):
    M, K, N = shape
    rng = np.random.default_rng(1)
    a, b, start = (rng.standard_normal(size).astype(dtype) for size in ((M, K), (K, N), (M, N)))
    if transposed in ("left", "both"):
        a = a.T.copy().T
    if transposed in ("right", "both"):
        b = b.T.copy().T
    product = np.einsum("mk,kn->mn", a.astype(np.float64), b.astype(np.float64))
    out = np.full((M, N), np.nan, dtype)
    gemm.matmul(out, a, b)
    assert relative(out, product) <= CLOSE[dtype]
    out[:] = start
    gemm.matmul_add(out, a, b)
    assert relative(out, start + product) <= CLOSE[dtype]


def test_matrix_product_adds_into_a_slice_and_leaves_the_rest_alone():
    rng = np.random.default_rng(2)
    whole = np.zeros((6, 4))
    a, b = rng.standard_normal((3, 5)), rng.standard_normal((5, 4))
    gemm.matmul_add(whole[2:5], a, b)
    np.testing.assert_allclose(whole[2:5], a @ b)
    assert not whole[[0, 1, 5]].any()


def guarded(array):
    """A copy that ends where its process may read no further: one element beyond is a segmentation fault."""
    page = mmap.PAGESIZE
    size = -(-max(array.nbytes, 1) // page) * page
    memory = mmap.mmap(-1, size + page)
    start = np.frombuffer(memory, np.uint8)
    assert ctypes.CDLL(None, use_errno=True).mprotect(ctypes.c_void_p(start.ctypes.data + size), page, 0) == 0
    copy = start[size - array.nbytes : size].view(array.dtype).reshape(array.shape)
    copy[:] = array
    return copy


PRODUCTS = [(1, 1, 1), (1, 3, 5), (13, 2, 32), (14, 7, 33), (15, 1, 31), (29, 5, 64), (7, 17, 131), (253, 515, 33)]


@DTYPES
@pytest.mark.parametrize(("M", "K", "N"), PRODUCTS)
@pytest.mark.parametrize("pack", [gemm.pack, gemm.pack_transposed])
def test_a_packed_matrix_holds_all_columns(dtype, M, K, N, pack):
    b = np.random.default_rng(2).standard_normal((K, N)).astype(dtype)
    packed = guarded(np.full(gemm.packed_shape(K, N, dtype), np.nan, dtype))
    pack(packed, guarded(b if pack is gemm.pack else np.ascontiguousarray(b.T)))
    columns = packed.transpose(1, 0, 2).reshape(K, -1)
    np.testing.assert_array_equal(columns[:, :N], b)


@DTYPES
@pytest.mark.parametrize(("M", "K", "N"), PRODUCTS)
@pytest.mark.parametrize("add", [True, False])
@pytest.mark.parametrize("transposed", [True, False])
def test_packed_product_is_the_product_and_stays_within_its_arrays(dtype, M, K, N, add, transposed):
    rng = np.random.default_rng(3)
    a, b, out = (rng.standard_normal(size).astype(dtype) for size in ((M, K), (K, N), (M, N)))
    product = a.astype(np.float64) @ b
    expected = out + product if add else product
    packed = guarded(np.full(gemm.packed_shape(K, N, dtype), np.nan, dtype))
    gemm.pack(packed, b)
    out = guarded(out if add else np.full_like(out, np.nan))
    gemm.packed_matmul(out, guarded(np.ascontiguousarray(a.T)).T if transposed else guarded(a), packed, add)
    assert relative(out, expected) <= CLOSE[dtype]


# embedding


@DTYPES
def test_embedding_is_a_product_with_one_hot_rows_and_its_gradient_adds_up_repeated_tokens(dtype):
    rng = np.random.default_rng(3)
    tokens = rng.integers(0, 7, 50)  # seven of eleven rows, each several times
    table, dx, before = (rng.standard_normal(size).astype(dtype) for size in ((11, 5), (50, 5), (11, 5)))
    onehot = np.eye(11)[tokens]
    x, dtable = np.full_like(dx, np.nan), before.copy()
    embedding.embedding_forward(x, tokens, table)
    np.testing.assert_array_equal(x, onehot @ table)
    embedding.embedding_backward(dtable, tokens, dx)
    assert relative(dtable - before, onehot.T @ dx) <= CLOSE[dtype]
    np.testing.assert_array_equal(dtable[7:], before[7:])
    reference = before.copy()
    embedding.embedding_backward_reference(reference, tokens, dx)
    np.testing.assert_array_equal(dtable, reference)  # both add in order


# LSTM


def lstm_arrays(shape, dtype, seed):
    T, B, D, H = shape
    rng = np.random.default_rng(seed)
    sizes = {"x": (T, B, D), "h0": (B, H), "c0": (B, H), "Wx": (D, 4 * H), "Wh": (H, 4 * H), "b": (4 * H,)}
    arrays = {name: rng.standard_normal(size).astype(dtype) for name, size in sizes.items()}
    return arrays, rng.standard_normal((T, B, H)).astype(dtype), rng


def lstm_compiled(x, h0, c0, Wx, Wh, b, dh=None, between=None):
    """Forward, and where dh is given backward, with outputs full of NaN before."""
    (T, B, D), H, dtype = x.shape, h0.shape[1], x.dtype
    empty = lambda *shape: np.full(shape, np.nan, dtype)
    h, c, gates = empty(T + 1, B, H), empty(T + 1, B, H), empty(T, B, 4 * H)
    h[0], c[0] = h0, c0
    lstm.lstm_forward(h, c, gates, np.full(gemm.packed_shape(H, 4 * H, dtype), np.nan, dtype), x, Wx, Wh, b)
    if dh is None:
        return h, c
    saved = gates.copy()
    dx, dWx, dWh, db = empty(T, B, D), empty(D, 4 * H), empty(H, 4 * H), empty(4 * H)
    scratch = empty(B, H), empty(B, H), np.full(gemm.packed_shape(4 * H, H, dtype), np.nan, dtype)
    lstm.lstm_backward(dx, dWx, dWh, db, gates, *scratch, dh, x, h, c, Wx, Wh, between)
    return h, c, saved, {"x": dx, "Wx": dWx, "Wh": dWh, "b": db}


def lstm_reference(x, h0, c0, Wx, Wh, b, dh):
    h, c, gates = lstm.lstm_forward_reference(x, h0, c0, Wx, Wh, b)
    gradients = lstm.lstm_backward_reference(dh, gates, x, h, c, Wx, Wh)
    return h, c, gates, dict(zip(("x", "Wx", "Wh", "b"), gradients, strict=True))


@DTYPES
@pytest.mark.parametrize("shape", SHAPES)
def test_lstm_equals_its_reference(dtype, shape):
    arrays, dh, _ = lstm_arrays(shape, dtype, 4)
    found = lstm_compiled(**arrays, dh=dh)
    exact = lstm_reference(**{name: array.astype(np.float64) for name, array in {**arrays, "dh": dh}.items()})
    for ours, theirs in zip(found[:3], exact[:3], strict=True):
        assert relative(ours, theirs) <= CLOSE[dtype]
    for name, gradient in exact[3].items():
        assert relative(found[3][name], gradient) <= CLOSE[dtype], name


@pytest.mark.parametrize("shape", SHAPES)
def test_lstm_reference_by_complex_step(shape):
    arrays, dh, rng = lstm_arrays(shape, np.float64, 5)
    gradients = lstm_reference(**arrays, dh=dh)[3]
    loss = lambda **arrays: (dh * lstm.lstm_forward_reference(**arrays)[0][1:]).sum()
    check_by_complex_step(loss, arrays, gradients, rng)


@pytest.mark.parametrize("shape", SHAPES)
def test_lstm_kernel_by_central_differences(shape):
    arrays, dh, rng = lstm_arrays(shape, np.float64, 6)
    gradients = lstm_compiled(**arrays, dh=dh)[3]
    loss = lambda **arrays: (dh * lstm_compiled(**arrays)[0][1:]).sum()
    check_by_differences(loss, arrays, gradients, rng)


def test_lstm_takes_a_ready_input_product_and_calls_between_once_a_step():
    (T, B, D, H), calls = (4, 3, 11, 7), []
    arrays, dh, _ = lstm_arrays((T, B, D, H), np.float64, 7)
    h, c, _, gradients = lstm_compiled(**arrays, dh=dh, between=lambda: calls.append(1))
    assert len(calls) == T
    x, Wx, Wh, b = (arrays[name] for name in ("x", "Wx", "Wh", "b"))
    gates, dWh, db = x @ Wx, np.empty_like(Wh), np.empty_like(b)
    again, cells = np.empty_like(h), np.empty_like(c)
    again[0], cells[0] = arrays["h0"], arrays["c0"]
    lstm.lstm_forward(
        again, cells, gates, np.full(gemm.packed_shape(H, 4 * H, np.float64), np.nan, np.float64), None, None, Wh, b
    )
    np.testing.assert_allclose(again, h, rtol=1e-13)
    scratch = np.empty((B, H)), np.empty((B, H)), np.full(gemm.packed_shape(4 * H, H, np.float64), np.nan, np.float64)
    lstm.lstm_backward(None, None, dWh, db, gates, *scratch, dh, None, again, cells, None, Wh)
    assert relative(dWh, gradients["Wh"]) <= 1e-12
    assert relative(x.reshape(-1, D).T @ gates.reshape(-1, 4 * H), gradients["Wx"]) <= 1e-12  # gates became da


# softmax and cross-entropy


def softmax_arrays(N, V, H, dtype, seed):
    rng = np.random.default_rng(seed)
    sizes = {"y": (N, H), "W": (V, H), "b": (V,)}
    arrays = {name: rng.standard_normal(size).astype(dtype) for name, size in sizes.items()}
    targets = rng.integers(0, V, N)
    targets[rng.random(N) < 0.3] = softmax.IGNORE
    return arrays, targets, rng


def softmax_compiled(R, y, W, b, targets, scale=None, between=None):
    """Losses and, where a scale is given, gradients, with every output and scratch array full of NaN before."""
    loss, logits = np.full(len(y), np.nan, y.dtype), np.full((R, len(b)), np.nan, y.dtype)
    if scale is None:
        softmax.softmax_cross_entropy(loss, None, None, None, logits, y, W, b, targets, 0.0)
        return loss
    gradients = {name: np.full_like(array, np.nan) for name, array in (("y", y), ("W", W), ("b", b))}
    softmax.softmax_cross_entropy(loss, *gradients.values(), logits, y, W, b, targets, scale, between)
    return loss, gradients


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


# activations


@kernel
def map_exp(y, x):
    for i in range(x.size):
        y[i] = exp(x[i])


@kernel
def map_tanh(y, x):
    for i in range(x.size):
        y[i] = tanh(x[i])


@kernel
def map_sigmoid(y, x):
    for i in range(x.size):
        y[i] = sigmoid(x[i])


ACTIVATIONS = {
    map_exp: np.exp,
    map_tanh: np.tanh,
    map_sigmoid: lambda x: np.where(x < 0, np.exp(x), 1) / (1 + np.exp(-abs(x))),
}


def compiled(function, x, dtype):
    x = np.asarray(x, dtype)
    y = np.empty_like(x)
    function(y, x)
    return y


def sweep(low, high):
    """A million float32 between low and high, evenly, and a hundred thousand near zero, by size."""
    near = np.float32(10) ** np.linspace(-30, 0, 50_000, dtype=np.float32)
    return np.concatenate([np.linspace(low, high, 1_000_000, dtype=np.float32), near, -near])


BOUNDS = [(map_exp, -87, 88, 2e-7), (map_tanh, -20, 20, 4e-7), (map_sigmoid, -40, 40, 2e-7)]


@pytest.mark.parametrize(("function", "low", "high", "bound"), BOUNDS)
def test_float32_activations_keep_their_stated_bounds(function, low, high, bound):
    x = sweep(low, high)
    exact = ACTIVATIONS[function](x.astype(np.float64))
    error = abs(compiled(function, x, np.float32) - exact)
    assert (error / exact if function is map_exp else error).max() <= bound


def test_float32_activations_are_constant_beyond_their_range():
    assert len(set(compiled(map_exp, [-87, -88, -1000, -np.inf], np.float32))) == 1
    assert len(set(compiled(map_exp, [88, 89, 1000, np.inf], np.float32))) == 1
    assert len(set(compiled(map_tanh, [7.91, 9, 1e30, np.inf], np.float32))) == 1
    assert len(set(compiled(map_tanh, [-7.91, -9, -1e30, -np.inf], np.float32))) == 1
    assert np.isfinite(compiled(map_exp, [-np.inf, np.inf], np.float32)).all()


@pytest.mark.parametrize("function", ACTIVATIONS)
def test_float64_activations_are_the_librarys(function):
    x = np.linspace(-50, 50, 20_001)
    np.testing.assert_allclose(compiled(function, x, np.float64), ACTIVATIONS[function](x), rtol=4e-15, atol=2e-16)


@DTYPES
@pytest.mark.parametrize("function", ACTIVATIONS)
def test_activations_let_nan_through(dtype, function):
    x = np.zeros(67)
    x[[0, 5, 31, 66]] = np.nan  # in vectorised lanes and in the remainder
    np.testing.assert_array_equal(np.isnan(compiled(function, x, dtype)), np.isnan(x))


# Philox and dropout

ONES = 0xFFFFFFFF
KNOWN_ANSWERS = [  # kat_vectors of Random123, philox4x32 with 10 rounds
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((ONES, ONES, ONES, ONES), (ONES, ONES), (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "answer"), KNOWN_ANSWERS)
def test_philox_gives_the_known_answers(counter, key, answer):
    words = [np.uint64(word) for word in counter + key]
    assert tuple(map(int, dropout.philox(*words))) == answer
    assert tuple(map(int, dropout.philox.py_func(*words))) == answer
    assert dropout.philox_reference(counter, key) == answer


def drop(x, p=0.4, lanes=None, seed=1, step=2, layer=3, function=dropout.dropout):
    y = np.full_like(x, np.nan)
    function(y, x, p, np.arange(x.shape[1]) if lanes is None else np.asarray(lanes), seed, step, layer)
    return y


@DTYPES
@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 1, 2), (2, 2, 3), (1, 3, 4), (3, 2, 5), (2, 3, 17)])
@pytest.mark.parametrize(("seed", "step", "layer"), [(1, 0, 0), (2**31 - 1, 7, 3), (2**40 + 5, 2**32 + 9, 255)])
def test_dropout_equals_its_reference(dtype, shape, seed, step, layer):
    x = np.random.default_rng(12).standard_normal(shape).astype(dtype)
    lanes = np.arange(shape[1]) * 1000 + 5
    expected = dropout.dropout_reference(x, 0.4, lanes, seed, step, layer)
    np.testing.assert_allclose(drop(x, 0.4, lanes, seed, step, layer), expected, rtol=4 * np.finfo(dtype).eps)


def test_dropout_keeps_the_right_share_of_every_column_and_scales_what_stays():
    x, p = np.ones((400, 10, 13)), 0.35
    y = drop(x, p)
    kept = y != 0
    np.testing.assert_allclose(y[kept], 1 / (1 - p), rtol=1e-15)
    assert abs(kept.mean() - (1 - p)) < 5 * np.sqrt(p * (1 - p) / x.size)
    assert (abs(kept.mean(axis=(0, 1)) - (1 - p)) < 5 * np.sqrt(p * (1 - p) / 4000)).all()


def test_dropout_of_zero_copies_and_works_in_place():
    x = np.random.default_rng(13).standard_normal((3, 4, 5))
    np.testing.assert_array_equal(drop(x, 0.0), x)
    y = x.copy()
    dropout.dropout(y, y, 0.4, np.arange(4), 1, 2, 3)
    np.testing.assert_array_equal(y, drop(x))


FAR = 2**32
OTHERS = [{"lanes": np.arange(10) + 10}, {"step": 3}, {"step": 2 + FAR}, {"layer": 4}, {"seed": 2}, {"seed": 1 + FAR}]


@pytest.mark.parametrize("other", OTHERS)
def test_masks_of_other_lanes_steps_layers_and_seeds_are_independent(other):
    x, p = np.ones((40, 10, 101)), 0.4
    same = ((drop(x, p) != 0) == (drop(x, p, **other) != 0)).mean()
    expected = p**2 + (1 - p) ** 2
    assert abs(same - expected) < 5 * np.sqrt(expected * (1 - expected) / x.size)


def test_masks_of_time_steps_and_lanes_of_one_call_are_independent():
    kept, p = drop(np.ones((100, 10, 101)), 0.4) != 0, 0.4
    expected = p**2 + (1 - p) ** 2
    for one, next_one in [(kept[1:], kept[:-1]), (kept[:, 1:], kept[:, :-1]), (kept[..., 1:], kept[..., :-1])]:
        assert abs((one == next_one).mean() - expected) < 5 * np.sqrt(expected * (1 - expected) / one.size)


def test_a_mask_does_not_depend_on_how_lanes_are_grouped():
    x = np.random.default_rng(14).standard_normal((4, 6, 9))
    apart = [drop(np.ascontiguousarray(x[:, part]), lanes=np.arange(6)[part]) for part in (slice(0, 3), slice(3, 6))]
    np.testing.assert_array_equal(drop(x), np.concatenate(apart, axis=1))


def test_dropout_is_its_own_adjoint_so_backward_has_the_forward_mask():
    rng = np.random.default_rng(15)
    x, dy = rng.standard_normal((2, 5, 3, 7))
    assert (drop(x) * dy).sum() == pytest.approx((x * drop(dy)).sum(), rel=1e-12)
    np.testing.assert_array_equal(drop(x) == 0, drop(dy) == 0)


# optimisers

SGD = {
    "plain": {"momentum": 0.0, "nesterov": False, "decay": 0.0},
    "decay": {"momentum": 0.0, "nesterov": False, "decay": 0.1},
    "momentum": {"momentum": 0.9, "nesterov": False, "decay": 0.1},
    "nesterov": {"momentum": 0.9, "nesterov": True, "decay": 0.1},
}
ADAM = {
    "adam": {"decay": 0.0, "decoupled": False},
    "adam with decay": {"decay": 0.1, "decoupled": False},
    "adamw": {"decay": 0.1, "decoupled": True},
}
RMSPROP = {"rmsprop": {"decay": 0.0}, "rmsprop with decay": {"decay": 0.1}}
CASES = [*SGD, *ADAM, *RMSPROP]
STEPS, SIZE = 6, 37


def trajectory(case, theta, gradients, update):
    """theta after every step, by the compiled kernels, their Python or the references: update(kind, ...) does one."""
    kind, options = next(
        (kind, cases[case]) for kind, cases in (("sgd", SGD), ("adam", ADAM), ("rmsprop", RMSPROP)) if case in cases
    )
    theta, moments, path = theta.copy(), [np.zeros_like(theta), np.zeros_like(theta)], []
    for step, gradient in enumerate(gradients, 1):
        theta, moments = update(kind, theta, gradient, moments, step, **options)
        path.append(theta.copy())
    return np.array(path)


def by_kernel(factor=1.0, limit=np.inf, python=False):
    run = (lambda kernel: kernel.py_func) if python else lambda kernel: kernel

    def update(kind, theta, g, moments, step, decay, momentum=None, nesterov=None, decoupled=None):
        if kind == "sgd":
            velocity = moments[0] if momentum else np.empty(0, theta.dtype)
            run(optim.sgd_update)(theta, g, velocity, 0.05, momentum, nesterov, decay, factor, limit)
        elif kind == "adam":
            options = (step, 0.05, 0.9, 0.95, 1e-6, decay, decoupled, factor, limit)
            run(optim.adam_update)(theta, g, *moments, *options)
        else:
            run(optim.rmsprop_update)(theta, g, moments[0], 0.05, 0.9, 1e-6, decay, factor, limit)
        return theta, moments

    return update


def by_reference(factor=1.0, limit=np.inf):
    def update(kind, theta, g, moments, step, **options):
        g = np.clip(g * factor, -limit, limit)
        if kind == "sgd":
            theta, *moments = optim.sgd_reference(theta, g, moments[0], 0.05, **options)
        elif kind == "adam":
            theta, *moments = optim.adam_reference(theta, g, *moments, step, 0.05, 0.9, 0.95, 1e-6, **options)
        else:
            theta, *moments = optim.rmsprop_reference(theta, g, moments[0], 0.05, 0.9, 1e-6, **options)
        return theta, moments

    return update


def by_torch(case, theta, gradients):
    torch = pytest.importorskip("torch")
    parameter = torch.nn.Parameter(torch.tensor(theta))
    if case in SGD:
        options = {**SGD[case]}
        optimizer = torch.optim.SGD([parameter], lr=0.05, weight_decay=options.pop("decay"), **options)
    elif case in ADAM:
        kind = torch.optim.AdamW if ADAM[case]["decoupled"] else torch.optim.Adam
        optimizer = kind([parameter], lr=0.05, betas=(0.9, 0.95), eps=1e-6, weight_decay=ADAM[case]["decay"])
    else:
        decay = RMSPROP[case]["decay"]
        optimizer = torch.optim.RMSprop([parameter], lr=0.05, alpha=0.9, eps=1e-6, weight_decay=decay)
    path = []
    for gradient in gradients:
        parameter.grad = torch.tensor(gradient)
        optimizer.step()
        path.append(parameter.detach().numpy().copy())
    return np.array(path)


def problem(dtype=np.float64):
    rng = np.random.default_rng(16)
    return rng.standard_normal(SIZE).astype(dtype), rng.standard_normal((STEPS, SIZE)).astype(dtype)


@DTYPES
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("factor", "limit"), [(1.0, np.inf), (0.3, np.inf), (1.0, 0.2), (0.5, 0.2)])
def test_updates_equal_their_references_over_several_steps(dtype, case, factor, limit):
    theta, gradients = problem(dtype)
    found = trajectory(case, theta, gradients, by_kernel(factor, limit))
    exact = trajectory(case, theta.astype(np.float64), gradients.astype(np.float64), by_reference(factor, limit))
    assert relative(found, exact) <= CLOSE[dtype]
    assert relative(found, theta) > 1e-2  # it moved


@pytest.mark.parametrize("case", CASES)
def test_updates_equal_pytorchs(case):
    theta, gradients = problem()
    found = trajectory(case, theta, gradients, by_kernel())
    np.testing.assert_allclose(found, by_torch(case, theta, gradients), rtol=1e-12, atol=1e-13)


@DTYPES
@pytest.mark.parametrize("case", CASES)
def test_compiled_updates_equal_their_python(dtype, case):
    theta, gradients = problem(dtype)
    ours, python = (trajectory(case, theta, gradients, by_kernel(0.5, 0.2, python)) for python in (False, True))
    assert relative(ours, python) <= CLOSE[dtype]


def test_clamp_keeps_nan():
    values = [optim.clamp(x, 2.0) for x in (-3.0, -2.0, 0.5, 3.0, np.inf, -np.inf, np.nan)]
    np.testing.assert_array_equal(values, [-2, -2, 0.5, 2, 2, -2, np.nan])


@DTYPES
@pytest.mark.parametrize("size", [0, 1, 4095, 4096, 4097, 100_003])
def test_sum_of_squares_is_exact_to_rounding(dtype, size):
    vector = np.random.default_rng(17).standard_normal(size).astype(dtype)
    expected = (vector.astype(np.float64) ** 2).sum()
    assert optim.sum_of_squares(vector) == pytest.approx(expected, rel=1e-6 if dtype == np.float32 else 1e-13)


# compiled functions against their own Python


def python_cases(dtype):
    rng = np.random.default_rng(18)
    new = lambda *shape: rng.standard_normal(shape).astype(dtype)
    targets, tokens, lanes = np.array([2, -1, 0]), np.array([4, 0, 4]), np.arange(3)
    yield lstm.cell_forward, (new(3, 5), new(3, 5), new(3, 20), new(20), new(3, 5))
    yield lstm.cell_backward, (abs(new(3, 20)), new(3, 5), new(3, 5), new(3, 5), new(3, 5), new(3, 5))
    yield gemm.pack, (np.full(gemm.packed_shape(3, 37, dtype), np.nan, dtype), new(3, 37))
    yield gemm.pack_transposed, (np.full(gemm.packed_shape(19, 37, dtype), np.nan, dtype), new(37, 19))
    yield lstm.sum_rows, (new(7), new(5, 7))
    yield softmax.cross_entropy_rows, (new(3), new(3, 5), new(5), targets)
    yield softmax.cross_entropy_gradient_rows, (new(3), new(3, 5), new(5), new(5), targets, 0.3)
    yield embedding.embedding_forward, (new(3, 4), tokens, new(6, 4))
    yield embedding.embedding_backward, (new(6, 4), tokens, new(3, 4))
    yield dropout.dropout, (new(2, 3, 5), new(2, 3, 5), 0.4, lanes, 1, 2, 3)


@DTYPES
def test_compiled_kernels_equal_their_python(dtype):
    for function, arguments in python_cases(dtype):
        copies = [[np.copy(part) if isinstance(part, np.ndarray) else part for part in arguments] for _ in range(2)]
        function(*copies[0])
        function.py_func(*copies[1])
        for ours, python in zip(*copies, strict=True):
            np.testing.assert_allclose(ours, python, rtol=0, atol=CLOSE[dtype], err_msg=function.__name__)
        assert not all(map(np.array_equal, copies[0], arguments)), function.__name__
