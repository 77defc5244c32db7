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
from .gemm import width, zero_panels
from .team import Team
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
    lanes = lambda first, last: attend_lanes(c, A, h, h_row, k, m, lengths, S, T, B, first, last)
    team.share(lanes, B)


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
    team.share(lambda first, last: attend_lanes_backward(*arguments, first, last), B)


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
    rows = lambda first, last: attend_some_rows(c, A, h, h_row, k, m, source, lengths, S, B, first, last)
    team.share(rows, len(source))


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
    first: int,
    last: int,
) -> None:
    """`attend` of lanes first to last - 1."""
    for n in range(first, last):
        attend_lane(c, n, B, A[n, :T, :S], h, h_row + n, B, k, m, n, B, lengths[n])


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
    first: int,
    last: int,
) -> None:
    """`attend_rows` of rows first to last - 1."""
    for n in range(first, last):
        lane = source[n]
        attend_lane(c, n, 1, A[n : n + 1, :S], h, h_row + n, 1, k, m, lane, B, lengths[lane])


@kernel
def attend_lane(
    c: Array,
    c_row: int,
    c_step: int,
    A: Array,
    h: Array,
    h_row: int,
    h_step: int,
    k: Array,
    m: Array,
    m_row: int,
    m_step: int,
    length: int,
) -> None:
    """Rows c_row, c_row + c_step, ... of c, and A (T,S), of T rows of h and of `length` rows of k and m."""
    seen = A[:, :length]
    products(seen, h, h_row, h_step, k, m_row, m_step, False)
    A[:, length:] = 0
    if length > 0:
        softmax_rows(seen)
    weighted_sums(c, c_row, c_step, seen, m, m_row, m_step)


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
    first: int,
    last: int,
) -> None:
    """`attend_backward` of lanes first to last - 1."""
    for n in range(first, last):
        seen, dZ = A[n, :T, : lengths[n]], dA[n, :T, : lengths[n]]
        products(dZ, dc, n, B, m, n, B, add)
        softmax_rows_backward(dZ, seen)
        dA[n, :T, lengths[n] : S] = 0
        weighted_sums(dh, n, B, dZ, k, n, B)
        weighted_sums(dk, n, B, dA[n, :T, :S].T, h, h_row + n, B)
        weighted_sums(dm, n, B, A[n, :T, :S].T, dc, n, B)


@kernel
def products(out: Array, x: Array, x_row: int, x_step: int, y: Array, y_row: int, y_step: int, add: bool) -> None:
    """out (I,J) = or, where `add`, += x y^T, of rows x_row, x_row + x_step, ... of x (P,:,R), and rows of y alike."""
    for i in range(out.shape[0]):
        for j in range(out.shape[1]):
            total = out[i, j] if add else out.dtype.type(0)
            for panel in range(x.shape[0]):
                for r in range(width(x)):
                    total += x[panel, x_row + i * x_step, r] * y[panel, y_row + j * y_step, r]
            out[i, j] = total


@kernel
def weighted_sums(out: Array, out_row: int, out_step: int, w: Array, x: Array, x_row: int, x_step: int) -> None:
    """Rows out_row, out_row + out_step, ... of out (P,:,R) = w (I,J) x, of rows x_row, x_row + x_step, ... of x (P,:,R)."""
    for panel in range(out.shape[0]):
        for i in range(w.shape[0]):
            target = out[panel, out_row + i * out_step]
            target[:] = 0
            for j in range(w.shape[1]):
                for r in range(width(x)):
                    target[r] += w[i, j] * x[panel, x_row + j * x_step, r]


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
