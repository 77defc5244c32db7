"""The layers that kinds of models are wired of: each has its parameters, its memory, a forward and a backward.

Planned once for at most so many rows, run for any fewer. All values lie in panels (kernels/gemm.py); row t B + n is lane n at
time t. A layer's backward overwrites the gradients of its weights.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from ..kernels.embedding import (
    embedding_backward,
    embedding_forward,
    gates_backward,
    gates_forward,
    tied_embedding_backward,
    tied_embedding_forward,
)
from ..kernels.gemm import zero_panels
from ..kernels.lstm import lstm_backward, lstm_forward
from ..kernels.operands import Operands, Weight
from ..kernels.types import Array
from .layout import Layout


class Plan(NamedTuple):
    """What layers are made for."""

    layout: Layout
    operands: Operands
    rows: int  # at most, T B
    training: bool
    taken: list[int] | None = None  # bytes: where they are only counted, nothing is made

    def panels(self, columns: int, rows: int = 0) -> Array:
        """Zeros for so many columns, of all rows or of some."""
        R, dtype = self.layout.R, self.layout.dtype
        if self.taken is None:
            return zero_panels(rows or self.rows, columns, dtype)
        panels = -(-columns // R)
        self.take(panels * R * (rows or self.rows))
        return np.broadcast_to(dtype.type(0), (panels, 1, R))  # a row stands for all

    def take(self, numbers: int, itemsize: int = 0) -> None:
        """Count numbers, of the model's dtype or of so many bytes each, that lie elsewhere, or not before a forward."""
        if self.taken is not None:
            self.taken.append(numbers * (itemsize or self.layout.dtype.itemsize))


class Layer:
    """What a model asks of each of its layers."""

    def bind(self, parameters: Mapping[str, Array], factors: Mapping[str, Weight]) -> None:
        """Use these blocks, and what products take of them."""

    def bind_gradients(self, gradients: Mapping[str, Array]) -> None:
        """Write gradients there."""


class Embedding(Layer):
    """Tokens (N,) to rows: of a table, of a tied output layer, or for one-hot inputs those of the first layer's gates."""

    def __init__(self, plan: Plan) -> None:
        config = plan.layout.config
        self.tied, self.columns = config.tied, config.embedding
        self._block = "output" if config.tied else "embedding"

    def bind(self, parameters: Mapping[str, Array], factors: Mapping[str, Weight]) -> None:
        self._table = parameters[self._block]

    def bind_gradients(self, gradients: Mapping[str, Array]) -> None:
        self._d = gradients[self._block]

    def forward(self, x: Array, tokens: Array) -> None:
        """x (E/R,N,R) = their rows; one-hot inputs: of gates (4H/R,N,R)."""
        if self.tied:
            tied_embedding_forward(x, tokens, self._table, self.columns)
        elif self.columns:
            embedding_forward(x, tokens, self._table)
        else:
            gates_forward(x, tokens, self._table)

    def backward(self, tokens: Array, dx: Array) -> None:
        """Add dx to the rows of its tokens; one-hot inputs: the gates' da."""
        if self.tied:
            tied_embedding_backward(self._d, tokens, dx, self.columns)
        elif self.columns:
            embedding_backward(self._d, tokens, dx)
        else:
            gates_backward(self._d, tokens, dx)


class LstmMemory:
    """Where an LSTM layer keeps a window: h, c (P,(T+1)B,R) and gates (4P,TB,R). Layers share one where nothing is saved."""

    def __init__(self, plan: Plan, units: int, lanes: int) -> None:
        self.h, self.c = (plan.panels(units, plan.rows + lanes) for _ in range(2))
        self.gates = plan.panels(4 * len(self.h) * plan.layout.R)


class LstmScratch:
    """What going back needs beside that, for one layer at a time."""

    def __init__(self, plan: Plan, units: int, lanes: int) -> None:
        self.dh, self.dc = (plan.panels(units, lanes) for _ in range(2))
        self.db = np.zeros((4 * len(self.dh), plan.layout.R), plan.layout.dtype)


class Lstm(Layer):
    """An LSTM layer in one direction, of B lanes (kernels/lstm.py)."""

    def __init__(self, plan: Plan, name: str, memory: LstmMemory, scratch: LstmScratch | None) -> None:
        self.name, self.memory, self._operands = name, memory, plan.operands
        self.scratch = scratch

    def bind(self, parameters: Mapping[str, Array], factors: Mapping[str, Weight]) -> None:
        self._Wx, self._Wh = factors.get(f"{self.name}.x"), factors[f"{self.name}.h"]
        self._b = parameters[f"{self.name}.b"]

    def bind_gradients(self, gradients: Mapping[str, Array]) -> None:
        self._dWx, self._dWh = gradients.get(f"{self.name}.x"), gradients[f"{self.name}.h"]
        self._d_b = gradients[f"{self.name}.b"]

    def forward(self, x: Array | None, row: int, T: int, B: int) -> None:
        """T steps of x (D/R,:,R) from `row` on; None: memory.gates has x @ Wx. Slot 0 of h and c is the state before."""
        memory, b = self.memory, self._b.sum(axis=1)
        lstm_forward(memory.h, memory.c, memory.gates, self._operands, x, row, self._Wx, self._Wh, b, T, B)

    def backward(
        self,
        dx: Array | None,
        dh: Array,
        x: Array | None,
        row: int,
        T: int,
        B: int,
        between: Callable[[], object] | None = None,
        ends: bool = False,
    ) -> None:
        """The gradients of the last forward, which dh (P,TB,R) is of; memory.gates becomes da.

        ends : whether scratch.dh and dc get the gradients of the state before the window
        """
        memory, scratch = self.memory, self.scratch
        assert scratch is not None
        lstm_backward(
            dx, self._dWx, self._dWh, scratch.db, memory.gates, scratch.dh, scratch.dc, self._operands, dh, x, row, memory.h,
            memory.c, self._Wx, self._Wh, T, B, between, ends=ends,
        )  # fmt: skip
        self._d_b[:] = scratch.db[:, None]


def stack(plan: Plan, names: Sequence[str], lanes: int) -> list[Lstm]:
    """LSTM layers of these names, the lowest first. Without training all share one memory: a layer reads its input whole before
    it writes its output.
    """
    units = plan.layout.config.hidden
    shared = None if plan.training else LstmMemory(plan, units, lanes)
    scratch = LstmScratch(plan, units, lanes) if plan.training else None
    return [Lstm(plan, name, shared or LstmMemory(plan, units, lanes), scratch) for name in names]


class Dense(Layer):
    """y = x W, without bias."""

    def __init__(self, plan: Plan, name: str) -> None:
        self.name, self._operands = name, plan.operands

    def bind(self, parameters: Mapping[str, Array], factors: Mapping[str, Weight]) -> None:
        self._W = factors[self.name]

    def bind_gradients(self, gradients: Mapping[str, Array]) -> None:
        self._dW = gradients[self.name]

    def forward(self, y: Array, x: Array, row: int, rows: int) -> None:
        """y (N/R,:,R) from its first row on, of x (D/R,:,R) from `row` on."""
        operands = self._operands
        left, first = operands.words("x", x, row, rows)
        operands.multiply(y, 0, left, first, self._W.factor, rows, operands.depth(self._W.rows), False)

    def backward(self, dx: Array, dy: Array, x: Array, row: int, rows: int, add: bool = False) -> None:
        """dx (D/R,:,R) from its first row on, added to where `add`."""
        operands = self._operands
        (left, first), columns = operands.words("dy", dy, 0, rows), operands.depth(len(dy) * operands.R)
        operands.multiply(dx, 0, left, first, self._W.transposed(operands), rows, columns, add)
        pairs, first = operands.pairs("dy pairs", dy, 0, rows)
        operands.multiply_transposed(self._dW, "x", x, row, pairs, first, rows)
