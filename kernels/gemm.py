r"""Matrix products over matrices that lie in panels.

A matrix (M,N) is stored as panels (ceil(N/R), M, R): each holds R columns, row after row, 64 bytes a row; the columns
beyond N are zero. A row of a panel is one vector of the widest machines and a line of every cache.

             X (M,N)                    panels (N/R,M,R)
        +---+---+---+--                 +---+
      M | 0 | 1 | 2 |           ->    M | 0 |  then panel 1, panel 2, ...
        +---+---+---+--                 +---+
          R   R   R                       R

One form serves every part of a product without being packed anew: as B and C a panel is read and written in vectors,
row after row; as A a tile takes one word from each of its rows, or, for A^T, some neighbouring words of one row.

C = A @ B goes through C tile by tile (tiles.py), a few rows by one or two panels. Around the tiles, the order of the loops
decides what stays in which cache:

    for each block of A, DEPTH columns by HEIGHT rows       half a megabyte: stays in the second-level cache
        for each pair of panels of B                        DEPTH rows of it: in the first level, or from the second
            for each tile of rows of the block              its rows of A come from the second level, sums stay in registers

Each element of C is a sum over k in one fixed order, whichever tile it falls into and whoever computes it.

bfloat16: a word of an operand is a pair of bfloat16, neighbours along k, in 32 bits; C is float32. As A, pairs are columns
2k and 2k+1 of a row; as B and as A^T, rows 2k and 2k+1 of a column. `Operands` makes them of float32 panels where they
are needed; for float32 and float64 it hands on what it gets.
"""

from typing import no_type_check

import numpy as np
from numba import types
from numba.extending import overload

from .compile import OPTIONS, kernel
from .team import Team
from .tiles import PANELS, ROW, ROWS, multiply_tile, multiply_tile_transposed
from .types import Array, DType
from .vectors import round_rows, round_to_bf16, transpose_block, transpose_block_of_pairs

DEPTH, HEIGHT = 512, 224  # multiples of every R, and HEIGHT of every ROWS but 6 and 3
TALL = 8 if ROWS >= 8 else 4 if ROWS >= 4 else 2  # rows of a tile of a transpose: some of them make a panel


def width(x: Array | DType) -> int:
    """R, the columns of a panel: 16 of float32, 8 of float64. x: an array or a dtype; in kernels, where R is then a constant,
    an array.
    """
    return ROW // (x.itemsize if isinstance(x, np.ndarray) else np.dtype(x).itemsize)


@overload(width, inline="always")
@no_type_check
def _width(x):
    R = ROW // np.dtype(str(x.dtype)).itemsize
    return lambda x: R


def zero_panels(M: int, N: int, dtype: DType) -> Array:
    """Zeros for a matrix (M,N): (ceil(N/R),M,R)."""
    R = width(dtype)
    return aligned((-(-N // R), M, R), dtype)


def aligned(shape: tuple[int, ...], dtype: DType) -> Array:
    """Zeros that begin at a line of the cache, so that no row of a panel lies on two."""
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    memory = np.zeros(size + ROW, np.uint8)
    start = -memory.ctypes.data % ROW
    return memory[start : start + size].view(dtype).reshape(shape)


@kernel
def to_panels(panels: Array, first: int, x: Array) -> None:
    """Rows `first` and on of panels (N/R,:,R) = x (M,N); what lies beyond column N stays as it is."""
    M, N = x.shape
    R = width(panels)
    for panel in range((N + R - 1) // R):
        for m in range(M):
            for j in range(min(R, N - panel * R)):
                panels[panel, first + m, j] = x[m, panel * R + j]


@kernel
def from_panels(x: Array, panels: Array, first: int) -> None:
    """x (M,N) = rows `first` and on of panels (N/R,:,R), without what lies beyond column N."""
    M, N = x.shape
    R = width(panels)
    for panel in range((N + R - 1) // R):
        for m in range(M):
            for j in range(min(R, N - panel * R)):
                x[m, panel * R + j] = panels[panel, first + m, j]


@kernel
def multiply(c: Array, c_row: int, a: Array, a_row: int, b: Array, M: int, K: int, add: bool) -> None:
    """c = a @ b, or c += a @ b where `add`: M rows of c and of a, from c_row and a_row on; K rows of b.

    c (N/R,:,R), a (:,:,R) of at least K columns, b (N/R,:,R). K counts words.
    """
    R = width(c)
    word = a.dtype.type(0)
    for front in range(0, K, DEPTH):
        depth = min(DEPTH, K - front)
        for start in range(0, M, HEIGHT):
            height = min(HEIGHT, M - start)
            tiles = (height + ROWS - 1) // ROWS
            for panel in range(0, c.shape[0], PANELS):
                for tile in range(tiles):  # of nearly equal height
                    top, bottom = start + height * tile // tiles, start + height * (tile + 1) // tiles
                    multiply_tile(
                        word,
                        bottom - top,
                        min(PANELS, c.shape[0] - panel),
                        1 if add or front > 0 else 0,
                        depth,
                        a.ctypes.data + front // R * a.strides[0] + (a_row + top) * ROW,
                        a.strides[0],
                        b.ctypes.data + panel * b.strides[0] + front * ROW,
                        b.strides[0],
                        c.ctypes.data + panel * c.strides[0] + (c_row + top) * ROW,
                        c.strides[0],
                    )


@kernel
def multiply_transposed(c: Array, c_row: int, a: Array, a_row: int, b: Array, b_row: int, M: int, K: int, add: bool) -> None:
    """c = a^T @ b, or c += a^T @ b where `add`: M rows of c and columns of a; K rows of a and of b.

    c (N/R,:,R), a (M/R,:,R), b (N/R,:,R), from rows c_row, a_row, b_row on. K counts words.
    """
    R = width(c)
    word = a.dtype.type(0)
    for front in range(0, K, DEPTH):
        depth = min(DEPTH, K - front)
        for start in range(0, M, HEIGHT):
            stop = min(M, start + HEIGHT)
            for panel in range(0, c.shape[0], PANELS):
                for top in range(start, stop, TALL):
                    multiply_tile_transposed(
                        word,
                        min(TALL, stop - top),
                        min(PANELS, c.shape[0] - panel),
                        1 if add or front > 0 else 0,
                        depth,
                        a.ctypes.data + top // R * a.strides[0] + (a_row + front) * ROW + top % R * (ROW // R),
                        0,
                        b.ctypes.data + panel * b.strides[0] + (b_row + front) * ROW,
                        b.strides[0],
                        c.ctypes.data + panel * c.strides[0] + (c_row + top) * ROW,
                        c.strides[0],
                    )


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
def to_words(words: Array, row: int, x: Array, x_row: int, rows: int) -> None:
    """bfloat16 for the left of a product: rows of words (N/2R,:,R) uint32 from `row` on = rows of x (N/R,:,R) float32."""
    for panel in range(0, x.shape[0], 2):
        one = x.ctypes.data + panel * x.strides[0] + x_row * ROW
        other = one + x.strides[0] if panel + 1 < x.shape[0] else 0
        target = words.ctypes.data + panel // 2 * words.strides[0] + row * ROW
        for m in range(rows):
            round_rows(False, one + m * ROW, other + m * ROW if other else 0, target + m * ROW)


@kernel
def to_pairs(pairs: Array, row: int, x: Array, x_row: int, rows: int) -> None:
    """bfloat16 for the right, or transposed: rows of pairs (N/R,:,R) uint32 = pairs of rows of x (N/R,:,R) float32."""
    for panel in range(x.shape[0]):
        source = x.ctypes.data + panel * x.strides[0] + x_row * ROW
        target = pairs.ctypes.data + panel * pairs.strides[0] + row * ROW
        for m in range(rows // 2):
            round_rows(True, source + 2 * m * ROW, source + (2 * m + 1) * ROW, target + m * ROW)
        if rows % 2:
            round_rows(True, source + (rows - 1) * ROW, 0, target + rows // 2 * ROW)


@kernel
def transpose_to_pairs(out: Array, x: Array, x_row: int, K: int) -> None:
    """out (K/R,N/2,R) uint32 = pairs of rows of the transpose of K rows of x (N/R,:,R) float32, from x_row on.

    N is a multiple of 2 R.
    """
    R = 16
    for panel in range(0, x.shape[0], 2):
        second = min(panel + 1, x.shape[0] - 1)
        for k in range(0, K - R + 1, R):
            transpose_block_of_pairs(
                x.ctypes.data + panel * x.strides[0] + (x_row + k) * ROW,
                x.ctypes.data + second * x.strides[0] + (x_row + k) * ROW,
                out.ctypes.data + k // R * out.strides[0] + panel * R // 2 * ROW,
            )
        if K % R:
            for j in range(R):
                source, column = panel if j < R // 2 else second, 2 * j % R
                for k in range(R):
                    row, real = x[source, x_row + K // R * R + min(k, K % R - 1)], k < K % R
                    word = bf16(row[column]) | (bf16(row[column + 1]) << np.uint32(16))
                    out[K // R, panel * R // 2 + j, k] = word if real else np.uint32(0)


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
        """Rows of x (N/R,:,R) as the right factor, or as the transposed left one. Returns an array and its first row."""
        if not self.bf16:
            return x, row
        out = self.empty(name, (len(x), (rows + 1) // 2, self.R), np.uint32)
        self.team.share(lambda first, last: to_pairs(out, first // 2, x, row + first, last - first), rows, 2)
        return out, 0

    def transposed(self, name: str, x: Array, row: int, rows: int) -> Array:
        """The transpose of rows of x (N/R,:,R) as the right factor."""
        panels, N = -(-rows // self.R), len(x) * self.R
        if not self.bf16:
            out = self.empty(name, (panels, N, self.R), self.dtype)
            by_rows = lambda first, last: transpose(out[first // self.R :], x, row + first, last - first)
        else:
            out = self.empty(name, (panels, (N // self.R + 1) // 2 * self.R, self.R), np.uint32)
            by_rows = lambda first, last: transpose_to_pairs(out[first // self.R :], x, row + first, last - first)
        self.team.share(by_rows, rows, self.R)
        return out

    def multiply(self, c: Array, c_row: int, a: Array, a_row: int, b: Array, M: int, K: int, add: bool) -> None:
        """`multiply` by the team."""
        rows = lambda first, last: multiply(c, c_row + first, a, a_row + first, b, last - first, K, add)
        self.team.share(rows, M, ROWS)

    def multiply_transposed(
        self, c: Array, c_row: int, a: Array, a_row: int, b: Array, b_row: int, M: int, K: int, add: bool
    ) -> None:
        """`multiply_transposed` by the team."""
        panels = lambda first, last: multiply_transposed(c[first:last], c_row, a, a_row, b[first:last], b_row, M, K, add)
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
