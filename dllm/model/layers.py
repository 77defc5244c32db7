"""The layers that kinds of models are wired of: each has its parameters, its memory, a forward and a backward.

Planned once for at most so many rows, run for any fewer. All values lie in panels (kernels/gemm.py); row t B + n is lane n at
time t. A layer's backward overwrites the gradients of its weights.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
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
from ..kernels.panel_rows import put_rows, take_rows
from ..kernels.reverse import reverse_rows
from ..kernels.softmax import IGNORE, Chunk, softmax_cross_entropy
from ..kernels.team import Team
from ..kernels.types import Array
from . import blocks
from .layout import Layout

CHUNK = 1 << 24  # bytes: at most so many of exponentials of logits in memory at a time


class Plan(NamedTuple):
    """What layers are made for."""

    layout: Layout
    operands: Operands
    rows: int  # at most, T B
    training: bool

    def panels(self, columns: int, rows: int = 0) -> Array:
        """Zeros for so many columns, of all rows or of some."""
        return zero_panels(rows or self.rows, columns, self.layout.dtype)


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


class Encoder(Layer):
    """Layers that read a whole input, in one direction or in both side by side.

    Backwards a lane is read from its own last step, so that what fills up a window stays behind it in both directions: row
    (t, n) goes to (lengths[n] - 1 - t, n), and back the same way. So states never see it.
    """

    def __init__(self, plan: Plan, layers: int, lanes: int) -> None:
        config = plan.layout.config
        self.directions, H, R = blocks.directions(config), config.hidden, plan.layout.R
        self.columns, self._P = blocks.memory(config), -(-H // R)
        inputs = config.features or config.embedding
        both, team = len(self.directions) == 2, plan.operands.team
        self._pair = Team(2) if both and team.size > 1 else None  # a direction each, with their share of the threads
        teams = [Team(team.size - team.size // 2), Team(team.size // 2)] if self._pair else [team] * 2
        plans = [plan._replace(operands=Operands(plan.layout.dtype, plan.operands.bf16, one)) for one in teams]
        shared = [LstmMemory(plan, H, lanes) for _ in self.directions if not plan.training]
        back = [LstmScratch(plan, H, lanes) if plan.training else None for _ in self.directions]

        def memory(part: int) -> LstmMemory:
            return shared[part] if shared else LstmMemory(plan, H, lanes)

        self.layers = [
            [Lstm(plans[part], f"encoder.{layer}.{way}", memory(part), back[part]) for part, way in enumerate(self.directions)]
            for layer in range(layers)
        ]
        copies = layers if plan.training else min(layers, 2)
        self._out = [plan.panels(self.columns) for _ in range(copies)]
        widest = max(inputs, self.columns if layers > 1 else 0)
        self._turned = [plan.panels(widest) for _ in range(copies)] if both else []
        if plan.training:
            self._dx, self._dx_turned = plan.panels(widest), plan.panels(widest if both else 1)
            self._dh = plan.panels(H if both else 1)

    def bind(self, parameters: Mapping[str, Array], factors: Mapping[str, Weight]) -> None:
        for layer in self.layers:
            for one in layer:
                one.bind(parameters, factors)

    def bind_gradients(self, gradients: Mapping[str, Array]) -> None:
        for layer in self.layers:
            for one in layer:
                one.bind_gradients(gradients)

    def forward(
        self,
        x: Array,
        lengths: Array,
        S: int,
        B: int,
        drop: Callable[[Array, int], None],
        between: Callable[[], object] | None = None,
    ) -> Array:
        """The top layer's output (columns/R,SB,R) of x (D/R,:,R); drop(array, l) is called with what layer l has given."""
        self._inputs: list[Array] = []
        for number, layer in enumerate(self.layers):
            out = self._out[number % len(self._out)]
            self._inputs.append(x)

            def read(part: int, layer: list[Lstm] = layer, number: int = number, x: Array = x, out: Array = out) -> None:
                memory, here = layer[part].memory, out[part * self._P : (part + 1) * self._P]
                memory.h[:, :B], memory.c[:, :B] = 0, 0
                if part:
                    turned = self._turned[number % len(self._turned)][: len(x)]
                    reverse_rows(turned, 0, x, 0, lengths, S, B, False)
                    layer[part].forward(turned, 0, S, B)
                    reverse_rows(here, 0, memory.h, B, lengths, S, B, False)
                else:
                    layer[part].forward(x, 0, S, B)
                    here[:, : S * B] = memory.h[:, B : (S + 1) * B]

            self._in_each_direction(read)
            if between is not None:
                between()
            drop(out, number)
            x = out
        return x

    def _in_each_direction(self, work: Callable[[int], object]) -> None:
        if self._pair is not None:
            self._pair.run(work)
        else:
            for part in range(len(self.directions)):
                work(part)

    def backward(
        self,
        dm: Array,
        lengths: Array,
        S: int,
        B: int,
        drop: Callable[[Array, int], None],
        ready: Callable[[str], None],
        between: Callable[[], object] | None = None,
    ) -> Array:
        """The gradient of x (D/R,SB,R) from that of the top layer's output, which is written over. drop as in the forward."""
        for number in reversed(range(len(self.layers))):
            drop(dm, number)
            layer, x, dx = self.layers[number], self._inputs[number], self._dx[: len(self._inputs[number])]

            def go_back(part: int, layer: list[Lstm] = layer, number: int = number, x: Array = x, dx: Array = dx) -> None:
                dh = dm[part * self._P : (part + 1) * self._P]
                if part:
                    reverse_rows(self._dh, 0, dh, 0, lengths, S, B, False)
                    turned, there = self._turned[number][: len(x)], self._dx_turned[: len(x)]
                    layer[part].backward(there, self._dh, turned, 0, S, B, None if self._pair else between)
                else:
                    layer[part].backward(dx, dh, x, 0, S, B, between)

            self._in_each_direction(go_back)
            if len(layer) == 2:
                reverse_rows(dx, 0, self._dx_turned[: len(x)], 0, lengths, S, B, True)
            for one in layer:
                ready(f"{one.name}.b")
            if number:
                dm[:, : S * B] = dx[:, : S * B]
        return dx


Weigh = Callable[[Array, Array], Array]  # rows (n,) and their losses, which it may replace -> their weights (n,)


class Head(Layer):
    """The layer that says what a model's losses are.

    Attributes
    ----------
    dy : (columns/R,rows,R) array
        The gradient of what was read; of no columns where nothing is trained.
    """

    dy: Array

    def forward(self, y: Array, row: int, targets: Array, scale: float, between: Callable[[], object] | None = None) -> Array:
        """Losses of targets (T,B), nats, of rows of y (columns/R,:,R) from `row` on; of padding 0. Fills dy."""
        raise NotImplementedError


class Output(Head):
    """Softmax and losses of rows that have a target, as many as targets; others never reach it."""

    def __init__(self, plan: Plan, columns: int, classes: int, smoothing: float = 0.0) -> None:
        rows, operands, itemsize = plan.rows, plan.operands, plan.layout.dtype.itemsize
        self.training, self.smoothing = plan.training, smoothing
        size = 2 if operands.bf16 else itemsize
        tokens = tokens_of_chunk(rows, classes, operands.R, size) if plan.training else rows
        self._chunk = Chunk(tokens, columns, classes, operands, plan.training)
        self._losses: Array = np.zeros(rows, plan.layout.dtype)
        self._shape, self._operands = (-(-columns // operands.R), rows, operands.R), operands
        self.dy = plan.panels(columns if plan.training else 0)

    def bind(self, parameters: Mapping[str, Array], factors: Mapping[str, Weight]) -> None:
        self._W = parameters["output"]

    def bind_gradients(self, gradients: Mapping[str, Array]) -> None:
        self._dW = gradients["output"]

    def forward(
        self,
        y: Array,
        row: int,
        targets: Array,
        scale: float,
        between: Callable[[], object] | None = None,
        weigh: Weigh | None = None,
    ) -> Array:
        """As Head has it. weigh : of rows that have a target, as softmax.py asks it of tokens"""
        flat, some = targets.reshape(-1), np.flatnonzero(targets != IGNORE)
        losses: Array = self._losses[: flat.size]
        of_rows = None if weigh is None else lambda part, found: weigh(some[part], found)
        if len(some) == flat.size:
            self._run(losses, self.dy, (y, row), flat, scale, between, of_rows)
            return losses.reshape(targets.shape)
        dtype = self._losses.dtype
        packed, dy = (self._operands.empty(name, self._shape, dtype) for name in ("rows with a target", "their gradient"))
        take_rows(packed, y, row, some)
        found = self._operands.empty("their losses", (len(some),), dtype)
        self._run(found, dy, (packed, 0), flat[some], scale, between, of_rows)
        losses[:] = 0
        losses[some] = found
        if self.training:
            self.dy[:, : flat.size] = 0
            put_rows(self.dy, 0, dy, some)
        return losses.reshape(targets.shape)

    def _run(
        self,
        losses: Array,
        dy: Array,
        read: tuple[Array, int],
        targets: Array,
        scale: float,
        between: Callable[[], object] | None,
        weigh: Callable[[slice, Array], Array] | None,
    ) -> None:
        if self.training and not len(targets):
            self._dW[:] = 0
        into, dW = (dy, self._dW) if self.training else (None, None)
        arguments = self._chunk, *read, self._W, targets, scale, between, self.smoothing, weigh
        softmax_cross_entropy(losses, into, dW, *arguments)


def tokens_of_chunk(tokens: int, vocabulary: int, R: int, size: int) -> int:
    """Tokens of a window that the output layer takes at a time: all, or whole pairs of panels of R. size: bytes of a logit."""
    chunks = -(-tokens * vocabulary * size // CHUNK)
    return tokens if chunks == 1 else -(-tokens // (chunks * 2 * R)) * 2 * R
