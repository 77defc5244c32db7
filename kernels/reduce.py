"""Sums over ranks that can read each other's memory, always in the order of the ranks, and a fence between such ranks."""

from typing import no_type_check

import numpy as np
from numba import types
from numba.extending import intrinsic

from .compile import kernel
from .types import Array, DType

BLOCK = 2048  # elements that are added up at a time, in the first-level cache


@kernel
def sum_ranks(vectors: Array, rank: int, start: int, stop: int) -> float:
    """vectors (n,P)[rank, start:stop] = the sum over ranks of that part. Returns the sum of its squares."""
    squares, total = 0.0, np.empty(BLOCK, vectors.dtype)
    for first in range(start, stop, BLOCK):
        last = min(first + BLOCK, stop)
        part = total[: last - first]
        add_ranks(part, vectors, first)
        squares += copy(vectors[rank, first:last], part)
    return squares


@kernel
def copy(target: Array, source: Array) -> float:
    """target (n,) = source. Returns the sum of its squares, like optim.sum_of_squares by blocks."""
    squares = 0.0
    for start in range(0, target.size, BLOCK):
        stop = min(start + BLOCK, target.size)
        out, part, total = target[start:stop], source[start:stop], source.dtype.type(0)  # slices let the compiler vectorise
        for k in range(part.size):
            out[k] = part[k]
            total += part[k] * part[k]
        squares += total
    return squares


@kernel
def add_ranks(total: Array, vectors: Array, first: int) -> None:
    """total (k,) = the sum over ranks of vectors (n,P)[:, first : first + k]."""
    zero = vectors[0, first : first + total.size]
    if vectors.shape[0] == 1:
        for k in range(total.size):
            total[k] = zero[k]
        return
    one = vectors[1, first : first + total.size]
    for k in range(total.size):
        total[k] = zero[k] + one[k]
    for r in range(2, vectors.shape[0]):
        row = vectors[r, first : first + total.size]
        for k in range(total.size):
            total[k] += row[k]


@kernel
def sum_ranks_of_rows(total: Array, vectors: Array, start: int, rows: Array) -> None:
    """total (n,E) = the sum over ranks of some rows of the table (V,E) at vectors (n,P)[:, start:]."""
    E = total.shape[1]
    for n in range(rows.size):
        add_ranks(total[n], vectors, start + rows[n] * E)


@kernel
def weighted_sum(out: Array, own: float, x: Array, weights: Array, others: Array) -> None:
    """out (k,) = own x (k,) + sum_j weights_j others_j (d,k). out may be x."""
    for start in range(0, out.size, BLOCK):
        stop = min(start + BLOCK, out.size)
        part, source, factor = out[start:stop], x[start:stop], x.dtype.type(own)
        for k in range(part.size):
            part[k] = factor * source[k]
        for j in range(weights.size):
            row, weight = others[j, start:stop], x.dtype.type(weights[j])
            for k in range(part.size):
                part[k] += weight * row[k]


@kernel
def weighted_differences(out: Array, own: float, x: Array, weights: Array, others: Array) -> None:
    """out (k,) = sum_j weights_j (others_j - x): over ranks with equal weights both ways these add up to 0. own has no part."""
    for start in range(0, out.size, BLOCK):
        stop = min(start + BLOCK, out.size)
        part, source = out[start:stop], x[start:stop]
        part[:] = 0
        for j in range(weights.size):
            row, weight = others[j, start:stop], x.dtype.type(weights[j])
            for k in range(part.size):
                part[k] += weight * (row[k] - source[k])


@intrinsic
@no_type_check
def _fence(typingctx):
    def generate(context, builder, signature, arguments):
        builder.fence("seq_cst")
        return context.get_dummy_value()

    return types.void(), generate


@kernel
def fence() -> None:
    """What this rank wrote before is seen by others before what it writes after, and the same of what it reads."""
    _fence()


def warm_up(dtype: DType) -> None:
    """Run every kernel of this file once, for vectors of `dtype`: all are compiled then, or loaded from the cache."""
    vectors, one = np.zeros((1, 8), dtype), np.zeros(1)
    sum_ranks(vectors, 0, 0, 8)
    copy(vectors[0], vectors[0])
    sum_ranks_of_rows(np.zeros((1, 2), dtype), vectors, 0, np.zeros(1, np.int64))
    for combine in (weighted_sum, weighted_differences):
        combine(vectors[0], 1.0, vectors[0], one, vectors)
    fence()
