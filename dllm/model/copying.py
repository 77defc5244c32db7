"""Tokens of the source that a decoder copies, by its attention and a gate (See et al. 2017; kernels/copying.py)."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from ..kernels.copying import copied, copied_backward, mix
from ..kernels.operands import Weight
from ..kernels.types import Array
from .layers import Dense, Layer, Plan
from .output import Weigh


class Copying(Layer):
    """P = g q + (1 - g) (attention on the target), with g = sigma([h ; c] w)."""

    def __init__(self, plan: Plan) -> None:
        self._gate, self._plan = Dense(plan, "gate"), plan
        self.gate = plan.panels(1)  # z of each row, in column 0
        self._dgate = plan.panels(1)
        self._a, self._da = np.zeros((2, plan.rows if plan.taken is None else 0), plan.layout.dtype)
        plan.take(2 * plan.rows)

    def bind(self, parameters: Mapping[str, Array], factors: Mapping[str, Weight]) -> None:
        self._gate.bind(parameters, factors)

    def bind_gradients(self, gradients: Mapping[str, Array]) -> None:
        self._gate.bind_gradients(gradients)

    def look(self, top: Array, rows: int) -> None:
        """Fill `gate` of so many rows of top (columns/R,:,R)."""
        self._gate.forward(self.gate, top, 0, rows)

    def forward(self, top: Array, A: Array, tokens: Array, targets: Array, lengths: Array, scale: float) -> Weigh:
        """What the softmax asks for the weights of its rows, after the attention A (B,T,S) to tokens (S,B)."""
        self._read = top, tokens, targets, lengths
        rows = targets.size
        self.look(top, rows)
        copied(self._a[:rows], A, tokens, targets, lengths)
        self._dgate[:, :rows] = 0

        def weigh(some: Array, losses: Array) -> Array:
            weights = np.empty_like(losses)
            mix(losses, weights, self._dgate, self._da, self._a, self.gate, some, scale)
            return weights

        return weigh

    def backward(self, dtop: Array) -> Array:
        """Adds to the gradient of top. Returns that of the attention (B,T,S)."""
        top, tokens, targets, lengths = self._read
        (S, B), T = tokens.shape, len(targets)
        self._gate.backward(dtop, self._dgate, top, 0, T * B, add=True)
        dA = self._plan.operands.empty("copied", (B, T, S), self._plan.layout.dtype)
        copied_backward(dA, self._da[: T * B], tokens, targets, lengths)
        return dA
