"""The model of a step's time: what it counts is what is sent, and a fit finds what points were made with."""

import numpy as np
import pytest

from benchmarks import cost
from dllm.comm import traffic


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 8, 64])
def test_the_model_counts_the_bytes_that_are_sent(ranks):
    size = 840 * ranks
    assert cost.traffic("allreduce", size, ranks)[1] == traffic.sent_by_allreduce(size, ranks)
    assert cost.traffic("allgather", size, ranks)[1] == traffic.sent_by_allgather(size, ranks)
    assert cost.traffic("allgather", size, ranks, period=4)[1] == traffic.sent_by_allgather(size, ranks) / 4
    rounds = (ranks - 1).bit_length()
    assert cost.traffic("neighbours", size, ranks, degree=3) == ((3 + 2 * rounds, 3 * size) if ranks > 1 else (0, 0))
    once, twice = (cost.traffic("allreduce", size, ranks, times=times) for times in (1, 2))
    assert once == (4 * rounds, twice[1])
    assert twice[0] == 6 * rounds


@pytest.mark.parametrize(
    ("name", "degrees"), [("ring", (0, 1, 2, 2)), ("exponential", (0, 1, 2, 12)), ("one-peer-exponential", (0, 1, 1, 1))]
)
def test_degrees_are_known(name, degrees):
    assert tuple(cost.degree(name, ranks) for ranks in (1, 2, 4, 4096)) == degrees


def test_a_fit_finds_latency_and_bandwidth():
    generator = np.random.default_rng(5)
    messages, amounts = generator.integers(1, 50, 12), generator.integers(1_000, 10_000_000, 12)
    points = [(3e-4 * m + 8e-8 * b, m, b) for m, b in zip(messages, amounts, strict=True)]
    np.testing.assert_allclose(cost.fit(points), (3e-4, 8e-8), rtol=1e-9)
    assert cost.fit([(1e-7 * b, m, b) for _, m, b in points]) == pytest.approx((0, 1e-7), abs=1e-12)
    faster = [(1e-7 * (10**7 + b) - 1e-3 * m, m, 10**7 + b) for _, m, b in points]  # a negative latency would fit best
    latency, bandwidth = cost.fit(faster)
    assert latency == 0
    assert bandwidth == pytest.approx(1e-7, rel=0.1)


def test_efficiency_is_the_part_of_a_step_that_computes():
    scales = [1, *cost.SCALES]
    assert [cost.efficiency(0.1, 0, ranks, (0, 1e-9)) for ranks in scales] == [1] * len(scales)
    assert cost.efficiency(0.1, 1e8, 2, (0, 1e-9)) == pytest.approx(0.5)  # half of 2e8 bytes each way
    for network in cost.NETWORKS.values():
        found = [cost.efficiency(0.1, 1e8, ranks, network, 4) for ranks in scales]
        assert found == sorted(found, reverse=True)
        assert found[0] == 1
