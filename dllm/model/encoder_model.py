"""Kinds of models that read something as a whole and say something of it: labels of words, a label of a text.

    m = encoder(emb(x)), or of frames x          u = m, or tanh(m Wp) with a projection          logits = u W^T + b

A tagger does so for each step, a classifier for max, mean or ends of all steps of m (Collobert and Weston 2008, Conneau et al.
2017). The mission's own example, Embedding, Bidirectional(LSTM), Dense with a softmax, is a classifier with pool = last.
"""

from __future__ import annotations

import numpy as np

from ..kernels import pool
from ..kernels.dense import tanh_backward, tanh_rows
from ..kernels.gemm import from_panels, to_panels
from ..kernels.softmax import IGNORE
from ..kernels.types import Array
from . import blocks
from .base import Between, Mask, Model
from .batch import Batch
from .encoder import Encoder
from .layers import Dense, Embedding, Plan
from .output import Head, Output

INPUTS, TOP, LAYERS = range(3)  # places of dropout; the layers of the encoder come behind LAYERS


class EncoderModel(Model):
    """What a tagger has; others change what is between encoder and output, or the output."""

    output: Head

    def _make(self, plan: Plan) -> None:
        config, M = self.config, blocks.memory(self.config)
        self._embedding = None if config.features else Embedding(plan)
        self.encoder = Encoder(plan, config.layers, self.lanes)
        seen = plan._replace(rows=self._most_rows(plan.rows))
        self._projection = Dense(seen, "projection") if config.projection else None
        self.output = self._make_output(seen)
        seen.take(seen.rows * (blocks.top(config) + blocks.outputs(config, self.vocabulary)), 12)  # `logits`
        parts = self._embedding, self.encoder, self._projection, self.output
        self.layers = [part for part in parts if part is not None]
        self._x = plan.panels(config.features or config.embedding)
        if config.projection:
            self._top = seen.panels(config.projection)
        if config.projection and plan.training:
            self._dtop = seen.panels(M)
            self._before_drop = seen.panels(config.projection if config.dropout else 0)

    def _make_output(self, plan: Plan) -> Head:
        return Output(plan, blocks.top(self.config), blocks.outputs(self.config, self.vocabulary), self.learning.smoothing)

    def forward(
        self, batch: Batch, h: Array, c: Array, scale: float = 0.0, mask: Mask | None = None, between: Between | None = None
    ) -> Array:
        self._take_mask(mask)
        self.factors.ready()
        S, B = batch.inputs.shape[:2]
        self._inputs = batch.inputs
        self._shape: tuple[int, int] = S, B
        self._lengths = np.full(B, S) if batch.lengths is None else batch.lengths
        if self._embedding is None:
            to_panels(self._x, 0, batch.inputs.reshape(S * B, -1))
        else:
            self._embedding.forward(self._x, batch.inputs.reshape(-1))
        self._drop(self._x, self._x, 0, S, INPUTS)
        self._m = self._looked_at(self.encoder.forward(self._x, self._lengths, S, B, self._drop_below, between))
        y, rows = self._m, self._rows()
        self._drop(y, y, 0, rows // B, self._place_of_top)
        if self._projection is not None:
            self._projection.forward(self._top, self._m, 0, rows)
            tanh_rows(self._top[:, :rows])
            y = self._top
            if self._mask is not None:
                y = self._before_drop
                self._drop(y, self._top, 0, rows // B, TOP)
        self._seen = y
        return self.output.forward(y, 0, batch.targets, scale, between)

    def logits(self, first: int = 0, last: int | None = None) -> Array:
        """Of the batch of the last `forward` those of all labels: (S,B,labels), of a classifier (1,B,labels), float64.

        first, last : steps [first, last) alone
        """
        B, vector = self._shape[1], self.theta
        rows = self._rows() if last is None else last * B
        seen = np.empty((rows - first * B, blocks.top(self.config)), self.dtype)
        from_panels(seen, self._seen, first * B)
        W, b = (self.layout.read(vector, f"output.{name}").astype(np.float64) for name in ("weight", "bias"))
        found: Array = np.einsum("nk,lk->nl", seen.astype(np.float64), W) + b  # whose rows do not depend on each other
        return found.reshape(-1, B, len(b))

    def _multiplied(self, batch: Batch) -> dict[str, int]:
        return {"encoder": batch.steps, "projection": batch.steps, "output": batch.predicted}

    def example(self) -> Batch:
        inputs = np.zeros((2, 1, self.config.features), np.float32) if self.config.features else np.zeros((2, 1), np.int64)
        return Batch(inputs, np.array([[0], [IGNORE]]), np.array([2]))

    def _backward(self, between: Between | None) -> None:
        S, B = self._shape
        rows, dm = self._rows(), self.output.dy
        self._ready("output")
        if self._projection is not None:
            self._drop(dm, dm, 0, rows // B, TOP)
            tanh_backward(dm[:, :rows], self._top[:, :rows])
            self._projection.backward(self._dtop, dm, self._m, 0, rows)
            dm = self._dtop
            self._ready("projection")
        self._drop(dm, dm, 0, rows // B, self._place_of_top)
        dx = self.encoder.backward(self._spread(dm), self._lengths, S, B, self._drop_below, self._ready, between)
        if self._embedding is not None:
            self._drop(dx, dx, 0, S, INPUTS)
            self._embedding.backward(self._inputs.reshape(-1), dx)
            self._ready("embedding")

    @property
    def _place_of_top(self) -> int:
        """Of dropout on what is looked at: the largest of many that are raised by 1 / (1 - p) would be another."""
        return LAYERS + self.config.layers - 1

    def _drop_below(self, x: Array, layer: int) -> None:
        if layer < self.config.layers - 1:
            self._drop(x, x, 0, self._shape[0], LAYERS + layer)

    def _rows(self) -> int:
        """Of what is looked at."""
        return self._shape[0] * self._shape[1]

    def _most_rows(self, rows: int) -> int:
        """The same at most, where so many are read."""
        return rows

    def _looked_at(self, m: Array) -> Array:
        """What of the encoder's output (M/R,SB,R) goes on."""
        return m

    def _spread(self, d: Array) -> Array:
        """The gradient of the encoder's output, of that of `_looked_at`."""
        return d


class Tagger(EncoderModel):
    """A label for each step that has a target."""


class Classifier(EncoderModel):
    """A label for each lane."""

    def _make(self, plan: Plan) -> None:
        super()._make(plan)
        self._how, self._directions = pool.HOW[self.config.pool], len(blocks.directions(self.config))
        self._pooled = plan.panels(blocks.memory(self.config), self.lanes)
        if plan.training:
            self._dm = plan.panels(blocks.memory(self.config))
        self._where = np.zeros(self._pooled.shape, np.int32)

    def _multiplied(self, batch: Batch) -> dict[str, int]:
        return {"encoder": batch.steps, "projection": batch.predicted, "output": batch.predicted}

    def example(self) -> Batch:
        return super().example()._replace(targets=np.zeros((1, 1), np.int64))

    def _rows(self) -> int:
        return self._shape[1]

    def _most_rows(self, rows: int) -> int:
        return self.lanes

    def _looked_at(self, m: Array) -> Array:
        S, B = self._shape
        pool.pool_forward(self._pooled, self._where, m, 0, self._lengths, S, B, self._how, self._directions)
        return self._pooled

    def _spread(self, d: Array) -> Array:
        S, B = self._shape
        pool.pool_backward(self._dm, 0, d, self._where, self._lengths, S, B, self._how, self._directions)
        return self._dm
