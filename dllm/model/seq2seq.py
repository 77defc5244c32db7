"""A target of a source: an encoder, and a decoder that attends to all it has read (Bahdanau et al. 2015, Luong et al. 2015).

    m = encoder(emb(source))         h0 = tanh(ends(m) Wb)  c0 = 0        k = m Wk
    h1 = LSTM(emb(before))           c = softmax(h1 k^T) m                of all decoder layers h0 is the first state
    h2 = LSTM([h1 ; c]), ...         u = tanh([h ; c] Wc)                 logits = u W^T + b

The attention stands behind the first layer of the decoder and is not fed back, so that each product with weights is one product
of all steps. Dropout is on embeddings, m, [h1 ; c], between the layers above, and on u.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from ..kernels.dense import tanh_backward, tanh_rows
from ..kernels.pool import LAST, pool_backward, pool_forward
from ..kernels.softmax import IGNORE
from ..kernels.types import Array
from . import blocks
from .attention import Attention
from .base import Between, Mask, Model
from .batch import Batch
from .copying import Copying
from .encoder import Encoder
from .layers import Dense, Embedding, Plan, stack
from .output import Output

READ, WROTE, TOP, MEMORY = range(4)  # places of dropout; the layers of encoder and decoder come behind MEMORY


class Seq2Seq(Model):
    """See Model. A Batch has the source in `inputs`, and what the decoder reads in `before`."""

    def _make(self, plan: Plan) -> None:
        config, B = self.config, self.lanes
        H, M, R = config.hidden, blocks.memory(config), plan.layout.R
        self._P, self._directions = -(-H // R), len(blocks.directions(config))
        self.embedding, self.encoder = Embedding(plan), Encoder(plan, config.encoder_layers, B)
        self.decoder = stack(plan, [f"decoder.{layer}" for layer in range(config.layers)], B)
        self.attention = Attention(plan, M, H, config.attention == "general")
        plan.take(B * self.window**2)  # its weights
        self.bridge, self.combine = Dense(plan, "bridge"), Dense(plan, "combine")
        self.output = Output(plan, blocks.top(config), self.vocabulary, self.learning.smoothing)
        self.copying = Copying(plan) if config.copy else None
        self.layers = [self.embedding, self.encoder, *self.decoder, self.attention, self.bridge, self.combine, self.output]
        self.layers += [self.copying] if self.copying else []
        self._x, self._y = plan.panels(config.embedding), plan.panels(config.embedding)
        self._ends, self._first = plan.panels(M, B), plan.panels(H, B)
        self._where = np.zeros(self._ends.shape, np.int32)
        self._hc = plan.panels(H + M)  # [h1 ; c], and what the layers above read
        self._top = plan.panels(H + M)  # [h ; c] of the last layer
        self._dropped = [plan.panels(H) for _ in range(max(0, config.layers - 2))] if plan.training else []
        self._u = plan.panels(blocks.top(config))
        if plan.training:
            self._dtop, self._dhc = plan.panels(H + M), plan.panels(H + M)
            self._dh1, self._dm, self._dm_ends = plan.panels(H), plan.panels(M), plan.panels(M)
            self._dx = plan.panels(config.embedding)
            self._dfirst, self._dends = plan.panels(H, B), plan.panels(M, B)

    def forward(
        self, batch: Batch, h: Array, c: Array, scale: float = 0.0, mask: Mask | None = None, between: Between | None = None
    ) -> Array:
        self._take_mask(mask)
        self.factors.ready()
        assert batch.before is not None
        assert batch.lengths is not None
        self._batch, self._lengths = batch, batch.lengths
        (S, B), T = batch.inputs.shape, len(batch.targets)
        self._m = self.encode(batch.inputs, batch.lengths, between)
        self.embedding.forward(self._y, batch.before.reshape(-1))
        self._drop(self._y, self._y, 0, T, WROTE)
        h1 = self._step(0, self._y, 0, T, B)
        self._hc[: self._P, : T * B] = h1[:, B : (T + 1) * B]
        self.attention.forward(self._hc[self._P :], h1, B, self._m, self._lengths, S, T)
        self._top[self._P :, : T * B] = self._hc[self._P :, : T * B]
        self._drop(self._hc, self._hc, 0, T, self._place(0))
        self._inputs: list[tuple[Array, int]] = [(self._y, 0)]
        x, row = self._hc, 0
        for layer in range(1, len(self.decoder)):
            if layer > 1 and self._mask is not None:
                dropped = self._dropped[layer - 2]
                self._drop(dropped, x, row, T, self._place(layer - 1))
                x, row = dropped, 0
            self._inputs.append((x, row))
            x, row = self._step(layer, x, row, T, B), B
            if between is not None:
                between()
        last = x if len(self.decoder) > 1 else h1
        self._top[: self._P, : T * B] = last[:, B : (T + 1) * B]
        self.combine.forward(self._u, self._top, 0, T * B)
        tanh_rows(self._u[:, : T * B])
        return self._losses(batch, scale, T, between)

    def _losses(self, batch: Batch, scale: float, T: int, between: Between | None) -> Array:
        u = self._u
        if self._mask is not None:
            u = self.operands.empty("u after dropout", self._u.shape, self.dtype)
            self._drop(u, self._u, 0, T, TOP)
        weigh = None
        if self.copying is not None:
            A, exact = self.attention.weights, scale * (1 - self.learning.smoothing)
            weigh = self.copying.forward(self._top, A, batch.inputs, batch.targets, self._lengths, exact)
        return self.output.forward(u, 0, batch.targets, scale, between, weigh)

    def encode(self, tokens: Array, lengths: Array, between: Between | None = None) -> Array:
        """The memory m (M/R,SB,R) of sources (S,B) of their lengths (B,), and the decoder's first states."""
        S, B = tokens.shape
        self.embedding.forward(self._x, tokens.reshape(-1))
        self._drop(self._x, self._x, 0, S, READ)
        m = self.encoder.forward(self._x, lengths, S, B, self._drop_memory(S), between)
        pool_forward(self._ends, self._where, m, 0, lengths, S, B, LAST, self._directions)
        self.bridge.forward(self._first, self._ends, 0, B)
        tanh_rows(self._first)
        return m

    @property
    def first(self) -> Array:
        """The decoder's first states (H/R,B,R) of the sources encoded last."""
        return self._first

    def _drop_memory(self, S: int) -> Callable[[Array, int], None]:
        """Dropout behind the encoder's layers."""
        return lambda x, layer: self._drop(x, x, 0, S, MEMORY + layer)

    def _place(self, layer: int) -> int:
        """Of the dropout behind a layer of the decoder."""
        return MEMORY + self.config.encoder_layers + layer

    def _step(self, layer: int, x: Array, row: int, T: int, B: int) -> Array:
        memory = self.decoder[layer].memory
        memory.h[:, :B], memory.c[:, :B] = self._first[:, :B], 0
        self.decoder[layer].forward(x, row, T, B)
        return memory.h

    def _multiplied(self, batch: Batch) -> dict[str, int]:
        assert batch.lengths is not None
        rows = dict.fromkeys(("decoder", "combine", "gate", "output"), batch.predicted)
        return {**rows, "encoder": batch.steps, "keys": batch.steps, "bridge": int(np.count_nonzero(batch.lengths))}

    def example(self) -> Batch:
        nothing = np.zeros((2, 1), np.int64)
        return Batch(nothing, np.array([[0], [IGNORE]]), np.array([2]), nothing)

    def _backward(self, between: Between | None) -> None:
        batch, lengths, P = self._batch, self._lengths, self._P
        assert batch.before is not None
        (S, B), T = batch.inputs.shape, len(batch.targets)
        rows = slice(0, T * B)
        if not self.config.tied:
            self._ready("output")
        du: Any = self.output.dy
        self._drop(du, du, 0, T, TOP)
        tanh_backward(du[:, rows], self._u[:, rows])
        self.combine.backward(self._dtop, du, self._top, 0, T * B)
        self._ready("combine")
        copied = None
        if self.copying is not None:
            copied = self.copying.backward(self._dtop)
            self._ready("gate")
        dh, dc, self._dfirst[:] = self._dtop[:P], self._dtop[P:], 0
        for layer in reversed(range(1, len(self.decoder))):
            (x, row), dx = self._inputs[layer], self._dhc if layer == 1 else self._dhc[:P]
            self._decoder_backward(layer, dx, dh, x, row, T, B, between)
            self._drop(dx, dx, 0, T, self._place(layer - 1))
            if layer > 1:
                dh[:, rows] = dx[:, rows]
            else:
                dh, dc[:, rows] = self._dhc[:P], dc[:, rows] + self._dhc[P:, rows]
        self.attention.backward(self._dh1, self._dm, dc, copied)
        if "keys" in self.layout.blocks:
            self._ready("keys")
        self._dh1[:, rows] += dh[:, rows]
        self._decoder_backward(0, self._dx, self._dh1, self._y, 0, T, B, between)
        self._drop(self._dx, self._dx, 0, T, WROTE)
        tanh_backward(self._dfirst, self._first)
        self.bridge.backward(self._dends, self._dfirst, self._ends, 0, B)
        self._ready("bridge")
        self.embedding.backward(batch.before.reshape(-1), self._dx)
        pool_backward(self._dm_ends, 0, self._dends, self._where, lengths, S, B, LAST, self._directions)
        self._dm[:, : S * B] += self._dm_ends[:, : S * B]
        dx = self.encoder.backward(self._dm, lengths, S, B, self._drop_memory(S), self._ready, between)
        self._drop(dx, dx, 0, S, READ)
        self.embedding.backward(batch.inputs.reshape(-1), dx)
        self._ready("output" if self.config.tied else "embedding")

    def _decoder_backward(
        self, layer: int, dx: Array, dh: Array, x: Array, row: int, T: int, B: int, between: Between | None
    ) -> None:
        lstm = self.decoder[layer]
        lstm.backward(dx, dh, x, row, T, B, between, ends=True)
        assert lstm.scratch is not None
        self._dfirst += lstm.scratch.dh
        self._ready(f"{lstm.name}.b")
