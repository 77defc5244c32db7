"""Compressors: payloads of every size, what is unbiased by statistics, error feedback."""

import math

import numpy as np
import pytest
from helpers.numerics import DTYPES, chosen, numbers
from helpers.powersgd_reference import Workers
from hypothesis import strategies as st

from dllm.comm.compression import NAMES, ErrorFeedback, make_compressor
from dllm.comm.powersgd import PowerSGD
from dllm.errors import UserError

SIZE = st.sampled_from([0, 1, 7, 8, 9, 63, 64, 65, 129, 2047, 2048, 2049, 5001])
REAL = st.sampled_from([np.float32, np.float64])
EVERY_NAME = pytest.mark.parametrize("name", NAMES)
SHAPES = [(3, 5), (7,), (2, 3, 4), (), (1, 9)]  # 15 + 7 + 24 + 1 + 9 = 56 values
P = 56


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
