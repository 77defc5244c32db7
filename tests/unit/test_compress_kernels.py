"""kernels/compress.py against tiny arrays written out, against NumPy, and against their own Python."""

import math

import numpy as np
import pytest
from helpers.numerics import DTYPES, chosen, numbers
from hypothesis import given, settings
from hypothesis import strategies as st

from dllm.comm.compression import NAMES
from dllm.kernels import compress
from dllm.kernels.dropout import philox_reference

SIZE = st.sampled_from([0, 1, 7, 8, 9, 63, 64, 65, 129, 2047, 2048, 2049, 5001])
REAL = st.sampled_from([np.float32, np.float64])
EVERY_NAME = pytest.mark.parametrize("name", NAMES)
SHAPES = [(3, 5), (7,), (2, 3, 4), (), (1, 9)]  # 15 + 7 + 24 + 1 + 9 = 56 values
P = 56


def words(x):
    return x.view(f"u{x.itemsize}")


# signs


@DTYPES
def test_signs_by_hand(dtype):
    x = np.array([1, -2, 0, -0.0, -1e-30, 3, np.nan, np.inf, -np.inf, 5], dtype)
    bits = np.full(2, 0xFF, np.uint8)
    compress.pack_signs(bits, x)
    np.testing.assert_array_equal(bits, [0b10101101, 0b10])  # from the right: zeros count as positive, NaN as negative
    out = np.full(10, np.nan, dtype)
    compress.unpack_signs(out, bits, 0.5)
    np.testing.assert_array_equal(out, [0.5, -0.5, 0.5, 0.5, -0.5, 0.5, -0.5, 0.5, -0.5, 0.5])
    part = np.ones(4, dtype)
    compress.add_signs(part, bits, 2.0, 5)  # of elements 5 to 8
    np.testing.assert_array_equal(part, [3, -1, 3, -1])


@given(n=SIZE, first=st.integers(0, 20), dtype=REAL)
@settings(deadline=None)
def test_signs_equal_packbits_of_numpy(n, first, dtype):
    x = numbers(first + n, dtype)
    bits = np.zeros(-(-x.size // 8), np.uint8)
    compress.pack_signs(bits, x)
    np.testing.assert_array_equal(bits, np.packbits(x >= 0, bitorder="little"))
    expected = np.where(x >= 0, dtype(0.3), -dtype(0.3))[first:]
    out = np.full(n, np.nan, dtype)
    compress.unpack_signs(out, bits, 0.3, first)
    np.testing.assert_array_equal(out, expected)
    compress.add_signs(out, bits, 0.3, first)
    np.testing.assert_array_equal(out, 2 * expected)


@given(n=SIZE, dtype=REAL)
@settings(deadline=None)
def test_sum_of_magnitudes(n, dtype):
    x = numbers(n, dtype)
    assert compress.sum_of_magnitudes(x) == pytest.approx(
        abs(x.astype(float)).sum(), rel=1e-5 if dtype == np.float32 else 1e-13
    )


# levels


@DTYPES
def test_whole_levels_stay_what_they_are(dtype):
    """127 x / m is a whole number everywhere, so nothing is left to chance."""
    x = np.array([0, 1, -2, 127, -127, 64, 3], dtype) / 8
    q, norms = np.empty(7, np.int8), np.empty(1, np.float32)
    for step in range(50):
        compress.quantise(q, norms, x, 1, step, 0)
        np.testing.assert_array_equal(q, [0, 1, -2, 127, -127, 64, 3])
    assert norms[0] == 127 / 8
    out = np.full(7, np.nan, dtype)
    compress.dequantise(out, q, norms, 1.0, False)
    np.testing.assert_array_equal(out, x)
    compress.dequantise(out, q, norms, -0.5, True)
    np.testing.assert_array_equal(out, x / 2)


@given(n=SIZE, dtype=REAL, scale=st.sampled_from([1e-25, 1.0, 1 / 3, 1e30]), step=st.integers(0, 2**40))
@settings(deadline=None)
def test_levels_are_next_to_the_value_and_ends_stay_in_range(n, dtype, scale, step):
    x = (numbers(n, dtype) * dtype(scale)).astype(dtype)
    blocks = -(-n // compress.BLOCK)
    q, norms = np.full(n, 99, np.int8), np.full(blocks, np.nan, np.float32)
    compress.quantise(q, norms, x, 1, step, 3)
    m = np.repeat([abs(x[b * 2048 : (b + 1) * 2048]).max() for b in range(blocks)], 2048)[:n] if n else np.zeros(0)
    np.testing.assert_allclose(np.repeat(norms, 2048)[:n], m, rtol=1e-7)
    assert (abs(127 * x / np.where(m, m, 1) - q) < 1.0001).all()
    assert (abs(q[abs(x) == m]) == np.where(m, 127, 0)[abs(x) == m]).all()


def oracle_of_levels(x, seed, step, rank):
    """One block, in Python's own integers and float64."""
    m = max(map(abs, x.tolist()))
    expected = []
    for i, value in enumerate(x.tolist()):
        group, place = divmod(i, 128)
        word, half = divmod(place // 16, 2)
        counter = group * 16 + place % 16, rank, step % 2**32, 0xFF | step >> 32 << 8
        random = philox_reference(counter, (seed % 2**32, seed >> 32))[word]
        u = ((random >> 16 * half) % 2**16 + 0.5) / 2**16
        expected.append(math.floor(127 * value / m + u))
    return expected


def test_levels_follow_from_seed_step_rank_and_position():
    x = numbers(300)
    for seed, step, rank in [(1, 0, 0), (2**40 + 7, 2**35 + 9, 5)]:
        q, norms = np.empty(300, np.int8), np.empty(1, np.float32)
        compress.quantise(q, norms, x, seed, step, rank)
        assert q.tolist() == oracle_of_levels(x / norms[0], seed, step, rank)


def test_levels_of_blocks_that_are_tiny_zero_or_not_finite():
    x = np.concatenate([np.full(2048, value) for value in (0.0, 1e-38, 1.0, 1.0)]).astype(np.float32)
    x[2 * 2048 + 5], x[3 * 2048 + 6] = np.nan, -np.inf
    q, norms, out = np.empty(x.size, np.int8), np.empty(4, np.float32), np.empty_like(x)
    compress.quantise(q, norms, x, 1, 1, 0)
    compress.dequantise(out, q, norms, 1.0, False)
    assert not out[:4096].any()
    assert np.isnan(out[4096:]).all()


# bfloat16

HALVES = [  # bits of a float32 -> of the nearest bfloat16
    (0x00000000, 0x0000), (0x80000000, 0x8000),
    (0x3F800000, 0x3F80), (0x3F807FFF, 0x3F80),  # 1, and a little more
    (0x3F808000, 0x3F80), (0x3F818000, 0x3F82), (0xBF808000, 0xBF80), (0xBF818000, 0xBF82),  # ties: to even
    (0x3F808001, 0x3F81), (0x3FFFFFFF, 0x4000),  # just above a tie; up to the next power of two
    (0x7F7F0000, 0x7F7F), (0x7F7FFFFF, 0x7F80), (0x7F800000, 0x7F80), (0xFF800000, 0xFF80),  # largest; too large; infinities
    (0x7FC00000, 0x7FC0), (0x7F800001, 0x7FC0), (0xFFFFFFFF, 0xFFFF),  # NaN, also where cutting it off leaves infinity
    (0x00000001, 0x0000), (0x00008000, 0x0000), (0x00008001, 0x0001), (0x00018000, 0x0002),  # subnormals
    (0x007FFFFF, 0x0080), (0x807F8000, 0x8080), (0x00400000, 0x0040),
]  # fmt: skip


def test_bfloat16_by_hand():
    bits, expected = (np.array(column) for column in zip(*HALVES, strict=True))
    x = bits.astype(np.uint32).view(np.float32)
    for kernel in (compress.round_bf16, compress.round_bf16.py_func):
        halves = np.zeros(x.size, np.uint16)
        with np.errstate(over="ignore"):  # of whole numbers, where NumPy runs it
            kernel(halves, x)
        np.testing.assert_array_equal(halves, expected)
    out = np.full_like(x, 7)
    compress.widen_bf16(out, halves, 1.0, False)
    np.testing.assert_array_equal(words(out), np.uint32(expected) << np.uint32(16))


@DTYPES
def test_every_bfloat16_is_itself_and_numbers_in_between_go_to_the_nearest(dtype):
    every = np.arange(2**16, dtype=np.uint16)
    values = np.zeros(2**16, dtype)
    compress.widen_bf16(values, every, 1.0, False)
    finite = np.isfinite(values)
    halves = np.zeros_like(every)
    compress.round_bf16(halves, values)
    np.testing.assert_array_equal(halves[~np.isnan(values)], every[~np.isnan(values)])
    x = np.random.default_rng(2).permutation(values[finite]) * dtype(1.00217)
    compress.round_bf16(halves[: x.size], x)
    out = np.ones(x.size, dtype)
    compress.widen_bf16(out, halves[: x.size], 0.5, True)
    inside = abs(x) < 3.38e38
    assert (abs((out - 1) * 2 - x)[inside] <= 1.001 * 2.0**-8 * abs(x)[inside] + 1e-6).all()


# the largest


@DTYPES
def test_the_largest_by_hand(dtype):
    x = np.array([1, -3, 3, 0, -2, 3, 2], dtype)
    indices, values, counts = np.full(4, -1, np.int32), np.zeros(4, dtype), np.empty(65536, np.int64)
    compress.select_largest(indices, values, x, words(x), counts)
    assert (indices.tolist(), values.tolist()) == ([1, 2, 4, 5], [-3, 3, -2, 3])  # of the two 2s the first
    out = np.ones(7, dtype)
    compress.scatter_add(out, indices, values, 10.0)
    np.testing.assert_array_equal(out, [1, -29, 31, 1, -19, 31, 1])


@given(n=SIZE, share=st.floats(0, 1), dtype=REAL, ties=st.booleans(), seed=st.integers(0, 99))
@settings(deadline=None)
def test_the_largest_equal_a_stable_sort(n, share, dtype, ties, seed):
    x = numbers(n, dtype, seed) * dtype(10.0) ** np.random.default_rng(seed).integers(-30, 30, n).astype(dtype)
    x = np.round(x).clip(-3, 3) if ties else x
    k = round(share * n)
    indices, values, counts = np.full(k, -1, np.int32), np.zeros(k, dtype), np.empty(65536, np.int64)
    compress.select_largest(indices, values, x, words(x), counts)
    expected = np.sort(np.argsort(-abs(x), kind="stable")[:k])
    np.testing.assert_array_equal(indices, expected)
    np.testing.assert_array_equal(values, x[expected])


def test_what_is_not_a_number_is_among_the_largest():
    x = np.array([1e30, np.nan, np.inf, 5, -np.nan], np.float32)
    indices, values = np.zeros(3, np.int32), np.zeros(3, np.float32)
    compress.select_largest(indices, values, x, words(x), np.empty(65536, np.int64))
    assert indices.tolist() == [1, 2, 4]


# random ones


@given(n=st.integers(1, 3000), share=st.floats(0, 1), step=st.integers(0, 2**40))
@settings(deadline=None)
def test_random_indices_are_distinct_in_range_and_ascend_but_for_one_jump(n, share, step):
    indices = chosen(n, round(share * n), step)
    assert len(set(indices.tolist())) == indices.size
    assert ((indices >= 0) & (indices < n)).all()
    assert (np.diff(indices) < 0).sum() <= 1


@pytest.mark.parametrize(("n", "k"), [(37, 5), (100, 1), (64, 16), (11, 10), (9, 9)])
def test_every_index_is_as_likely_as_any_other(n, k):
    steps, p = 6000, k / n
    counts = np.bincount(np.concatenate([chosen(n, k, step) for step in range(steps)]), minlength=n)
    assert (abs(counts - steps * p) <= 5 * math.sqrt(steps * p * (1 - p))).all()


@pytest.mark.parametrize(("seed", "step"), [(1, 0), (2**40 + 7, 2**35 + 9)])
def test_random_indices_equal_integers_of_python(seed, step):
    n, k, expected = 101, 13, []
    word = lambda c0: philox_reference((c0, 2**32 - 1, step % 2**32, 0xFF | step >> 32 << 8), (seed % 2**32, seed >> 32))
    high, low, _, _ = word(2**32 - 1)
    for j in range(k):
        start, stop = j * n // k, (j + 1) * n // k
        expected.append((start + (word(j // 4)[j % 4] * (stop - start) >> 32) + (high << 32 | low) % n) % n)
    assert chosen(n, k, step, seed).tolist() == expected


def test_random_indices_depend_on_seed_and_step_and_reach_the_end_of_large_vectors():
    assert chosen(10**6, 50, 3).tolist() == chosen(10**6, 50, 3).tolist()
    others = [chosen(10**6, 50, step, seed) for step, seed in ((4, 1), (3, 2), (3 + 2**32, 1), (3, 1 + 2**32))]
    assert all((chosen(10**6, 50, 3) != other).all() for other in others)
    large = chosen(2**31 - 1, 1000, 1)
    assert large.min() >= 0
    assert large.max() > 2**31 * 0.99


# compiled functions against their own Python


def python_cases(dtype):
    x, out = numbers(300, dtype), numbers(300, dtype, 2)
    bits, halves, counts = np.zeros(38, np.uint8), np.zeros(300, np.uint16), np.zeros(65536, np.int64)
    some, values = np.zeros(20, np.int32), np.zeros(20, dtype)
    yield compress.add_values, (out, x, 0.3, True)
    yield compress.pack_signs, (bits, x)
    yield compress.add_signs, (out[:200], np.arange(38, dtype=np.uint8), 0.3, 5)
    yield compress.quantise, (np.zeros(300, np.int8), np.zeros(1, np.float32), x, 1, 2, 3)
    yield compress.dequantise, (out, np.arange(300).astype(np.int8), np.ones(1, np.float32), 0.3, True)
    yield compress.widen_bf16, (out, np.arange(300).astype(np.uint16) * 50, 0.3, True)
    yield compress.round_bf16, (halves, x)
    yield compress.select_largest, (some, values, x, words(x), counts)
    yield compress.gather, (values, np.arange(20, dtype=np.int32) * 3, x, 0.3)
    yield compress.scatter_add, (out, np.arange(20, dtype=np.int32) * 3, values + 1, 0.3)


@DTYPES
def test_compiled_kernels_equal_their_python(dtype):
    for function, arguments in python_cases(dtype):
        copies = [[np.copy(part) if isinstance(part, np.ndarray) else part for part in arguments] for _ in range(2)]
        function(*copies[0])
        with np.errstate(over="ignore"):
            function.py_func(*copies[1])
        for ours, python in zip(*copies, strict=True):
            np.testing.assert_allclose(ours, python, rtol=4 * np.finfo(dtype).eps, atol=1e-6, err_msg=function.__name__)
        assert not all(map(np.array_equal, copies[0], arguments)), function.__name__
