"""The language model: embedding, L LSTM layers, output layer. It predicts the token that follows, and carries its state on."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..kernels.gemm import from_panels, to_panels
from ..kernels.softmax import IGNORE
from ..kernels.types import Array
from .base import Between, Mask, Model
from .batch import Batch
from .layers import Embedding, Plan, stack
from .output import Output


class LanguageModel(Model):
    """See Model. `backward` carries nothing into the window from behind it (truncated, Williams and Peng 1990)."""

    def _make(self, plan: Plan) -> None:
        config, H = self.config, self.config.hidden
        self._embedding, self._output = Embedding(plan), Output(plan, H, self.vocabulary, self.learning.smoothing)
        self._lstms = stack(plan, [f"lstm.{layer}" for layer in range(config.layers)], self.lanes)
        self._x = plan.panels(config.embedding)  # the embedded window, after dropout
        self._dropped = [plan.panels(H) for _ in range(config.layers if config.dropout and plan.training else 0)]
        self._dx = plan.panels(config.embedding if plan.training else 0)
        self.layers = [self._embedding, *self._lstms, self._output]

    def forward(
        self, batch: Batch, h: Array, c: Array, scale: float = 0.0, mask: Mask | None = None, between: Between | None = None
    ) -> Array:
        self._take_mask(mask)
        self.factors.ready()
        y, row = self._hidden(batch.inputs, h, c, between)
        return self._output.forward(y, row, batch.targets, scale, between)

    def _multiplied(self, batch: Batch) -> dict[str, int]:
        return {"lstm": batch.steps, "output": batch.predicted}

    def example(self) -> Batch:
        return Batch(np.zeros((2, 1), np.int64), np.array([[0], [IGNORE]]))

    def _backward(self, between: Between | None) -> None:
        T, B = self._tokens.shape
        if not self.config.tied:
            self._ready("output")
        dy: Any = self._output.dy
        self._drop(dy, dy, 0, T, self.config.layers)
        for layer in reversed(range(self.config.layers)):
            x, row = self._inputs[layer]
            dx = None if x is None else dy if layer else self._dx
            self._lstms[layer].backward(dx, dy, x, row, T, B, between)
            if dx is not None:
                self._drop(dx, dx, 0, T, layer)
            self._ready(f"lstm.{layer}.b")
        self._embedding.backward(self._tokens.reshape(-1), self._dx if self.config.embedding else self._lstms[0].memory.gates)
        self._ready("output" if self.config.tied else "embedding")

    def _hidden(self, tokens: Array, h: Array, c: Array, between: Between | None = None) -> tuple[Array, int]:
        """The top layer's output after dropout: an array and the row in it where its T B rows begin.

        Saves what the backward needs.
        """
        T, B = tokens.shape
        self._tokens, self._inputs = tokens, []
        x: Any = self._x if self.config.embedding else None
        row = 0
        self._embedding.forward(self._lstms[0].memory.gates if x is None else x, tokens.reshape(-1))
        if x is not None:
            self._drop(x, x, 0, T, 0)
        for layer, lstm in enumerate(self._lstms):
            hs, cs = lstm.memory.h, lstm.memory.c
            to_panels(hs, 0, h[layer])
            to_panels(cs, 0, c[layer])
            lstm.forward(x, row, T, B)
            from_panels(h[layer], hs, T * B)
            from_panels(c[layer], cs, T * B)
            self._inputs.append((x, row))
            x, row = hs, B
            if self._mask is not None:
                x, row = self._dropped[layer], 0
                self._drop(x, hs, B, T, layer + 1)
            if between is not None:
                between()
        return x, row
