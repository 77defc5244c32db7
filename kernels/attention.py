r"""Attention (Bahdanau et al. 2015) in the form of Luong et al. 2015, dot or general: a softmax of products over a memory.

T steps h of a decoder look at S steps of a memory m with keys k, lane by lane. Only the first len of S count; of the others
A is zero.

    Z = h k^T    (T,S)          A = softmax(Z), a row a step          c = A m    (T,M)

Backward, with g the gradient of c, and dA that of A from elsewhere, such as copying (copying.py):

    dA += g m^T       dZ = A o (dA - rowsum(A o dA))       dh = dZ k       dk = dZ^T h       dm = A^T g

Luong's `general` has k = m W, a product of the whole window ahead of this. Nothing is scaled.

All lie in panels (gemm.py) but A (B,T,S). A lane is one thread's, from the first product to the last: results are the same to
the bit for any number of threads. A lane of length 0 has A, c and all gradients zero.
"""

import math

import numpy as np

from .compile import kernel
from .gemm import aligned, width, zero_panels
from .row_tiles import SIDE, dots_tile, sums_tile
from .team import Team
from .tiles import ROW
from .types import Array, DType


def attend(
    c: Array, A: Array, h: Array, h_row: int, k: Array, m: Array, lengths: Array, S: int, T: int, B: int, team: Team
) -> None:
    """The context of a window.

    Parameters
    ----------
    c : (M/R,TB,R), out
    A : (B,T,S), out
        The weights, saved for the backward.
    h, h_row : (H/R,:,R), int
        The decoder's steps, from row h_row on.
    k, m : (H/R,SB,R), (M/R,SB,R)
        Keys and memory.
    lengths : (B,) int64
        Steps of the memory that count, each 0 to S.
    S, T, B : int
        Steps of the memory and of the decoder, and lanes.
    team : team.Team
        Shares the lanes.
    """
    arguments = c, A, h, h_row, k, m, lengths, S, T, B
    team.share(lambda first, last: attend_lanes(*arguments, lane_memory(h, m, T, S), first, last), B)


def attend_backward(
    dh: Array,
    dk: Array,
    dm: Array,
    A: Array,
    dA: Array,
    dc: Array,
    h: Array,
    h_row: int,
    k: Array,
    m: Array,
    lengths: Array,
    S: int,
    T: int,
    B: int,
    team: Team,
    add: bool = False,
) -> None:
    """The gradients of `attend`.

    Parameters
    ----------
    dh, dk, dm : (H/R,TB,R), (H/R,SB,R), (M/R,SB,R), out
        Overwritten.
    A : (B,T,S)
        As the forward left it.
    dA : (B,T,S), in and out
        Becomes dZ. Where `add`, holds the gradient of A from elsewhere; else scratch.
    dc : (M/R,TB,R)
    h, h_row, k, m, lengths, S, T, B, team
        As in the forward.
    add : bool
    """
    arguments = dh, dk, dm, A, dA, dc, h, h_row, k, m, lengths, S, T, B, add
    team.share(lambda first, last: attend_lanes_backward(*arguments, lane_memory(h, m, T, S), first, last), B)


def attend_rows(
    c: Array, A: Array, h: Array, h_row: int, k: Array, m: Array, source: Array, lengths: Array, S: int, B: int, team: Team
) -> None:
    """The contexts of N rows of one step each, such as beams, several of which may look at one lane's memory.

    Parameters
    ----------
    c : (M/R,N,R), out
    A : (N,S), out
    h, h_row : (H/R,:,R), int
    k, m : (H/R,SB,R), (M/R,SB,R)
        Keys and memories of B lanes.
    source : (N,) int64
        The lane of each row.
    lengths : (B,) int64
        Of the lanes.
    S, B, team
        As in `attend`.
    """
    arguments = c, A, h, h_row, k, m, source, lengths, S, B
    team.share(lambda first, last: attend_some_rows(*arguments, lane_memory(h, m, 1, S), first, last), len(source))


@kernel
def attend_lanes(
    c: Array,
    A: Array,
    h: Array,
    h_row: int,
    k: Array,
    m: Array,
    lengths: Array,
    S: int,
    T: int,
    B: int,
    own: Array,
    first: int,
    last: int,
) -> None:
    """`attend` of lanes first to last - 1. own: `lane_memory`."""
    H, M = h.shape[0], m.shape[0]
    hn, kn, mn = own[:H], own[H : 2 * H], own[2 * H : 2 * H + M]
    for n in range(first, last):
        length = lengths[n]
        gather(hn, h, h_row + n, B, T)
        gather(kn, k, n, B, length)
        gather(mn, m, n, B, length)
        attend_lane(c, n, B, A[n, :T, :S], hn, 0, kn, mn, length, own[-1])


@kernel
def attend_some_rows(
    c: Array,
    A: Array,
    h: Array,
    h_row: int,
    k: Array,
    m: Array,
    source: Array,
    lengths: Array,
    S: int,
    B: int,
    own: Array,
    first: int,
    last: int,
) -> None:
    """`attend_rows` of rows first to last - 1. own: `lane_memory`. Neighbours with one lane are steps of that lane."""
    H, M = h.shape[0], m.shape[0]
    kn, mn = own[H : 2 * H], own[2 * H : 2 * H + M]
    n = first
    while n < last:
        lane, behind = source[n], n + 1
        while behind < last and source[behind] == lane:
            behind += 1
        length = lengths[lane]
        gather(kn, k, lane, B, length)
        gather(mn, m, lane, B, length)
        attend_lane(c, n, 1, A[n:behind, :S], h, h_row + n, kn, mn, length, own[-1])
        n = behind


@kernel
def attend_lane(
    c: Array, c_row: int, c_step: int, A: Array, h: Array, h_row: int, k: Array, m: Array, length: int, tile: Array
) -> None:
    """Rows c_row, c_row + c_step, ... of c, and A (T,S), of T rows of h and of the first `length` rows of k and m."""
    seen = A[:, :length]
    products(seen, h, h_row, k, tile, False)
    A[:, length:] = 0
    if length > 0:
        softmax_rows(seen)
    weighted_sums(c, c_row, c_step, seen.shape, seen, seen.strides, m)


@kernel
def attend_lanes_backward(
    dh: Array,
    dk: Array,
    dm: Array,
    A: Array,
    dA: Array,
    dc: Array,
    h: Array,
    h_row: int,
    k: Array,
    m: Array,
    lengths: Array,
    S: int,
    T: int,
    B: int,
    add: bool,
    own: Array,
    first: int,
    last: int,
) -> None:
    """`attend_backward` of lanes first to last - 1. own: `lane_memory`."""
    H, M = h.shape[0], m.shape[0]
    hn, kn, mn, gn = own[:H], own[H : 2 * H], own[2 * H : 2 * H + M], own[2 * H + M : 2 * H + 2 * M]
    for n in range(first, last):
        length = lengths[n]
        seen, dZ = A[n, :T, :length], dA[n, :T, :length]
        gather(hn, h, h_row + n, B, T)
        gather(kn, k, n, B, length)
        gather(mn, m, n, B, length)
        gather(gn, dc, n, B, T)
        products(dZ, gn, 0, mn, own[-1], add)
        softmax_rows_backward(dZ, seen)
        dA[n, :T, length:S] = 0
        turned, strides = (length, T), (A.strides[2], A.strides[1])
        weighted_sums(dh, n, B, dZ.shape, dZ, dZ.strides, kn)
        weighted_sums(dk, n, B, turned, dZ, strides, hn)
        weighted_sums(dm, n, B, turned, seen, strides, gn)
        for s in range(length, S):
            dk[:, s * B + n], dm[:, s * B + n] = 0, 0


def lane_memory(h: Array, m: Array, T: int, S: int) -> Array:
    """Where a thread keeps the rows of one lane together: h, k, m and g, and last a tile of `products`.

    In h, k and m the rows of a lane are B apart, and where that is a power of two a cache has few places for all of them. So
    the panels here have an odd number of rows.
    """
    return aligned((2 * len(h) + 2 * len(m) + 1, max(T, S, SIDE) | 1, h.shape[2]), h.dtype)


@kernel
def gather(out: Array, x: Array, row: int, step: int, count: int) -> None:
    """Rows 0 to count - 1 of out (P,:,R) = rows row, row + step, ... of x (P,:,R)."""
    for panel in range(x.shape[0]):
        for i in range(count):
            for r in range(width(x)):
                out[panel, i, r] = x[panel, row + i * step, r]


@kernel
def products(out: Array, x: Array, x_row: int, y: Array, tile: Array, add: bool) -> None:
    """out (I,J) = or, where `add`, += x y^T, of I rows of x (P,:,R), from x_row on, and the first J of y (P,:,R).

    tile : (:,R), scratch of SIDE^2 numbers or more
    """
    zero, R = out.dtype.type(0), width(x)
    for i in range(0, out.shape[0], SIDE):
        rows = min(SIDE, out.shape[0] - i)
        for j in range(0, out.shape[1], SIDE):
            columns = min(SIDE, out.shape[1] - j)
            dots_tile(
                zero, rows, columns, x.shape[0],
                x.ctypes.data + (x_row + i) * ROW, ROW, x.strides[0], y.ctypes.data + j * ROW, ROW, y.strides[0],
                tile.ctypes.data,
            )  # fmt: skip
            for a in range(rows):
                for b in range(columns):
                    place = a * SIDE + b
                    total = tile[place // R, place % R]
                    out[i + a, j + b] = out[i + a, j + b] + total if add else total


@kernel
def weighted_sums(
    out: Array, out_row: int, out_step: int, shape: tuple[int, ...], w: Array, strides: tuple[int, ...], x: Array
) -> None:
    """Rows out_row, out_row + out_step, ... of out (P,:,R) = w x, of the first J rows of x (P,:,R).

    w is (I,J) of `shape`, whose elements are `strides` bytes apart: it may be a transpose.
    """
    zero = out.dtype.type(0)
    for i in range(0, shape[0], SIDE):
        for panel in range(0, out.shape[0], SIDE):
            sums_tile(
                zero, min(SIDE, shape[0] - i), min(SIDE, out.shape[0] - panel), shape[1],
                w.ctypes.data + i * strides[0], strides[0], strides[1],
                x.ctypes.data + panel * x.strides[0], ROW, x.strides[0],
                out.ctypes.data + panel * out.strides[0] + (out_row + i * out_step) * ROW, out_step * ROW, out.strides[0],
            )  # fmt: skip


@kernel
def softmax_rows(z: Array) -> None:
    """z (T,S), S > 0, becomes softmax(z) of each row."""
    for t in range(z.shape[0]):
        row = z[t]
        largest, total = row[0], z.dtype.type(0)
        for s in range(row.size):
            largest = max(largest, row[s])
        for s in range(row.size):
            row[s] = math.exp(row[s] - largest)
            total += row[s]
        for s in range(row.size):
            row[s] /= total


@kernel
def softmax_rows_backward(d: Array, A: Array) -> None:
    """d (T,S), the gradient of A = softmax(z), becomes that of z."""
    for t in range(A.shape[0]):
        total = A.dtype.type(0)
        for s in range(A.shape[1]):
            total += A[t, s] * d[t, s]
        for s in range(A.shape[1]):
            d[t, s] = A[t, s] * (d[t, s] - total)


def attend_reference(h: Array, k: Array, m: Array, lengths: Array) -> tuple[Array, Array]:
    """The equations as they stand, of h (T,B,H), k (S,B,H), m (S,B,M), any dtype, complex too. Returns c (T,B,M), A (B,T,S)."""
    Z = np.einsum("tbh,sbh->bts", h, k)
    counts = (np.arange(len(k)) < np.asarray(lengths)[:, None])[:, None]
    largest = np.max(Z.real, axis=2, keepdims=True, initial=-np.inf, where=counts)
    E = np.exp(np.where(counts, Z - np.where(np.isfinite(largest), largest, 0), -np.inf))
    total = E.sum(axis=2, keepdims=True)
    A = E / np.where(total == 0, 1, total)
    return np.einsum("bts,sbm->tbm", A, m), A


def attend_backward_reference(
    dc: Array, dA: Array | float, A: Array, h: Array, k: Array, m: Array
) -> tuple[Array, Array, Array]:
    """The gradients as they stand; dA (B,T,S), or 0, comes from elsewhere. Returns dh, dk, dm."""
    dA = dA + np.einsum("tbm,sbm->bts", dc, m)
    dZ = A * (dA - (A * dA).sum(axis=2, keepdims=True))
    return np.einsum("bts,sbh->tbh", dZ, k), np.einsum("bts,tbh->sbh", dZ, h), np.einsum("bts,tbm->sbm", A, dc)


def warm_up(dtype: DType) -> None:
    """Run every kernel of this file once, for panels of `dtype`: all are compiled then, or loaded from the cache."""
    x, A, one, team = zero_panels(1, 1, dtype), np.zeros((1, 1, 1), dtype), np.ones(1, np.int64), Team()
    attend(x.copy(), A, x, 0, x, x, one, 1, 1, 1, team)
    attend_rows(x.copy(), A[0], x, 0, x, x, one - 1, one, 1, 1, team)
    attend_backward(x.copy(), x.copy(), x.copy(), A, A.copy(), x, x, 0, x, x, one, 1, 1, 1, team)
