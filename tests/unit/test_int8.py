"""Products of int8 against plain products of whole numbers, to the bit; what rounding does; what it costs a model."""

import os
import subprocess
import sys

import numpy as np
import pytest
from helpers.numerics import V, build, configured, guarded, in_panels, nan_panels, out_of_panels, padding, relative
from hypothesis import given, settings
from hypothesis import strategies as st

from dllm.inference.decoded_losses import DecodedLosses
from dllm.kernels import gemm, int8, processor
from dllm.kernels.sample import BAD, Choice
from dllm.model import torch_weights
from dllm.model.batch import Batch
from dllm.model.decoder import Decoder
from dllm.model.precision import described, products_of

needs_int8 = pytest.mark.skipif(not int8.HOW, reason="this processor has no instructions for int8")
SHAPES = [(1, 1, 1), (1, 64, 16), (2, 65, 17), (13, 3, 5), (29, 131, 33), (230, 67, 31), (7, 2051, 7)]
SIZE = st.one_of(st.integers(1, 40), st.sampled_from([1, 2, 3, 5, 7, 13, 16, 17, 61, 63, 64, 65, 127, 227, 521]))
SUMS = gemm.aligned((int8.PANELS, int8.HEIGHT, 16), np.int32)


def matrix(rng, M, N):
    """Normal numbers of very different sizes from row to row, some of them zero, as some rows are."""
    x = rng.standard_normal((M, N)) * 10.0 ** rng.integers(-12, 12, (M, 1)) * (rng.random((M, N)) > 0.1)
    return (x * (rng.random((M, 1)) > 0.1)).astype(np.float32)


def left_of(x, row=0, place=lambda array: array, x_row=0):
    """Rows of x, from x_row on, as left factor behind `row` rows of something else."""
    M, K = x.shape
    words = np.random.default_rng(9).integers(-(2**31), 2**31, (-(-K // 64), row + M - x_row, 16)).astype(np.int32)
    left = int8.Left(place(words), place(np.full(row + M - x_row, np.nan, np.float32)))
    int8.quantise_rows(left, row, place(in_panels(x)), x_row, M - x_row)
    return left


def right_of(x, place=lambda array: array):
    *arrays, depth = int8.quantised_columns(in_panels(x), len(x))
    return int8.Right(*map(place, arrays), depth)


def check_products(shape, rows=(0, 0, 0), seed=1, place=lambda array: array):
    """multiply against the oracle, to the bit, behind some rows of c, of the left factor and of what it is made of."""
    (M, K, N), rng = shape, np.random.default_rng(seed)
    a, b, start = matrix(rng, M + rows[2], K), matrix(rng, N, K).T.copy(), matrix(rng, M + rows[0], N)
    product = int8.multiply_reference(a[rows[2] :], b)
    left, right = left_of(a, rows[1], place, rows[2]), right_of(b, place)
    for add in (False, True):
        c = place(in_panels(start) if add else nan_panels(M + rows[0], N, np.float32))
        int8.multiply(c, rows[0], left, rows[1], right, 0, place(SUMS), M, add)
        np.testing.assert_array_equal(out_of_panels(c, N, rows[0]), start[rows[0] :] + product if add else product)
        assert not padding(c[:, rows[0] :], N).any()
        if add:
            np.testing.assert_array_equal(out_of_panels(c, N)[: rows[0]], start[: rows[0]])


@given(M=st.integers(1, 9), K=SIZE, row=st.integers(0, 3), seed=st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_rows_are_rounded_to_the_nearest_of_255_levels(M, K, row, seed):
    x = matrix(np.random.default_rng(seed), M, K)
    x[0, 0] = seed - 50
    q, s = int8.quantised_rows_reference(x)
    left = left_of(x, row)
    words = np.ascontiguousarray(left.words[:, row:].transpose(1, 0, 2)).view(np.uint8).reshape(M, -1)
    np.testing.assert_array_equal(words[:, :K].astype(int) - 128, q)
    np.testing.assert_array_equal(left.scales[row:], s)
    assert abs(q).max() <= 127
    assert (abs(q * s.astype(np.float64)[:, None] - x) <= 0.5001 * s[:, None]).all()
    zero = ~x.any(axis=1)
    assert not q[zero].any()
    assert not s[zero].any()
    assert (abs(q[~zero]).max(axis=1, initial=0) == 127)[s[~zero] > 1e-30].all()


def test_ties_go_to_even_and_tiny_rows_are_zeros():
    x = np.float32([[127, 0.5, 1.5, -2.5, 3.5, -0.5], [1e-31, 0, 0, -1e-32, 0, 0]])
    q, s = int8.quantised_rows_reference(x)
    assert q.tolist() == [[127, 0, 2, -2, 4, 0], [0] * 6]
    words = left_of(x).words[0].view(np.uint8)[:, :6]
    assert (words.astype(int) - 128).tolist() == q.tolist()
    assert s[0] == 1


def test_columns_are_rounded_as_rows_are():
    x = matrix(np.random.default_rng(3), 21, 131)
    x[5, 7], x[6, 8] = np.nan, np.inf
    (q, s), right = int8.quantised_rows_reference(x), right_of(x.T.copy())
    assert right.quads.shape == (2, 48, 16)
    bytes_of = right.quads.view(np.int8).reshape(2, 48, 16, 4).transpose(0, 2, 1, 3).reshape(32, 192)
    np.testing.assert_array_equal(bytes_of[:21, :131], q)
    assert not bytes_of[21:].any()
    assert not bytes_of[:, 131:].any()
    np.testing.assert_array_equal(right.scales.reshape(-1)[:21], s)
    np.testing.assert_array_equal(right.offsets.reshape(-1)[:21], 128 * q.sum(axis=1))


def test_weights_that_a_file_has_as_int8_are_rounded_no_further():
    q, s = torch_weights.quantise(matrix(np.random.default_rng(7), 50, 131))
    again, _ = int8.quantised_rows_reference(q * s[:, None])
    np.testing.assert_array_equal(again[s > 1e-30], q[s > 1e-30])


@needs_int8
@pytest.mark.parametrize("shape", SHAPES)
def test_products_stay_within_their_arrays(shape):
    check_products(shape, place=guarded)


@needs_int8
@given(shape=st.tuples(SIZE, SIZE, SIZE), rows=st.tuples(*[st.integers(0, 3)] * 3), seed=st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_products_of_any_shape_are_those_of_whole_numbers_to_the_bit(shape, rows, seed):
    check_products(shape, rows, seed)


@needs_int8
def test_the_largest_sums_fit():
    K = 70_001
    a, b = np.ones((1, K), np.float32), np.ones((K, 1), np.float32)
    for sign in (1, -1):
        c = nan_panels(1, 1, np.float32)
        int8.multiply(c, 0, left_of(a), 0, right_of(sign * b), 0, SUMS, 1, False)
        assert c[0, 0, 0] == pytest.approx(sign * K, rel=1e-6)


@needs_int8
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_stays_in_its_row_and_its_column(bad):
    rng = np.random.default_rng(4)
    a, b = rng.standard_normal((5, 40), np.float32), rng.standard_normal((40, 20), np.float32)
    expected = int8.multiply_reference(a, b)
    a[3, 7], b[9, 4] = bad, bad
    expected[3], expected[:, 4] = np.nan, np.nan
    c = nan_panels(5, 20, np.float32)
    int8.multiply(c, 0, left_of(a), 0, right_of(b), 0, SUMS, 5, False)
    np.testing.assert_array_equal(out_of_panels(c, 20), expected)


@needs_int8
@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("name", ["embedding.weight", "lstm.0.weight_h"])
def test_a_stream_whose_numbers_are_not_finite_has_no_next_token_and_the_others_do_not_notice(name, bad):
    model, slots, choices = build(configured(hidden=20), dtype=np.float32, training=False), np.arange(3), []
    for broken in (False, True):
        if broken:
            tensor = model.layout.read(model.theta, name)
            tensor[7, 1] = bad
            model.layout.write(model.theta, name, tensor)
        decoder, choice = Decoder(model, 3, "int8"), Choice(3)
        decoder.read(np.array([[1, 7, 2], [3, 3, 4], [5, 6, 0]]), slots)
        decoder.choose(choice, slots)
        choices.append(choice.token.tolist())
    told, other = choices
    assert other == ([told[0], BAD, told[2]] if name == "embedding.weight" else [BAD] * 3)


def test_the_reference_has_a_hundredth_of_error():
    rng = np.random.default_rng(5)
    a, b = rng.standard_normal((64, 300), np.float32), rng.standard_normal((300, 50), np.float32)
    assert 1e-4 < relative(int8.multiply_reference(a, b), a @ b) < 0.015


@needs_int8
def test_products_with_narrower_vectors():
    """The instruction of 32 bytes, where there are no larger vectors."""
    program = "import test_int8\nfor shape in test_int8.SHAPES: test_int8.check_products(shape, place=test_int8.guarded)\n"
    program += "print(test_int8.processor.VECTOR)"
    environment = {**os.environ, "DLLM_HIDE_FEATURES": "avx512f", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) == min(32, processor.VECTOR)


def test_without_instructions_products_are_those_of_float32_and_a_line_says_so():
    program = """
import numpy as np
from helpers.numerics import build, configured
from dllm.model.decoder import Decoder
from dllm.model.precision import described, products_of
model = build(configured(), dtype=np.float32, training=False)
states = []
for precision in ("fp32", "int8"):
    decoder = Decoder(model, 1, precision)
    decoder.read(np.arange(4)[:, None], np.zeros(1, np.int64))
    states.append(decoder.states)
assert np.array_equal(*states)
print(products_of("int8", np.float32), described("int8"))
"""
    environment = {**os.environ, "DLLM_HIDE_FEATURES": "avx512vnni,amx-int8", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "fp32 int8 asked for, products in fp32: this processor has no instructions for int8\n"


@needs_int8
def test_what_multiplies_has_a_name():
    assert products_of("int8", np.float32) == "int8"
    assert described("int8") == f"int8 by {int8.HOW}"
    assert products_of("int8", np.float64) == "fp64"
    assert described("fp32") == products_of("fp32", np.float32) == "fp32"
    assert described("int8", np.float64) == "int8 asked for, products in fp64: the model's parameters are float64"


def learnt(steps=300, lanes=16, window=12):
    """A model that has learnt to count, with noise, by plain steps of Adam; and texts (T,B) of the same kind."""
    config = configured(embedding=8, hidden=24)
    model, rng = build(config, lanes=lanes, window=window, dtype=np.float32), np.random.default_rng(6)

    def texts():
        jumps = rng.choice([1, 3], p=[0.8, 0.2], size=(window + 1, lanes))
        return (rng.integers(0, V, lanes) + jumps.cumsum(axis=0)) % V

    m, v = np.zeros((2, model.layout.size))
    h, c = np.zeros((2, config.layers, lanes, config.hidden), np.float32)
    for step in range(1, steps + 1):
        text = texts()
        h[:], c[:] = 0, 0
        model.gradient[:] = 0
        model.forward(Batch(text[:-1], text[1:]), h, c, 1 / (window * lanes))
        model.backward()
        m, v = 0.9 * m + 0.1 * model.gradient, 0.99 * v + 0.01 * model.gradient.astype(float) ** 2
        model.theta -= (0.01 * (m / (1 - 0.9**step)) / (np.sqrt(v / (1 - 0.99**step)) + 1e-8)).astype(np.float32)
    return model, texts()


@needs_int8
def test_a_trained_model_loses_a_hundredth_of_its_perplexity_at_most():
    model, text = learnt()
    loss = {}
    for precision in ("fp32", "int8"):
        h, c = np.zeros((2, 2, text.shape[1], 24), np.float32)
        losses = DecodedLosses(model, text.shape[1], precision).forward(Batch(text[:-1], text[1:]), h, c)
        loss[precision] = losses.mean()
    h, c = np.zeros((2, 2, text.shape[1], 24), np.float32)
    plain = model.forward(Batch(text[:-1], text[1:]), h, c)
    assert loss["fp32"] == pytest.approx(plain.mean(), rel=1e-5)
    assert loss["fp32"] < 0.75  # of log(11) = 2.4: it has learnt
    assert loss["int8"] != loss["fp32"]
    assert abs(np.expm1(loss["int8"] - loss["fp32"])) < 0.01
