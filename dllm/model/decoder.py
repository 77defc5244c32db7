"""A trained model at work on many streams of tokens at once; any of them may take part in a step or not.

Each stream has a slot, which holds its state. A step takes tokens (T,B) of B streams: T = 1 continues them, more reads
prompts. What a stream gets does not depend on who else takes part, nor on how its tokens are cut into steps, to the bit:
every element of a product is a sum over k in one order (gemm.py), all else is done a row at a time, and each threads' share
is the same numbers in the same order.

Weights are made ready once: of the output layer the transpose, so that logits of one stream are read as fast as those of
many, and with bfloat16 and int8 all factors (products.py). The embedding, states, cells and probabilities stay as they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ..errors import UserError
from ..kernels.embedding import embedding_forward, gates_forward, tied_embedding_forward
from ..kernels.panel_rows import take_rows
from ..kernels.sample import BAD, Choice, Scratch, draw
from ..kernels.slots import load_states, store_states
from ..kernels.types import Array
from .language_model import LanguageModel
from .precision import products_of
from .products import products


class Decoder:
    """Streams of one model.

    Parameters
    ----------
    model : LanguageModel
        With parameters; these, its threads and its window are used.
    slots : int
    precision : "fp32", "bf16" or "int8"
        Of products, as far as this processor has them and the model is of float32 (precision.py); "fp32": as the model is. The
        results differ, and are as repeatable.

    Attributes
    ----------
    states : (slots,L,2,P,R) array
        Free to be read and written between calls; zeros are the beginning of a text.
    vocabulary, window : int
        Of the model. `read_texts` cuts texts into windows; memory grows with them, results do not depend on them.
    """

    def __init__(self, model: LanguageModel, slots: int, precision: str = "fp32") -> None:
        self.config, self.layout, self.dtype = model.config, model.layout, model.dtype
        self.vocabulary, self.window = model.vocabulary, model.window
        self._products = products(products_of(precision, model.dtype), model.dtype, model.operands.team)
        self._operands = self._products.operands
        H, p, R = self.config.hidden, self.layout.arrays(model.theta), self.layout.R
        self._layers: list[tuple[Any, Any, Array]] = []
        for layer in range(self.config.layers):
            Wx, Wh, b = p.get(f"lstm.{layer}.x"), p[f"lstm.{layer}.h"], p[f"lstm.{layer}.b"].sum(axis=1)
            x = None if Wx is None else self._products.right(f"{layer}x", Wx, Wx.shape[1])  # one-hot inputs have none
            self._layers.append((x, self._products.right(f"{layer}h", Wh, H), b))
        W = p["output"]
        self._table = W if self.config.tied else p["embedding"]
        self._W, self._b = self._products.right_of_transpose("output", W, H), W[H // R, :, H % R].copy()
        self._scratch = Scratch(self.vocabulary, self._operands.team.size)
        self.states = np.zeros((slots, self.config.layers, 2, -(-H // R), R), self.dtype)

    def read(self, tokens: Array, slots: Array, lengths: Array | None = None) -> None:
        """Let the streams in `slots` go on.

        Parameters
        ----------
        tokens : (T,B) int64
        slots : (B,) int64
            Different ones.
        lengths : (B,) int64, optional
            Tokens of each stream that count, where they are fewer than T.
        """
        T, B = tokens.shape
        lengths = np.full(B, T) if lengths is None else lengths
        dtype, (P, R), H = self.dtype, self.states.shape[3:], self.config.hidden
        h, c = (self._operands.empty(name, (P, (T + 1) * B, R), dtype) for name in "hc")
        gates = self._operands.empty("gates", (4 * P, T * B, R), dtype)
        (x, row), K = self._embed(tokens.reshape(-1), gates), self.config.embedding
        for layer, (Wx, Wh, b) in enumerate(self._layers):
            if x is not None:
                self._products.multiply(gates, x, row, Wx, K)
            load_states(h, c, self.states, slots, layer)
            self._products.forward_steps(h, c, gates, Wh, b, T, B, H)
            store_states(self.states, h, c, slots, lengths, layer)
            x, row, K = h, B, H
        self._top, self._last = h, (B, T * B)

    def read_texts(self, texts: Sequence[Array], slots: Array) -> None:
        """Let the streams in `slots` (B,), different ones, read a text each, (n,) integers of their own lengths."""
        lengths = np.array([len(text) for text in texts], np.int64)
        for start in range(0, lengths.max(initial=0), self.window):
            going = np.flatnonzero(lengths > start)
            left = np.minimum(lengths[going] - start, self.window)
            tokens = np.zeros((left.max(), len(going)), np.int64)
            for column, (number, count) in enumerate(zip(going.tolist(), left.tolist(), strict=True)):
                tokens[:count, column] = texts[number][start : start + count]
            self.read(tokens, slots[going], left)

    def choose(self, choice: Choice, wants: Array, rows: Array | None = None) -> None:
        """What comes next, drawn, or the probability of a given token, as `choice` wants it (kernels/sample.py).

        Parameters
        ----------
        choice : Choice
        wants : (N,) int64
            Rows of it.
        rows : (N,) int64, optional
            Of the tokens of the last `read`, t B + n, those that the rows of `choice` are for; default: those of its last step.
        """
        y, (B, first), count = self._top, self._last, len(wants)
        operands, R = self._operands, self.layout.R
        if rows is not None:
            y, first = operands.empty("rows", (len(y), count, R), self.dtype), 0
            take_rows(y, self._top, B, rows)
        z = operands.empty("z", (-(-self.vocabulary // R), count, R), self.dtype)
        self._products.multiply(z, y, first, self._W, self.config.hidden)
        draw(choice, wants, z, self._b, self._scratch, operands.team)

    def top(self, slot: int) -> Array:
        """The output of the top layer (H,) behind a stream's last token, a copy."""
        top: Array = self.states[slot, -1, 0].reshape(-1)[: self.config.hidden].copy()
        return top

    def warm_up(self) -> None:
        """Run every kernel once: all are compiled then, or loaded from the cache. What slot 0 held is lost."""
        slots, choice = np.zeros(1, np.int64), Choice(1, 1)
        for T in (2, 1):
            self.read(np.zeros((T, 1), np.int64), slots)
            self.choose(choice, slots, slots)
        self.choose(choice, slots)

    def _embed(self, tokens: Array, gates: Array) -> tuple[Array | None, int]:
        """The embedded tokens (N,) and the row where they begin; None where the gates have taken them in already."""
        E, R = self.config.embedding, self.layout.R
        if not E:
            gates_forward(gates, tokens, self._table)
            return None, 0
        x = self._operands.empty("embedded", (-(-E // R), len(tokens), R), self.dtype)
        x[-1] = 0  # beyond E
        if self.config.tied:
            tied_embedding_forward(x, tokens, self._table, E)
        else:
            embedding_forward(x, tokens, self._table)
        return x, 0


def check_finite(choice: Choice, rows: Array) -> None:
    """Raise UserError where a row (N,) of a Choice has found no distribution."""
    if (choice.token[rows] == BAD).any():
        raise UserError("the model's numbers are not finite: nothing can be drawn from it; train again with a lower train.lr")
