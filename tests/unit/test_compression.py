"""Compression: kernels against tiny arrays written out and against NumPy, payloads of every size, what is unbiased by
statistics, error feedback.
"""

import math

import numpy as np
import pytest
from helpers.numerics import DTYPES
from helpers.powersgd_reference import Workers
from hypothesis import given, settings
from hypothesis import strategies as st

from dllm.comm.compression import NAMES, ErrorFeedback, make_compressor
from dllm.comm.powersgd import PowerSGD
from dllm.errors import UserError
from dllm.kernels import compress
from dllm.kernels.dropout import philox_reference

SIZE = st.sampled_from([0, 1, 7, 8, 9, 63, 64, 65, 129, 2047, 2048, 2049, 5001])
REAL = st.sampled_from([np.float32, np.float64])
EVERY_NAME = pytest.mark.parametrize("name", NAMES)
SHAPES = [(3, 5), (7,), (2, 3, 4), (), (1, 9)]  # 15 + 7 + 24 + 1 + 9 = 56 values
P = 56


def numbers(size, dtype=np.float64, seed=1):
    """Normal numbers, some of them zero."""
    rng = np.random.default_rng(seed)
    return (rng.standard_normal(size) * (rng.random(size) > 0.1)).astype(dtype)


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


def chosen(n, k, step, seed=1):
    indices = np.full(k, -1, np.int32)
    compress.random_indices(indices, n, seed, step)
    return indices


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


# compressors


def sent(compressor, x, step=0, rank=0):
    """The payload of x."""
    payload = np.full(compressor.size, 0xAA, np.uint8)
    compressor.encode(x, payload, step, rank)
    return payload


def received(compressor, payload):
    out = np.full(compressor.parameters, np.nan, compressor.dtype)
    compressor.decode(payload, out)
    return out


def test_sign_by_hand():
    compressor = make_compressor("sign", [(2, 2), (3,)], np.float64)
    payload = sent(compressor, np.array([1.0, -2, 3, -4, 1, 1, -7]))
    assert payload.size == 16  # two scales, a byte of bits, zeros up to whole 8
    assert payload[:8].view(np.float32).tolist() == [2.5, 3]
    assert payload[8:].tolist() == [0b0110101, *[0] * 7]
    np.testing.assert_array_equal(received(compressor, payload), [2.5, -2.5, 2.5, -2.5, 3, 3, -3])


def test_the_largest_in_a_payload_by_hand():
    compressor = make_compressor("top-k", [(2, 2), (3,)], np.float32, fraction=0.3)
    payload = sent(compressor, np.float32([1, -2, 3, -4, 1, 1, -7]))
    assert payload[:8].view(np.float32).tolist() == [-4, -7]
    assert payload[8:].view(np.int32).tolist() == [3, 6]
    np.testing.assert_array_equal(received(compressor, payload), [0, 0, 0, -4, 0, 0, -7])


def test_random_k_in_a_payload():
    sender, receiver = (make_compressor("random-k", [(2, 2), (3,)], np.float64, fraction=0.3) for _ in range(2))
    x = np.arange(1.0, 8)
    payload = sent(sender, x, step=5)
    assert payload[:8].view(np.int64)[0] == 5
    indices = chosen(7, 2, 5)
    np.testing.assert_allclose(payload[8:].view(np.float64), x[indices] * 7 / 2)
    out = received(receiver, payload)  # which was told no step
    assert set(np.flatnonzero(out)) == set(indices)
    np.testing.assert_allclose(out[indices], x[indices] * 7 / 2)


@EVERY_NAME
@DTYPES
def test_decode_overwrites_add_adds_and_encode_leaves_the_vector_alone(name, dtype):
    compressor, x = make_compressor(name, SHAPES, dtype, 0.2), numbers(P, dtype)
    before = x.copy()
    payload = sent(compressor, x)
    np.testing.assert_array_equal(x, before)
    np.testing.assert_array_equal(payload, sent(make_compressor(name, SHAPES, dtype, 0.2), x))  # padding too
    out, total = received(compressor, payload), numbers(P, dtype, 3)
    expected = total.astype(float) - 0.25 * out
    compressor.add(payload, total, -0.25)
    np.testing.assert_allclose(total, expected, rtol=1e-6 if dtype == np.float32 else 1e-13)
    assert np.linalg.norm(out - x) <= (1.05 - compressor.contraction) ** 0.5 * np.linalg.norm(x)


@EVERY_NAME
def test_bytes_of_a_payload(name):
    shapes, n = [(100, 50), (17,)], 5017
    bytes_of = {
        "none": 4 * n, "bf16": 2 * n, "qsgd": 3 * 4 + n, "sign": 8 + -(-n // 8), "top-k": 50 * 8, "random-k": 8 + 50 * 4
    }  # fmt: skip
    compressor = make_compressor(name, shapes, np.float32)
    assert compressor.size == -(-bytes_of[name] // 8) * 8
    assert (compressor.name, compressor.parameters) == (name, n)


@EVERY_NAME
@pytest.mark.parametrize("shapes", [[], [(0,)], [(1,)], [(0, 3), (1,)]])
def test_vectors_of_no_and_one_element(name, shapes):
    compressor = make_compressor(name, shapes, np.float32)
    x = np.full(compressor.parameters, 0.75, np.float32)
    np.testing.assert_array_equal(received(compressor, sent(compressor, x)), x)


@EVERY_NAME
def test_payloads_lie_one_behind_the_other(name):
    compressor = make_compressor(name, SHAPES, np.float64, 0.2)
    everyones = np.zeros((3, compressor.size), np.uint8)
    for rank, payload in enumerate(everyones):
        compressor.encode(numbers(P, seed=rank), payload, 4, rank)
        np.testing.assert_array_equal(payload, sent(compressor, numbers(P, seed=rank), 4, rank))


@pytest.mark.parametrize("name", sorted({*NAMES} - {"random-k"}))  # which may not send it
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_arrives_so(name, bad):
    compressor, x = make_compressor(name, SHAPES, np.float32), numbers(P, np.float32)
    x[20] = bad
    assert not np.isfinite(received(compressor, sent(compressor, x))).all()


@pytest.mark.parametrize("name", [name for name in NAMES if make_compressor(name, SHAPES, np.float64).unbiased])
@DTYPES
def test_unbiased_ones_are_right_on_average(name, dtype):
    compressor, x, steps = make_compressor(name, SHAPES, dtype, 0.2, seed=3), numbers(P, dtype), 4000
    found = np.array([received(compressor, sent(compressor, x, step, step % 3)) for step in range(steps)], float)
    spread = found.std(axis=0) / math.sqrt(steps)
    assert (abs(found.mean(axis=0) - x) <= 5 * spread + 1e-6 * abs(x).max()).all()
    assert name == "none" or spread.any()


def test_the_errors_of_other_ranks_steps_and_positions_are_independent():
    x = np.full(4096, 0.3137)
    x[::2048] = 1
    compressor = make_compressor("qsgd", [(4096,)], np.float64)
    errors = [received(compressor, sent(compressor, x, step, rank)) - x for step, rank in ((0, 0), (1, 0), (0, 1), (2**32, 0))]
    errors.append(np.roll(errors[0], 1))
    assert (abs(np.corrcoef(errors) - np.eye(5)) < 5 / math.sqrt(4096)).all()


def test_bad_settings_are_refused_in_one_line():
    with pytest.raises(UserError, match=r"no compression called 'zip'; there are top-k, random-k, sign, qsgd, bf16, none"):
        make_compressor("zip", SHAPES, np.float32)
    for fraction in (0, -1, 1.5, math.nan):
        with pytest.raises(UserError, match="above 0 and at most 1"):
            make_compressor("top-k", SHAPES, np.float32, fraction)
    with pytest.raises(UserError, match="at least 1, not 0"):
        PowerSGD(Workers(1).comm(0), SHAPES, np.float32, 0)
    with pytest.raises(UserError, match="2,147,483,648"):
        make_compressor("top-k", [(2**16, 2**15)], np.float32)


# error feedback


@EVERY_NAME
@DTYPES
def test_all_that_was_sent_and_what_is_remembered_is_all_that_was_to_be_sent(name, dtype):
    feedback = ErrorFeedback(make_compressor(name, SHAPES, dtype, 0.1, feedback=True))
    payload, rng = np.zeros(feedback.compressor.size, np.uint8), np.random.default_rng(4)
    total, arrived = np.zeros(P), np.zeros(P)
    for step in range(100):
        x = rng.standard_normal(P).astype(dtype)
        total += x
        feedback.encode(x, payload, step, 0)
        arrived += received(feedback.compressor, payload)
    np.testing.assert_allclose(arrived + feedback.memory, total, atol=1e-4 if dtype == np.float32 else 1e-12)
    assert abs(feedback.memory).max() < 100
    assert name == "none" or feedback.memory.any()


def test_a_vector_that_is_not_finite_leaves_the_memory_alone():
    feedback = ErrorFeedback(make_compressor("sign", SHAPES, np.float32))
    payload, x = np.zeros(feedback.compressor.size, np.uint8), numbers(P, np.float32)
    feedback.encode(x, payload, 0, 0)
    before = feedback.memory.copy()
    x[3] = np.inf
    feedback.encode(x, payload, 1, 0)
    np.testing.assert_array_equal(feedback.memory, before)
    assert not np.isfinite(received(feedback.compressor, payload)).all()


def test_error_feedback_of_what_is_no_contraction_is_refused():
    with pytest.raises(ValueError, match="feedback=True"):
        ErrorFeedback(make_compressor("random-k", SHAPES, np.float32, 0.1))
