"""What a step of an averaging method takes on n ranks: a model of latency and bandwidth, fitted to measured points.

    seconds = computing + a x messages + b x bytes          a in seconds, b in seconds a byte (Hockney 1994)

Messages and bytes are what the busiest rank sends one after the other, by the usual algorithms (Thakur, Rabenseifner and
Gropp 2005): Allreduce of S bytes 2 log2 n messages and 2 (n - 1) / n S bytes, by halving and doubling; Allgather log2 n
messages and (n - 1) S bytes, by doubling; to each neighbour one message of S bytes. Whatever the method, ranks that meet
also combine a few control values, by an Allreduce of no size worth counting.
"""

from collections.abc import Iterable

import numpy as np

from dllm.comm import topology

SCALES = (8, 64, 512, 4096)  # ranks for which times are predicted
# Networks of clusters by their data sheets, for a rank that has a link to itself: seconds a message, seconds a byte.
NETWORKS = {"10 Gbit/s, 30 us": (30e-6, 8e-10), "100 Gbit/s, 2 us": (2e-6, 8e-11)}


def traffic(kind: str, size: float, ranks: int, degree: int = 0, period: int = 1, times: int = 1) -> tuple[float, float]:
    """(messages, bytes) of a rank in a step.

    kind : allreduce | allgather | neighbours
    size : bytes that a rank hands to MPI in all
    period : steps from one meeting to the next
    times : calls that wait for each other, among which the size is divided
    """
    if ranks == 1:
        return 0.0, 0.0
    rounds = (ranks - 1).bit_length()
    messages, parts = {
        "allreduce": (2 * rounds, 2 * (ranks - 1) / ranks),
        "allgather": (rounds, ranks - 1),
        "neighbours": (degree, degree),
    }[kind]
    return (times * messages + 2 * rounds) / period, parts * size / period


def efficiency(computing: float, size: float, ranks: int, network: tuple[float, float], times: int = 1) -> float:
    """What part of a step computes, with Allreduce of `size` bytes in `times` calls, none of which the backward hides.

    computing : seconds
    network : seconds a message and a byte, as `fit` finds them or NETWORKS has them
    """
    return computing / (computing + float(np.dot(network, traffic("allreduce", size, ranks, times=times))))


def degree(name: str, ranks: int) -> int:
    """Neighbours that a rank sends to in a step, the most of any rank."""
    graph = topology.make_topology(name, ranks)
    return max(len(graph.receivers(phase, rank)) for phase in range(len(graph.phases)) for rank in range(ranks))


def fit(points: Iterable[tuple[float, float, float]]) -> tuple[float, float]:
    """(a, b), not negative, of points (seconds beyond computing, messages, bytes): least squares of relative errors."""
    seconds, messages, amounts = (np.array(values, float) for values in zip(*points, strict=True))
    columns = np.stack([messages, amounts], axis=1) / seconds[:, None]
    best, *_ = np.linalg.lstsq(columns, np.ones(len(seconds)), rcond=None)
    for i in range(2):
        if best[i] < 0:  # then the other explains it alone
            other = columns[:, 1 - i]
            best = np.zeros(2)
            best[1 - i] = other.sum() / (other @ other)
    return tuple(best)
