"""The language model: embedding, L LSTM layers, output layer, over one flat vector of parameters and one of gradients.

Knows no MPI and no files. How the vectors are laid out stands in layout.py.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np

from ..errors import UserError
from ..kernels.dropout import dropout
from ..kernels.embedding import (
    embedding_backward,
    embedding_forward,
    gates_backward,
    gates_forward,
    tied_embedding_backward,
    tied_embedding_forward,
)
from ..kernels.gemm import aligned, from_panels, to_panels, zero_panels
from ..kernels.lstm import lstm_backward, lstm_forward
from ..kernels.operands import Operands
from ..kernels.softmax import GROUP, Chunk, softmax_cross_entropy
from ..kernels.team import Team
from ..kernels.types import Array
from .batch import Batch
from .factors import Factors
from .layout import Layout

Mask: TypeAlias = tuple[int, int, Array]  # seed, step, lanes (B,) int64: what names dropout masks

CHUNK = 1 << 24  # bytes: at most so many of exponentials of logits in memory at a time


def tokens_of_chunk(tokens: int, vocabulary: int, R: int, size: int) -> int:
    """Tokens of a window that the output layer takes at a time: all, or whole pairs of panels of R. size: bytes of a logit."""
    chunks = -(-tokens * vocabulary * size // CHUNK)
    return tokens if chunks == 1 else -(-tokens // (chunks * 2 * R)) * 2 * R


def check_memory(layout: Layout, window: int, lanes: int) -> None:
    """Raise UserError where a LanguageModel for inference and the states of its lanes take more than this machine's memory."""
    config, B, tokens = layout.config, lanes, window * lanes
    H, E = layout.R * -(-config.hidden // layout.R), config.embedding
    numbers = 2 * B * H * (config.layers + 1) + tokens * (7 * H + E + min(layout.vocabulary, GROUP) + 5)
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if numbers * layout.dtype.itemsize > memory:
        raise UserError(
            f"windows of {window:,} tokens in {lanes:,} lanes take {numbers * layout.dtype.itemsize >> 20:,} MB; "
            f"this machine's memory has {memory >> 20:,}"
        )


class LanguageModel:
    """One rank's model over windows of at most T steps and B lanes.

    Parameters
    ----------
    layout : Layout
        Of the parameters; names the model's shape, its vocabulary V and its dtype.
    window, lanes : int
        T and B.
    theta : (size,) array, optional
        The parameters; see `bind`.
    training : bool
        False: no gradients and one layer's activations only.
    bf16 : bool
        Products of bfloat16, with float32 for all else.
    gradient : (size,) array, optional
        Zeros, where the gradients are to lie.
    team : kernels.team.Team, optional
        Threads that share the work.
    """

    theta: Array
    factors: Factors

    def __init__(
        self,
        layout: Layout,
        window: int,
        lanes: int,
        *,
        theta: Array | None = None,
        training: bool = True,
        bf16: bool = False,
        gradient: Array | None = None,
        team: Team | None = None,
    ) -> None:
        self.layout, self.window, self.training = layout, window, training
        self.config, self.vocabulary, self.dtype = layout.config, layout.vocabulary, layout.dtype
        if not training:
            check_memory(layout, window, lanes)
        self.operands = Operands(self.dtype, bf16, team)
        T, B, R, V, dtype = window, lanes, layout.R, layout.vocabulary, layout.dtype
        H, L, E = layout.config.hidden, layout.config.layers, layout.config.embedding
        copies = L if training else 1
        self._h = [zero_panels((T + 1) * B, H, dtype) for _ in range(copies)]
        self._c = [zero_panels((T + 1) * B, H, dtype) for _ in range(copies)]
        gate_panels = 4 * len(self._h[0])
        self._gates = [zero_panels(T * B, gate_panels * R, dtype) for _ in range(copies)]
        self._x = zero_panels(T * B, E, dtype)  # the embedded window, after dropout
        self._dropped = [zero_panels(T * B, H, dtype) for _ in range(L if layout.config.dropout and training else 0)]
        self._losses = np.zeros(T * B, dtype)
        tokens = tokens_of_chunk(T * B, V, R, 2 if bf16 else dtype.itemsize) if training else T * B
        self._chunk = Chunk(tokens, H, V, self.operands, training)
        if training:
            self.gradient = aligned((layout.size,), dtype) if gradient is None else gradient
            self._d = layout.arrays(self.gradient)
            self._dy, self._dx = zero_panels(T * B, H, dtype), zero_panels(T * B, E, dtype)
            self._dh_next, self._dc = zero_panels(B, H, dtype), zero_panels(B, H, dtype)
            self._db = np.zeros((gate_panels, R), dtype)
        if theta is not None:
            self.bind(theta)

    def bind(self, theta: Array, written: bool = False) -> None:
        """Use the flat vector theta (size,) as parameters from now on; it is not copied.

        written: since an optimiser that knew `factors` wrote it, nobody has changed it.
        """
        self.theta, self._p = theta, self.layout.arrays(theta)
        if hasattr(self, "factors"):
            self.factors.bind(theta, written)
        else:
            self.factors = Factors(self.layout, self.operands, theta)

    def initialise(self, seed: int) -> None:
        """Fill theta: uniform(+-a) as the config says; every rank gets the same values, in float32 those of float64 rounded."""
        config = self.config
        ranges = {"output.weight": config.init_output, "output.bias": config.init_output_bias}
        if config.embedding:
            ranges["embedding.weight"] = config.init_output
        for number, (name, extent) in enumerate(self.layout.tensors.items()):
            bound = ranges.get(name, config.init or 1 / math.sqrt(config.hidden))
            generator = np.random.Generator(np.random.Philox(key=[seed, number]))
            tensor = np.empty(extent.shape, self.dtype)
            flat = tensor.reshape(-1)
            for start in range(0, flat.size, 1 << 20):
                part = flat[start : start + (1 << 20)]
                part[:] = generator.uniform(-bound, bound, part.size)
            if name.endswith(".bias") and name.startswith("lstm") and config.forget_bias:
                tensor[0, config.hidden : 2 * config.hidden] = config.forget_bias
            self.layout.write(self.theta, name, tensor)

    def forward(
        self,
        batch: Batch,
        h: Array,
        c: Array,
        scale: float = 0.0,
        mask: Mask | None = None,
        between: Callable[[], object] | None = None,
    ) -> Array:
        """Losses of a window; when training, the output layer's gradients too, since they need the logits.

        Parameters
        ----------
        batch : Batch
            Tokens and targets, (T,B) both.
        h, c : (L,B,H), in and out
            The state before and after the window.
        scale : float
            Factor on every gradient.
        mask : Mask, optional
            Names the dropout masks; None: no dropout.
        between : callable, optional
            Called now and then.

        Returns
        -------
        (T,B) losses in nats, valid until the next call.
        """
        tokens, targets, *_ = batch
        T, B = tokens.shape
        self.factors.ready()
        y, row = self._hidden(tokens, h, c, mask, between)
        losses, W = self._losses[: T * B], self._p["output"]
        dy, dW = (self._dy, self._d["output"]) if self.training else (None, None)
        softmax_cross_entropy(losses, dy, dW, self._chunk, y, row, W, targets.reshape(-1), scale, between)
        return losses.reshape(T, B)

    def backward(self, on_ready: Callable[[slice], object] | None = None, between: Callable[[], object] | None = None) -> None:
        """The rest of the gradient of the last `forward`, into `self.gradient` (size,).

        on_ready(slice) is called as soon as a slice is final, in order, without gaps. Every tensor is overwritten, but
        for embedding rows: they are added to where embedding and output are not tied, and the caller zeroes those it used.
        """
        T, B = self._tokens.shape
        config, d, weights = self.config, self._d, self.factors.weights
        final = 0

        def ready(name: str) -> None:
            nonlocal final
            start, final = final, self.layout.blocks[name].stop
            if on_ready is not None:
                on_ready(slice(start, final))

        if not config.tied:
            ready("output")
        dy = self._dy
        self._drop(dy, dy, 0, config.layers)
        for layer in reversed(range(config.layers)):
            (x, row), name = self._inputs[layer], f"lstm.{layer}."
            dx = None if x is None else self._dy if layer else self._dx
            lstm_backward(
                dx, d.get(name + "x"), d[name + "h"], self._db, self._gates[layer], self._dh_next, self._dc, self.operands,
                dy, x, row, self._h[layer], self._c[layer], weights.get(name + "x"), weights[name + "h"], T, B, between,
            )  # fmt: skip
            d[name + "b"][:] = self._db[:, None]
            if dx is not None:
                self._drop(dx, dx, 0, layer)
            ready(name + "b")
        tokens = self._tokens.reshape(-1)
        if config.tied:
            tied_embedding_backward(d["output"], tokens, self._dx, config.embedding)
        elif config.embedding:
            embedding_backward(d["embedding"], tokens, self._dx)
        else:
            gates_backward(d["embedding"], tokens, self._gates[0])
        ready("output" if config.tied else "embedding")

    def _hidden(
        self, tokens: Array, h: Array, c: Array, mask: Mask | None = None, between: Callable[[], object] | None = None
    ) -> tuple[Array, int]:
        """The top layer's output after dropout: an array and the row in it where its T B rows begin.

        Saves what the backward needs.
        """
        T, B = tokens.shape
        config, p, weights = self.config, self._p, self.factors.weights
        self._tokens, self._mask, self._inputs = tokens, mask if config.dropout else None, []
        flat = tokens.reshape(-1)
        x: Any = None
        row = 0
        if config.embedding:
            x = self._x
            if config.tied:
                tied_embedding_forward(x, flat, p["output"], config.embedding)
            else:
                embedding_forward(x, flat, p["embedding"])
            self._drop(x, x, 0, 0)
        else:
            gates_forward(self._gates[0], flat, p["embedding"])
        for layer in range(config.layers):
            # Without training all layers share one slot: a layer reads its input whole before it writes its output.
            slot, name = layer if self.training else 0, f"lstm.{layer}."
            hs, cs, gates = self._h[slot], self._c[slot], self._gates[slot]
            to_panels(hs, 0, h[layer])
            to_panels(cs, 0, c[layer])
            Wx, Wh, b = weights.get(name + "x"), weights[name + "h"], p[name + "b"].sum(axis=1)
            lstm_forward(hs, cs, gates, self.operands, x, row, Wx, Wh, b, T, B)
            from_panels(h[layer], hs, T * B)
            from_panels(c[layer], cs, T * B)
            self._inputs.append((x, row))
            x, row = hs, B
            if self._mask is not None:
                x, row = self._dropped[layer], 0
                self._drop(x, hs, B, layer + 1)
            if between is not None:
                between()
        return x, row

    def _drop(self, out: Array, x: Array, row: int, place: int) -> None:
        """Dropout number `place`, of x from `row` on: 0 on the embeddings, l behind layer l."""
        if self._mask is not None:
            seed, step, lanes = self._mask
            arguments = self.config.dropout, lanes, seed, step, place
            self.operands.team.share(lambda first, last: dropout(out, x, row, first, last, *arguments), len(self._tokens))
