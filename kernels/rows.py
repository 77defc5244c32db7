"""Some rows of a table (V,E), as NumPy's table[rows] has them, at the speed of memory: an embedding has few that a step uses.

rows (n,) int64, different ones where a table is written.
"""

import numpy as np

from .compile import kernel
from .types import Array, DType


@kernel
def gather_rows(out: Array, table: Array, rows: Array) -> None:
    """out (n,E) = table[rows]."""
    for n in range(rows.size):
        source = table[rows[n]]
        for k in range(source.size):
            out[n, k] = source[k]


@kernel
def scatter_rows(table: Array, rows: Array, values: Array) -> None:
    """table[rows] = values (n,E)."""
    for n in range(rows.size):
        target = table[rows[n]]
        for k in range(target.size):
            target[k] = values[n, k]


@kernel
def copy_rows(table: Array, source: Array, rows: Array) -> None:
    """table[rows] = source[rows], of another table (V,E)."""
    for n in range(rows.size):
        target, values = table[rows[n]], source[rows[n]]
        for k in range(target.size):
            target[k] = values[k]


@kernel
def clear_rows(table: Array, rows: Array) -> None:
    """table[rows] = 0."""
    for n in range(rows.size):
        table[rows[n]] = 0


@kernel
def squares_of_rows(table: Array, rows: Array) -> float:
    """The sum of squares of table[rows], each row's in the table's precision, all in float64."""
    total = 0.0
    for n in range(rows.size):
        row, part = table[rows[n]], table.dtype.type(0)
        for k in range(row.size):
            part += row[k] * row[k]
        total += part
    return total


def warm_up(dtype: DType) -> None:
    """Run every kernel of this file once, for tables of `dtype`: all are compiled then, or loaded from the cache."""
    table, rows = np.zeros((1, 2), dtype), np.zeros(1, np.int64)
    gather_rows(table, table, rows)
    scatter_rows(table, rows, table)
    copy_rows(table, table, rows)
    clear_rows(table, rows)
    squares_of_rows(table, rows)
