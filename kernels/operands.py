"""What products (gemm.py) take of matrices in panels: of float32 and float64 these as they are, of bfloat16 pairs in words.

    words           a left factor: row m, words along k                 (K/2R,M,R) uint32
    pairs           a right factor: rows of pairs of rows               (N/R,K/2,R) uint32, K/2 up to a multiple of 16 with
    zeros of transposes   the same of the transpose, on the way from float32 to bfloat16

A factor is rounded by `round_rows` (vectors.py), to nearest even.
"""

from typing import no_type_check

import numpy as np
from numba import types
from numba.extending import overload

from .amx import SPAN
from .compile import OPTIONS, kernel
from .gemm import aligned, multiply, multiply_transposed, width
from .processor import AMX
from .reduce import fence
from .team import Team
from .tiles import PANELS, ROW, ROWS
from .types import Array, DType
from .vectors import round_rows, round_to_bf16, transpose_block


@kernel
def transpose(out: Array, x: Array, x_row: int, K: int) -> None:
    """out (K/R,N,R) = the transpose of K rows of x (N/R,:,R), from x_row on. N is a multiple of R."""
    R = width(x)
    zero = x.dtype.type(0)
    for panel in range(x.shape[0]):
        for k in range(0, K - R + 1, R):
            transpose_block(
                zero,
                x.ctypes.data + panel * x.strides[0] + (x_row + k) * ROW,
                out.ctypes.data + k // R * out.strides[0] + panel * R * ROW,
                False,
            )
        if K % R:
            for j in range(R):
                for k in range(R):
                    out[K // R, panel * R + j, k] = x[panel, x_row + K // R * R + k, j] if k < K % R else zero


@kernel
def bf16(x: np.float32) -> np.uint32:
    """The bits (uint32) of a float32 rounded to the nearest bfloat16, ties to even; what is below 2^-126 may become zero."""
    return round_to_bf16(x)


@kernel
def to_words(words: Array, row: int, x: Array, x_row: int, rows: int, stream: bool = False) -> None:
    """A left factor: rows of words (N/2R,:,R) uint32 from `row` on = rows of x (N/R,:,R) float32."""
    for panel in range(0, x.shape[0], 2):
        one = x.ctypes.data + panel * x.strides[0] + x_row * ROW
        other = one + x.strides[0] if panel + 1 < x.shape[0] else 0
        target = words.ctypes.data + panel // 2 * words.strides[0] + row * ROW
        for m in range(rows):
            round_rows(False, one + m * ROW, other + m * ROW if other else 0, target + m * ROW, stream)


@kernel
def to_pairs(pairs: Array, row: int, x: Array, x_row: int, rows: int, stream: bool = False) -> None:
    """A right factor: rows of pairs (N/R,:,R) uint32 from `row` on = pairs of rows of x (N/R,:,R) float32.

    Where `rows` is no multiple of 32, zeros follow up to a multiple of 16 rows of pairs.
    """
    for panel in range(x.shape[0]):
        source = x.ctypes.data + panel * x.strides[0] + x_row * ROW
        target = pairs.ctypes.data + panel * pairs.strides[0] + row * ROW
        for m in range(rows // 2):
            round_rows(True, source + 2 * m * ROW, source + (2 * m + 1) * ROW, target + m * ROW, stream)
        if rows % 2:
            round_rows(True, source + (rows - 1) * ROW, 0, target + rows // 2 * ROW, stream)
        for m in range(row + (rows + 1) // 2, row + (rows + 2 * SPAN - 1) // (2 * SPAN) * SPAN):
            pairs[panel, m] = 0


@kernel
def transpose_to_words(words: Array, row: int, x: Array, x_row: int, K: int, stream: bool = False) -> None:
    """A left factor: N rows of words (K/2R,:,R) uint32 from `row` on = the transpose of K rows of x (N/R,:,R) float32, from
    x_row on; zeros beyond K.
    """
    block = np.empty((SPAN + 1, 16), np.uint32)  # 16 rows that begin at a line of the cache
    pairs = (block.ctypes.data + ROW - 1) // ROW * ROW
    zero = np.float32(0)
    for k in range(0, K, 2 * SPAN):
        rows = min(2 * SPAN, K - k)
        if rows < 2 * SPAN:
            block[:] = 0
        for panel in range(x.shape[0]):
            source = x.ctypes.data + panel * x.strides[0] + (x_row + k) * ROW
            for m in range(rows // 2):
                round_rows(True, source + 2 * m * ROW, source + (2 * m + 1) * ROW, pairs + m * ROW, False)
            if rows % 2:
                round_rows(True, source + (rows - 1) * ROW, 0, pairs + rows // 2 * ROW, False)
            target = words.ctypes.data + k // (2 * SPAN) * words.strides[0] + (row + panel * 16) * ROW
            transpose_block(zero, pairs, target, stream)
    block[0, 0] = 0  # Numba frees an array behind its last use, and addresses are none


@kernel
def transpose_to_pairs(pairs: Array, row: int, x: Array, x_row: int, K: int, stream: bool = False) -> None:
    """A right factor: N/2 rows of pairs (K/R,:,R) uint32 from `row` on = the transpose of K rows of x (N/R,:,R) float32, from
    x_row on. Zeros beyond K, and behind N/2 rows where N is no multiple of 2 R. Words of rows of x are those of pairs, turned.
    """
    R = 16
    block = np.empty((R + 1, R), np.uint32)
    words = (block.ctypes.data + ROW - 1) // ROW * ROW
    zero = np.float32(0)
    for panel in range(0, x.shape[0], 2):
        one = x.ctypes.data + panel * x.strides[0] + x_row * ROW
        other = one + x.strides[0] if panel + 1 < x.shape[0] else 0
        for k in range(0, K, R):
            if K - k < R:
                block[:] = 0
            for m in range(k, min(k + R, K)):
                round_rows(False, one + m * ROW, other + m * ROW if other else 0, words + (m - k) * ROW, False)
            target = pairs.ctypes.data + k // R * pairs.strides[0] + (row + panel * R // 2) * ROW
            transpose_block(zero, words, target, stream)
    block[0, 0] = 0  # as above


@kernel
def make_factors(factor: Array, of_transpose: Array, panels: Array, first: int, last: int) -> None:
    """The right factors of a Weight and of its transpose, as far as panels first to last - 1 go: a pair of them at a time,
    which is read from few pages of memory, and written past the caches.
    """
    D = panels.shape[1]
    for panel in range(first, last, 2):
        pair = panels[panel : min(panel + 2, last)]
        to_pairs(factor[panel:], 0, pair, 0, D, True)
        transpose_to_pairs(of_transpose, panel // 2 * 16, pair, 0, D, True)


def keep_left(left: Array, x: Array, row: int, rows: int) -> None:
    """Bring rows of `left`, which Operands.like made for x, up to date with x."""


@overload(keep_left, jit_options=OPTIONS)
@no_type_check
def _keep_left(left, x, row, rows):
    def bfloat16(left, x, row, rows):
        to_words(left, row, x, row, rows)

    return bfloat16 if left.dtype == types.uint32 else lambda left, x, row, rows: None


class Operands:
    """What a product takes of panels in one precision, in memory that is used again and again.

    Parameters
    ----------
    dtype : numpy.float32 or numpy.float64
        Of the panels.
    bf16 : bool
        True: operands are made of float32 panels, under a name that keeps them apart; False: panels are operands.
    team : Team, optional
        The threads that share the work; none: the caller alone.
    """

    def __init__(self, dtype: DType, bf16: bool = False, team: Team | None = None) -> None:
        self.dtype, self.bf16, self.team = np.dtype(dtype), bf16, team or Team()
        self.R = width(dtype)
        self.step = 32 if bf16 and AMX else ROWS  # rows of a left factor that one thread takes together
        self._memory: dict[str, Array] = {}

    def depth(self, K: int) -> int:
        """Words along k for K elements."""
        return (K + 1) // 2 if self.bf16 else K

    def words(self, name: str, x: Array, row: int, rows: int) -> tuple[Array, int]:
        """Rows of x (N/R,:,R) as the left factor. Returns an array and the row in it where they begin."""
        if not self.bf16:
            return x, row
        out = self.empty(name, ((len(x) + 1) // 2, rows, self.R), np.uint32)
        self.team.share(lambda first, last: to_words(out, first, x, row + first, last - first), rows)
        return out, 0

    def pairs(self, name: str, x: Array, row: int, rows: int) -> tuple[Array, int]:
        """Rows of x (N/R,:,R) as the right factor. Returns an array and its first row."""
        if not self.bf16:
            return x, row
        out = self.empty(name, (len(x), -(-rows // (2 * SPAN)) * SPAN, self.R), np.uint32)
        by_rows = lambda first, last: to_pairs(out, first // 2, x, row + first, last - first)
        self.team.share(by_rows, rows, 2 * SPAN)
        return out, 0

    def transposed(self, name: str, x: Array, row: int, rows: int) -> Array:
        """The transpose of rows of x (N/R,:,R) as the right factor."""
        panels, N = -(-rows // self.R), len(x) * self.R
        if not self.bf16:
            out = self.empty(name, (panels, N, self.R), self.dtype)
            self.transpose(out, x, row, rows)
            return out
        out = self.empty(name, (panels, -(-N // (2 * SPAN)) * SPAN, self.R), np.uint32)
        by_rows = lambda first, last: transpose_to_pairs(out[first // self.R :], 0, x, row + first, last - first)
        self.team.share(by_rows, rows, self.R)
        return out

    def transpose(self, out: Array, x: Array, row: int, rows: int) -> None:
        """`transpose` by the team, not rounded."""
        self.team.share(lambda first, last: transpose(out[first // self.R :], x, row + first, last - first), rows, self.R)

    def multiply(self, c: Array, c_row: int, a: Array, a_row: int, b: Array, M: int, K: int, add: bool) -> None:
        """`multiply` by the team."""
        rows = lambda first, last: multiply(c, c_row + first, a, a_row + first, b, last - first, K, add)
        self.team.share(rows, M, self.step)

    def multiply_transposed(self, c: Array, name: str, x: Array, x_row: int, b: Array, b_row: int, rows: int) -> None:
        """c = x^T @ b by the team, over some rows of x (M/R,:,R), from x_row on, and of a right factor b, from b_row on.

        name : of memory for the transpose, where one has to be made.
        """
        M = c.shape[1]
        if self.bf16:
            words = self.empty(name, (-(-rows // (2 * SPAN)), len(x) * self.R, self.R), np.uint32)
            by_rows = lambda first, last: transpose_to_words(words[first // (2 * SPAN) :], 0, x, x_row + first, last - first)
            self.team.share(by_rows, rows, 2 * SPAN)
            self.multiply(c, 0, words, 0, b, M, self.depth(rows), False)
            return
        panels = lambda first, last: multiply_transposed(c[first:last], 0, x, x_row, b[first:last], b_row, M, rows, False)
        self.team.share(panels, len(c), PANELS)

    def like(self, name: str, x: Array) -> Array:
        """A left factor with the rows of x (N/R,:,R), to be filled by `keep_left`."""
        return self.empty(name, ((len(x) + 1) // 2, *x.shape[1:]), np.uint32) if self.bf16 else x

    def empty(self, name: str, shape: tuple[int, ...], dtype: DType) -> Array:
        """Memory for an array; what an earlier one of that name held is lost where it was smaller."""
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        if name not in self._memory or self._memory[name].nbytes < size:
            self._memory[name] = aligned((size,), np.uint8)
        return self._memory[name][:size].view(dtype).reshape(shape)


class Weight:
    """A matrix of weights in panels (N/R,D,R), and what products take of it: for bfloat16 kept from use to use.

    Parameters
    ----------
    operands : Operands
    panels : (N/R,D,R)

    Attributes
    ----------
    panels : array
        Where they change, `take` has to be told.
    factor, of_transpose : arrays
        The factors. float32 and float64: the panels, and for a right one nothing until `transposed` makes it.
    """

    def __init__(self, operands: Operands, panels: Array) -> None:
        self.operands = operands
        if operands.bf16:
            P, D, R = panels.shape
            shapes = (P, -(-D // (2 * SPAN)) * SPAN, R), (-(-D // R), -(-P // 2) * R, R)
            self.factor, self.of_transpose = (aligned(shape, np.uint32) for shape in shapes)
        self.bind(panels)

    @property
    def size_of_pair(self) -> int:
        """Elements of two panels."""
        return 2 * self.rows * self.operands.R

    def bind(self, panels: Array) -> None:
        """Other panels of the same shape take the place of those there were; the factors are still of these."""
        self.panels, self.rows = panels, panels.shape[1]
        if not self.operands.bf16:
            self.factor = self.of_transpose = panels

    def take(self, first: int, last: int) -> None:
        """Panels first, an even number, to last - 1 have changed."""
        make_factors(self.factor, self.of_transpose, self.panels, first, last)
        fence()

    def take_all(self) -> None:
        """All panels have changed, or are new."""
        if self.operands.bf16:
            self.operands.team.share(self.take, len(self.panels), 2)

    def transposed(self, operands: Operands) -> Array:
        """The transpose as a right factor, valid until the next call of any Weight with these operands."""
        return self.of_transpose if operands.bf16 else operands.transposed("W", self.panels, 0, self.rows)
