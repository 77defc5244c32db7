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

    for each block of A, some columns by some rows          less than half of the second-level cache: stays there
        for each pair of panels of B                        as many rows: in the first level, or from the second
            for each tile of rows of the block              its rows of A come from the second level, sums stay in registers

Each element of C is a sum over k in one fixed order, whichever tile it falls into and whoever computes it.

bfloat16: a word of an operand is a pair of bfloat16, neighbours along k, in 32 bits; C is float32. As A, pairs are columns
2k and 2k+1 of a row; as B, rows 2k and 2k+1 of a column. operands.py makes them of float32 panels. Where the processor has
tiles for them (AMX), these take the place of the loops here (amx.py).

Blocks follow the second-level cache. The results do not: sums over k go on where the block before has left off.
"""

from typing import no_type_check

import numpy as np
from numba import types
from numba.extending import overload

from .amx import multiply_by_tiles, release_tiles
from .compile import OPTIONS, kernel
from .processor import AMX, L2
from .tiles import PANELS, ROW, ROWS, TALLEST, multiply_tile, multiply_tile_transposed
from .types import Array, DType

BLOCK = L2 * 7 // 16  # bytes of a block of A
DEPTH = min(1024, max(256, L2 >> 10))  # columns of it at most, and HEIGHT rows where it is transposed
HEIGHT = max(64, BLOCK // (4 * DEPTH) // 32 * 32)
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

    c (N/R,:,R), a (:,:,R) of at least K columns, b (N/R,:,R). K counts words. Of words, pairs of bfloat16, b has zeros behind
    its K rows up to a multiple of 16.
    """
    multiply_on(0, c, c_row, a, a_row, b, M, K, add)
    leave_tiles(a)


def multiply_on(current: int, c: Array, c_row: int, a: Array, a_row: int, b: Array, M: int, K: int, add: bool) -> int:
    """`multiply` in a loop of products, which begins with current = 0 and ends with `leave_tiles`. Returns the next
    `current`.
    """
    raise NotImplementedError("for kernels only")


@overload(multiply_on, jit_options=OPTIONS)
@no_type_check
def _multiply_on(current, c, c_row, a, a_row, b, M, K, add):
    def by_tiles(current, c, c_row, a, a_row, b, M, K, add):
        return multiply_by_tiles(current, c, c_row, a, a_row, b, M, K, add)

    def by_vectors(current, c, c_row, a, a_row, b, M, K, add):
        multiply_by_vectors(c, c_row, a, a_row, b, M, K, add)
        return current

    return by_tiles if AMX and a.dtype == types.uint32 else by_vectors


def leave_tiles(a: Array) -> None:
    """The end of a loop of products with left factors like a."""


@overload(leave_tiles, jit_options=OPTIONS)
@no_type_check
def _leave_tiles(a):
    def by_tiles(a):
        release_tiles()

    return by_tiles if AMX and a.dtype == types.uint32 else lambda a: None


@kernel
def multiply_by_vectors(c: Array, c_row: int, a: Array, a_row: int, b: Array, M: int, K: int, add: bool) -> None:
    """`multiply` by vectors, and without tiles."""
    R = width(c)
    word = a.dtype.type(0)
    depth, height = block(M, K, R)
    most = tallest(a)
    rows, panels = (most, 1) if ROWS < M <= most else (ROWS, PANELS)
    for front in range(0, K, depth):
        steps = min(depth, K - front)
        for start in range(0, M, height):
            some = min(height, M - start)
            tiles = (some + rows - 1) // rows
            for panel in range(0, c.shape[0], panels):
                for tile in range(tiles):  # of nearly equal height
                    top, bottom = start + some * tile // tiles, start + some * (tile + 1) // tiles
                    multiply_tile(
                        word,
                        bottom - top,
                        min(panels, c.shape[0] - panel),
                        1 if add or front > 0 else 0,
                        steps,
                        a.ctypes.data + front // R * a.strides[0] + (a_row + top) * ROW,
                        a.strides[0],
                        b.ctypes.data + panel * b.strides[0] + front * ROW,
                        b.strides[0],
                        c.ctypes.data + panel * c.strides[0] + (c_row + top) * ROW,
                        c.strides[0],
                    )


def tallest(a: Array) -> int:
    """Rows of a tile of one panel: where all of a fit, B is read once, from wherever it is. Words of several numbers gain
    nothing.
    """
    raise NotImplementedError("for kernels only")


@overload(tallest, inline="always")
@no_type_check
def _tallest(a):
    most = TALLEST if isinstance(a.dtype, types.Float) else ROWS
    return lambda a: most


@kernel
def block(M: int, K: int, R: int) -> tuple[int, int]:
    """Columns, a multiple of R, and rows of the blocks of A (M,K): as few as the cache allows, nearly equal ones."""
    parts = (K + DEPTH - 1) // DEPTH
    depth = (K + parts * R - 1) // (parts * R) * R
    parts = (M * depth * (ROW // R) + BLOCK - 1) // BLOCK
    height = (M + parts * ROWS - 1) // (parts * ROWS) * ROWS
    return depth, height


@kernel
def multiply_transposed(c: Array, c_row: int, a: Array, a_row: int, b: Array, b_row: int, M: int, K: int, add: bool) -> None:
    """c = a^T @ b, or c += a^T @ b where `add`: M rows of c and columns of a; K rows of a and of b.

    c (N/R,:,R), a (M/R,:,R), b (N/R,:,R), from rows c_row, a_row, b_row on; float32 or float64.
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
