r"""PowerSGD: the mean over ranks of matrices of low rank (Vogels, Karimireddy and Jaggi 2019, algorithms 1 and 2).

    M_i = gradient_i + e_i                       rank i's matrix (m,n), m <= n; where it is not, its transpose
    P = mean_i M_i Q;   P^ = orthonormal(P)      (m,r), sum over ranks: all matrices in one message
    Q_i = M_i^T P^;     Q = mean_i Q_i           (n,r), another; Q is where the next step begins
    result = P^ Q^T;    e_i = M_i - P^ Q_i^T

All is linear in the M_i: this is what one step of subspace iteration makes of their mean. The paper's e_i is M_i - P^ Q^T;
ours has the same sum over ranks, so gives the same results, and forgets differences between ranks, which cancel in the sum.
Q is made orthonormal before use, too, which changes no result but keeps products in range.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from ..errors import UserError
from ..kernels.types import Array, DType
from .runtime import wait_for

if TYPE_CHECKING:
    from mpi4py import MPI


class Piece(NamedTuple):
    """A tensor and where it lies in the vector and in the two messages."""

    part: slice
    rows: int
    columns: int
    rank: int  # 0: sent as it is, in the first message
    p: slice
    q: slice

    def short(self, vector: Array) -> Array:
        """Its matrix, rows and columns exchanged where there are more rows, in a vector (P,)."""
        matrix = vector[self.part].reshape(self.rows, self.columns)
        return matrix.T if self.rows > self.columns else matrix

    def factor(self, part: slice, message: Array) -> Array:
        """P (m,r) or Q (n,r) in its message; part: `p` or `q`."""
        return message[part].reshape(-1, self.rank)


def pieces(shapes: Sequence[tuple[int, ...]], rank: int) -> tuple[list[Piece], int, int]:
    """A Piece for each shape, and the number of values in the two messages."""
    found: list[Piece] = []
    start = first = second = 0
    for shape in shapes:
        size = math.prod(shape)
        rows, columns = (shape[0], size // max(1, shape[0])) if len(shape) >= 2 else (size, 1)
        r = min(rank, rows, columns) if len(shape) >= 2 else 0
        p, q = (r * min(rows, columns), r * max(rows, columns)) if r else (size, 0)
        places = slice(first, first + p), slice(second, second + q)
        found.append(Piece(slice(start, start + size), rows, columns, r, *places))
        start, first, second = start + size, first + p, second + q
    return found, first, second


def orthonormal(matrix: Array) -> Array:
    """An orthonormal basis (m,r) of the columns of a matrix (m,r); where they span less, zeros even, it is filled up."""
    return np.linalg.qr(matrix)[0]


class PowerSGD:
    """The mean of gradients over ranks, of low rank, with error feedback. Every rank gets the same bits.

    Parameters
    ----------
    comm : MPI.Comm
        Duplicated, so that no other message can come in between.
    shapes : list of tuples
        The tensors that lie one after the other in the vector (P,); of more than two dimensions, (first, all others).
    dtype : float32 or float64
    rank : int
        r; lower: smaller messages, coarser gradient. Where it reaches the shorter side of a matrix its mean is exact.
    seed : int
        Of the first Q; the same on all ranks.
    oversubscribed : bool
        True where ranks outnumber cores: sleep while waiting.

    Raises UserError.
    """

    def __init__(
        self,
        comm: MPI.Comm,
        shapes: Sequence[tuple[int, ...]],
        dtype: DType,
        rank: int,
        seed: int = 1,
        oversubscribed: bool = False,
    ) -> None:
        if rank < 1:
            raise UserError(f"the rank of PowerSGD must be at least 1, not {rank}")
        self.comm, self.oversubscribed = comm.Dup(), oversubscribed
        self.size = self.wire_size(shapes, rank, np.dtype(dtype).itemsize)
        self.pieces, first, second = pieces(shapes, rank)
        self.matrices = [piece for piece in self.pieces if piece.rank]
        self.dense = [piece for piece in self.pieces if not piece.rank]
        self.first, self.second = np.zeros((2, first), dtype), np.zeros((2, second), dtype)  # what is sent, what comes
        self.memory = np.zeros(sum(math.prod(shape) for shape in shapes), dtype)
        self.q = np.random.default_rng(seed).standard_normal(second).astype(dtype)
        self.unsound = False

    @staticmethod
    def wire_size(shapes: Sequence[tuple[int, ...]], rank: int, itemsize: int) -> int:
        """Bytes that a rank hands to MPI in a step."""
        _, first, second = pieces(shapes, rank)
        return (first + second) * itemsize

    @property
    def arrays(self) -> dict[str, Array]:
        """What a checkpoint must hold: memory (P,), this rank's own, and Q of all matrices, the same on all ranks."""
        return {"memory": self.memory, "q": self.q}

    @np.errstate(invalid="ignore", over="ignore")  # what is not finite is found below
    def average(self, vector: Array) -> None:
        """vector (P,), this rank's gradient, becomes the mean over ranks, in short.

        Where any rank's is not finite all get NaN and forget the step; `unsound` says whether this rank's was not.
        """
        self.unsound = False
        vector += self.memory
        sent, mean = self.first
        for piece in self.dense:
            sent[piece.p] = vector[piece.part]
        for piece in self.matrices:
            np.matmul(piece.short(vector), orthonormal(piece.factor(piece.q, self.q)), out=piece.factor(piece.p, sent))
        if self._average(self.first):
            for piece in self.matrices:
                basis = piece.factor(piece.p, mean)
                basis[:] = orthonormal(basis)
                np.matmul(piece.short(vector).T, basis, out=piece.factor(piece.q, self.second[0]))
            if self._average(self.second):
                self._finish(vector)
                return
        self.unsound = not np.isfinite(vector).all()
        vector[:] = np.nan

    def _finish(self, vector: Array) -> None:
        """Both factors are known: what was not sent goes to the memory, their product to the vector."""
        (_, basis), (own, mean) = self.first, self.second
        for piece in self.matrices:
            P, error = piece.factor(piece.p, basis), self.memory[piece.part]
            _product(piece, P, piece.factor(piece.q, own), self.memory)
            np.subtract(vector[piece.part], error, out=error)
            _product(piece, P, piece.factor(piece.q, mean), vector)
        for piece in self.dense:
            vector[piece.part] = basis[piece.p]
        self.q[:] = mean

    def _average(self, message: Array) -> bool:
        """The second row of message (2,n) becomes the mean over ranks of the first. Returns whether it is finite."""
        request = self.comm.Iallreduce(message[0], message[1])
        wait_for(request, self.oversubscribed)
        message[1] /= self.comm.size
        return bool(np.isfinite(message[1]).all())


def _product(piece: Piece, P: Array, Q: Array, vector: Array) -> None:
    """The piece's part of vector (P,) = P Q^T, the right way round."""
    left, right = (Q, P) if piece.rows > piece.columns else (P, Q)
    np.matmul(left, right.T, out=vector[piece.part].reshape(piece.rows, piece.columns))
