"""A model of text in both directions that do not see each other: one predicts the next token, one the token before (ELMo's
language model, Peters et al. 2018). Embedding and output layer are theirs together.
"""

from __future__ import annotations

import numpy as np

from ..kernels.gemm import from_panels, to_panels
from ..kernels.softmax import IGNORE
from ..kernels.types import Array
from .base import Between, Mask, Model
from .batch import Batch
from .layers import Embedding, Plan, stack
from .output import Output

NAMES = "forward", "backward"


class BothWays(Model):
    """See Model. Of a Batch (T,2B) the first B lanes are read onwards, and as many from the other end of their text."""

    def _make(self, plan: Plan) -> None:
        config = self.config
        H, both = config.hidden, plan._replace(rows=2 * plan.rows)
        self._embedding, self._output = Embedding(plan), Output(both, H, self.vocabulary, self.learning.smoothing)
        self._lstms = [stack(plan, [f"{name}.{layer}" for layer in range(config.layers)], self.lanes) for name in NAMES]
        self.layers = [self._embedding, *self._lstms[0], *self._lstms[1], self._output]
        self._x = [plan.panels(config.embedding) for _ in NAMES]
        above = config.layers - 1 if plan.training else min(1, config.layers - 1)
        self._between = [[plan.panels(H) for _ in range(above)] for _ in NAMES]  # what layers above the first read
        self._top = both.panels(H)
        if plan.training:
            self._dx, self._dy = plan.panels(config.embedding), plan.panels(H)

    def forward(
        self, batch: Batch, h: Array, c: Array, scale: float = 0.0, mask: Mask | None = None, between: Between | None = None
    ) -> Array:
        self._take_mask(mask)
        self.factors.ready()
        (T, B), L = batch.inputs.shape, self.config.layers
        B //= 2
        self._tokens = [np.ascontiguousarray(part).reshape(-1) for part in np.split(batch.inputs, 2, axis=1)]
        self._shape = T, B
        self._read: list[list[Array]] = []
        for way, lstms in enumerate(self._lstms):
            x, states = self._x[way], slice(way * L, way * L + L)
            self._embedding.forward(x, self._tokens[way])
            self._drop(x, x, 0, T, self._place(way, 0))
            read = []
            for layer, lstm in enumerate(lstms):
                read.append(x)
                hs, cs = lstm.memory.h, lstm.memory.c
                to_panels(hs, 0, h[states][layer])
                to_panels(cs, 0, c[states][layer])
                lstm.forward(x, 0, T, B)
                from_panels(h[states][layer], hs, T * B)
                from_panels(c[states][layer], cs, T * B)
                if layer < L - 1:
                    x = self._between[way][layer % len(self._between[way])]
                    x[:, : T * B] = hs[:, B : (T + 1) * B]
                    self._drop(x, x, 0, T, self._place(way, layer + 1))
                if between is not None:
                    between()
            self._read.append(read)
            top = self._top[:, way * T * B : (way + 1) * T * B]
            top[:] = hs[:, B : (T + 1) * B]
            self._drop(top, top, 0, T, self._place(way, L))
        targets = np.concatenate(np.split(batch.targets, 2, axis=1))
        losses: Array = self._output.forward(self._top, 0, targets, scale, between).reshape(2, T, B).sum(axis=0)
        return losses

    def _multiplied(self, batch: Batch) -> dict[str, int]:
        return {**dict.fromkeys(NAMES, batch.steps // 2), "output": batch.predicted}

    def example(self) -> Batch:
        nothing = np.zeros((2, 2), np.int64)
        return Batch(nothing, nothing + [[0], [IGNORE]])

    def _backward(self, between: Between | None) -> None:
        (T, B), L = self._shape, self.config.layers
        if not self.config.tied:
            self._ready("output")
        for way in (1, 0):
            rows = slice(way * T * B, (way + 1) * T * B)
            dy = self._dy
            dy[:, : T * B] = self._output.dy[:, rows]
            self._drop(dy, dy, 0, T, self._place(way, L))
            for layer in reversed(range(L)):
                lstm, dx = self._lstms[way][layer], self._dy if layer else self._dx
                lstm.backward(dx, dy, self._read[way][layer], 0, T, B, between)
                self._drop(dx, dx, 0, T, self._place(way, layer))
                self._ready(f"{lstm.name}.b")
            self._embedding.backward(self._tokens[way], self._dx)
        self._ready("output" if self.config.tied else "embedding")

    def _place(self, way: int, layer: int) -> int:
        """Of dropout."""
        return way * (self.config.layers + 1) + layer
