"""The layer at the top of a model, which says what its losses are."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from ..kernels.operands import Weight
from ..kernels.panel_rows import put_rows, take_rows
from ..kernels.softmax import GROUP, IGNORE, Chunk, softmax_cross_entropy
from ..kernels.types import Array
from .layers import Layer, Plan

CHUNK = 1 << 24  # bytes: at most so many of exponentials of logits in memory at a time
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
        if plan.taken is None:
            self._chunk = Chunk(tokens, columns, classes, operands, plan.training)
        plan.take(tokens * (min(classes, GROUP) + columns + 7))
        plan.take(rows * columns)  # "rows with a target"
        self._losses: Array = np.zeros(rows if plan.taken is None else 0, plan.layout.dtype)
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
        packed = self._operands.empty("rows with a target", self._shape, dtype)
        dy = self._operands.empty("their gradient", self._shape, dtype) if self.training else self.dy
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
