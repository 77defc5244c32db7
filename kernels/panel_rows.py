"""Some rows of panels (gemm.py), as NumPy's x[rows] has them of a matrix: those of a window that have a target, say.

rows (N,) int64. `put_rows` is the gradient of `take_rows` where nothing else adds to it, and the other way round.
"""

import numpy as np

from .compile import kernel
from .gemm import zero_panels
from .types import Array, DType


@kernel
def take_rows(out: Array, x: Array, first: int, rows: Array) -> None:
    """out (P,N,R) = rows first + rows[n] of x (P,:,R)."""
    for panel in range(x.shape[0]):
        for n in range(rows.size):
            for j in range(x.shape[2]):
                out[panel, n, j] = x[panel, first + rows[n], j]


@kernel
def put_rows(out: Array, first: int, x: Array, rows: Array) -> None:
    """Rows first + rows[n] of out (P,:,R), different ones, = x (P,N,R). Other rows of out are not touched."""
    for panel in range(x.shape[0]):
        for n in range(rows.size):
            for j in range(x.shape[2]):
                out[panel, first + rows[n], j] = x[panel, n, j]


def warm_up(dtype: DType) -> None:
    """Run every kernel of this file once, for panels of `dtype`: all are compiled then, or loaded from the cache."""
    x, rows = zero_panels(1, 1, dtype), np.zeros(1, np.int64)
    take_rows(x, x, 0, rows)
    put_rows(x, 0, x, rows)
