"""How a Decoder multiplies: in the precision of its model, in bfloat16, or in int8. Right factors are made ready once.

A row's result depends on that row alone, to the bit, and threads share columns, so that they share what few rows cost too.
"""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np

from ..kernels import gemm, int8, lstm
from ..kernels.operands import Operands
from ..kernels.team import Team, new_barrier, share_in_pairs
from ..kernels.tiles import PANELS
from ..kernels.types import Array, DType


class Products(Protocol):
    """What a Decoder asks for."""

    operands: Operands  # memory, and the team

    def right(self, name: str, W: Array, K: int) -> Any:
        """The first K rows of W (N/R,:,R), ready to be the right factor."""

    def right_of_transpose(self, name: str, W: Array, K: int) -> Any:
        """The transpose of the first K columns of W (:,N,R), ready to be the right factor."""

    def multiply(self, c: Array, a: Array, row: int, b: Any, K: int) -> None:
        """c (N/R,M,R) = a @ b, M rows of a from `row` on."""

    def forward_steps(self, h: Array, c: Array, gates: Array, Wh: Any, b: Array, T: int, B: int, H: int) -> None:
        """The recurrence of a window, as kernels/lstm.py has it; gates hold x @ Wx."""


class FloatProducts:
    """Products of float32, float64 or bfloat16."""

    def __init__(self, dtype: DType, bf16: bool, team: Team) -> None:
        self.operands = Operands(dtype, bf16, team)

    def right(self, name: str, W: Array, K: int) -> Array:
        """As Products has it."""
        ready: Array = self.operands.pairs(name, W, 0, K)[0]
        return ready

    def right_of_transpose(self, name: str, W: Array, K: int) -> Array:
        """As Products has it."""
        return self.operands.transposed(name, W, 0, W.shape[1])

    def multiply(self, c: Array, a: Array, row: int, b: Array, K: int) -> None:
        """As Products has it."""
        operands, M = self.operands, c.shape[1]
        (a, row), K = operands.words("words", a, row, M), operands.depth(K)

        def by_columns(first: int, last: int) -> None:
            gemm.multiply(c[first:last], 0, a, row, b[first:last], M, K, False)

        operands.team.share(by_columns, len(c), PANELS)

    def forward_steps(self, h: Array, c: Array, gates: Array, Wh: Array, b: Array, T: int, B: int, H: int) -> None:
        """As Products has it."""
        left, team = self.operands.like("left", h), self.operands.team
        arguments = h, c, gates, left, Wh, self.operands.depth(H), b, T, B, new_barrier(), team.size
        team.run(lambda part: lstm.forward_steps(*arguments, part))


class Int8Products:
    """Products of int8, of factors in float32."""

    def __init__(self, team: Team) -> None:
        self.operands = Operands(np.float32, False, team)
        self._sums = gemm.aligned((team.size, int8.PANELS, int8.HEIGHT, gemm.width(np.float32)), np.int32)

    def right(self, name: str, W: Array, K: int) -> int8.Right:
        """As Products has it."""
        return int8.quantised_columns(W, K)

    def right_of_transpose(self, name: str, W: Array, K: int) -> int8.Right:
        """As Products has it."""
        memory = Operands(np.float32, False, self.operands.team)  # of its own, so that nothing of float32 stays
        return int8.quantised_columns(memory.transposed(name, W, 0, W.shape[1]), K)

    def multiply(self, c: Array, a: Array, row: int, b: int8.Right, K: int) -> None:
        """As Products has it."""
        team, M, left = self.operands.team, c.shape[1], self._left(c.shape[1], K)
        team.share(lambda first, last: int8.quantise_rows(left, first, a, row + first, last - first), M, 16)

        def by_columns(part: int) -> None:
            first, last = share_in_pairs(len(c), team.size, part)
            int8.multiply(c[first:last], 0, left, 0, b, first, self._sums[part], M, False)

        team.run(by_columns)

    def forward_steps(self, h: Array, c: Array, gates: Array, Wh: int8.Right, b: Array, T: int, B: int, H: int) -> None:
        """As Products has it."""
        left, team = self._left((T + 1) * B, H), self.operands.team
        arguments = h, c, gates, left, Wh, self._sums, b, T, B, new_barrier(), team.size
        team.run(lambda part: int8.forward_steps(*arguments, part))

    def _left(self, rows: int, K: int) -> int8.Left:
        """Memory for a left factor; what an earlier one held is lost."""
        shape = -(-K // int8.QUADS), rows, self.operands.R
        return int8.Left(self.operands.empty("words", shape, np.int32), self.operands.empty("scales", (rows,), np.float32))


def products(kind: str, dtype: DType, team: Team) -> Products:
    """Products of a kind, as precision.products_of names it, for a model whose parameters are of dtype."""
    return Int8Products(team) if kind == "int8" else FloatProducts(dtype, kind == "bf16", team)
