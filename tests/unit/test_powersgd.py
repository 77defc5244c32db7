"""PowerSGD against textbook NumPy on one to five ranks that are threads, and known sizes of a large model."""

import math

import numpy as np
import pytest
from helpers.numerics import DTYPES
from helpers.powersgd_reference import LENGTH, MATRICES, Workers, by_textbook, gradients

from dllm.comm import compression
from dllm.comm.compression import make_compressor
from dllm.comm.powersgd import PowerSGD


def by_workers(ranks, rank, vectors, workers=None, **options):
    """(results (ranks, steps, P), the PowerSGD of each rank)."""

    def one(comm):
        method = PowerSGD(comm, MATRICES, vectors.dtype, rank, **options)
        results = []
        for step in vectors:
            vector = step[comm.rank].copy()
            method.average(vector)
            results.append(vector)
        return np.array(results), method

    results, methods = zip(*(workers or Workers(ranks)).run(one), strict=True)
    return np.array(results), methods


@pytest.mark.parametrize("ranks", [1, 2, 3, 5])
@pytest.mark.parametrize("rank", [1, 2, 3])
def test_powersgd_equals_the_textbook_and_all_ranks_get_the_same_bits(ranks, rank):
    q = PowerSGD(Workers(1).comm(0), MATRICES, np.float64, rank).q.copy()
    found, methods = by_workers(ranks, rank, gradients(ranks, 6))
    np.testing.assert_allclose(found[0], by_textbook(ranks, rank, 6, q), rtol=1e-8, atol=1e-9)
    assert all(np.array_equal(found[0], other) for other in found)
    assert all(np.array_equal(methods[0].q, method.q) for method in methods)


@pytest.mark.parametrize("ranks", [1, 4])
def test_powersgd_of_full_rank_is_the_mean(ranks):
    x = gradients(ranks, 8)
    x[1, :, :54] = 0  # a matrix of zeros
    x[2, :, :54] = np.outer(np.arange(6.0), np.arange(9.0)).ravel()  # one of rank 1
    x[3] = 0
    x[4] *= 1e-12
    found, methods = by_workers(ranks, 9, x)
    for result, expected in zip(found[0], x.mean(axis=1), strict=True):
        np.testing.assert_allclose(result, expected, rtol=0, atol=1e-12)
    assert all(abs(method.memory).max() < 1e-12 for method in methods)


@DTYPES
@pytest.mark.parametrize("ranks", [1, 3])
def test_powersgd_remembers_what_it_did_not_send(dtype, ranks):
    x = gradients(ranks, 100, dtype)
    found, methods = by_workers(ranks, 1, x)
    left = np.mean([method.memory for method in methods], axis=0, dtype=float)
    np.testing.assert_allclose(found[0].sum(axis=0, dtype=float) + left, x.mean(axis=1, dtype=float).sum(axis=0), atol=1e-3)
    assert not any(method.memory[54:59].any() for method in methods)  # vectors are sent in full
    assert all(method.arrays == {"memory": method.memory, "q": method.q} for method in methods)


def test_powersgd_goes_on_from_its_arrays():
    x = gradients(2, 6)
    whole, _ = by_workers(2, 2, x)

    def one(comm):
        before = PowerSGD(comm, MATRICES, np.float64, 2)
        for step in x[:3]:
            before.average(step[comm.rank].copy())
        after = PowerSGD(comm, MATRICES, np.float64, 2, seed=9)
        for name, array in before.arrays.items():
            after.arrays[name][:] = array
        vector = x[3, comm.rank].copy()
        after.average(vector)
        return vector

    np.testing.assert_array_equal(Workers(2).run(one)[0], whole[0, 3])


def test_powersgd_of_nothing_but_zeros_is_zero():
    x = np.zeros((3, 2, LENGTH), np.float32)
    x[2] = gradients(2, 1, np.float32)[0]
    found, methods = by_workers(2, 2, x)
    assert not found[:, :2].any()
    assert np.isfinite(found).all()
    assert found[:, 2].any()
    assert all(np.isfinite(method.memory).all() for method in methods)


@pytest.mark.parametrize("place", [3, 55])  # in a matrix, in a vector
def test_powersgd_tells_all_ranks_of_what_is_not_finite_and_forgets_it(place):
    x = gradients(2, 4)
    x[2, 1, place] = np.inf
    found, methods = by_workers(2, 2, x[:3])
    assert np.isnan(found[:, 2]).all()
    assert [method.unsound for method in methods] == [False, True]
    found, _ = by_workers(2, 2, x)
    without, _ = by_workers(2, 2, np.delete(x, 2, axis=0))
    np.testing.assert_array_equal(found[:, 3], without[:, 2])


@pytest.mark.parametrize("rank", [1, 2, 4, 100])
def test_powersgd_sends_as_many_bytes_as_it_says(rank):
    workers = Workers(2)
    _, methods = by_workers(2, rank, gradients(2, 3, np.float32), workers)
    assert workers.posted == [3 * methods[0].size] * 2
    r = [min(rank, side) for side in (6, 4, 2, 1)]  # the shorter sides
    values = r[0] * (6 + 9) + 5 + r[1] * (9 + 4) + r[2] * (2 + 12) + r[3] * (1 + 7)
    assert methods[0].size == 4 * values == PowerSGD.wire_size(MATRICES, rank, 4)


# sizes of a large model: three layers of 650 units, 28,869 words, tied, two biases a layer

LARGE = [(28869, 650), (28869,), *[(2600, 650), (2600, 650), (2600,), (2600,)] * 3]


def test_bytes_of_a_large_model():
    assert sum(map(math.prod, LARGE)) == 28_949_319
    mebibytes = lambda size: size / 2**20
    assert round(mebibytes(4 * 28_949_319), 2) == 110.43
    assert [round(mebibytes(PowerSGD.wire_size(LARGE, rank, 4)), 3) for rank in (1, 2, 4)] == [0.357, 0.544, 0.918]
    assert round(mebibytes(make_compressor("sign", LARGE, np.float32).size), 2) == 3.45
    assert mebibytes(make_compressor("none", LARGE, np.float32).size) == pytest.approx(110.433, abs=1e-3)
    assert compression.NAMES == ("top-k", "random-k", "sign", "qsgd", "bf16", "none")
