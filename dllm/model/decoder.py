"""A trained model at work on many streams of tokens at once; any of them may take part in a step or not.

Each stream has a slot, which holds its state. A step takes tokens (T,B) of B streams: T = 1 continues them, more reads
prompts. What a stream gets does not depend on who else takes part, nor on how its tokens are cut into steps, to the bit:
every element of a product is a sum over k in one order (gemm.py), all else is done a row at a time, and each threads' share
is the same numbers in the same order.

Weights are made ready once: of the output layer the transpose, so that logits of one stream are read as fast as those of
many, and with bfloat16 all factors.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..kernels.embedding import embedding_forward, gates_forward, tied_embedding_forward
from ..kernels.gemm import multiply
from ..kernels.lstm import forward_steps
from ..kernels.operands import Operands
from ..kernels.sample import Choice, Scratch, draw
from ..kernels.slots import load_states, store_states, take_rows
from ..kernels.team import new_barrier
from ..kernels.tiles import PANELS
from ..kernels.types import Array
from .language_model import LanguageModel


class Decoder:
    """Streams of one model.

    Parameters
    ----------
    model : LanguageModel
        With parameters; these, its threads and its window are used.
    slots : int
    bf16 : bool
        Products of bfloat16; the results differ from those of float32, and are as repeatable.

    Attributes
    ----------
    states : (slots,L,2,P,R) array
        Free to be read and written between calls; zeros are the beginning of a text.
    vocabulary, window : int
        Of the model. `read_texts` cuts texts into windows; memory grows with them, results do not depend on them.
    """

    def __init__(self, model: LanguageModel, slots: int, bf16: bool = False) -> None:
        self.config, self.layout, self.dtype = model.config, model.layout, model.dtype
        self.vocabulary, self.window = model.vocabulary, model.window
        self.operands = Operands(model.dtype, bf16, model.operands.team)
        H, p, R = self.config.hidden, self.layout.arrays(model.theta), self.layout.R
        self._layers: list[tuple[Array | None, Array, Array]] = []
        for layer in range(self.config.layers):
            Wx, Wh, b = p.get(f"lstm.{layer}.x"), p[f"lstm.{layer}.h"], p[f"lstm.{layer}.b"].sum(axis=1)
            x = None if Wx is None else self._right(f"{layer}x", Wx)  # one-hot inputs have none
            self._layers.append((x, self._right(f"{layer}h", Wh), b))
        W = p["output"]
        self._table = W if self.config.tied else p["embedding"]
        self._W, self._b = self.operands.transposed("output", W, 0, self.vocabulary), W[H // R, :, H % R].copy()
        self._scratch = Scratch(self.vocabulary, self.operands.team.size)
        self.states = np.zeros((slots, self.config.layers, 2, -(-H // R), R), self.dtype)

    def _right(self, name: str, W: Array) -> Array:
        """W ready to be the right factor of a product."""
        ready: Array = self.operands.pairs(name, W, 0, W.shape[1])[0]
        return ready

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
        operands, dtype, (P, R) = self.operands, self.dtype, self.states.shape[3:]
        h, c = (operands.empty(name, (P, (T + 1) * B, R), dtype) for name in "hc")
        gates = operands.empty("gates", (4 * P, T * B, R), dtype)
        (x, row), K = self._embed(tokens.reshape(-1), gates), self.config.embedding
        for layer, (Wx, Wh, b) in enumerate(self._layers):
            if x is not None and Wx is not None:
                self._multiply(gates, x, row, Wx, T * B, K)
            load_states(h, c, self.states, slots, layer)
            left, team = operands.like("left", h), operands.team
            arguments = h, c, gates, left, Wh, operands.depth(self.config.hidden), b, T, B, new_barrier(), team.size
            team.run(lambda part: forward_steps(*arguments, part))
            store_states(self.states, h, c, slots, lengths, layer)
            x, row, K = h, B, self.config.hidden
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
        operands, R = self.operands, self.layout.R
        if rows is not None:
            y, first = operands.empty("rows", (len(y), count, R), self.dtype), 0
            take_rows(y, self._top, B, rows)
        z = operands.empty("z", (len(self._W), count, R), self.dtype)
        self._multiply(z, y, first, self._W, count, self.config.hidden)
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
        x = self.operands.empty("embedded", (-(-E // R), len(tokens), R), self.dtype)
        x[-1] = 0  # beyond E
        if self.config.tied:
            tied_embedding_forward(x, tokens, self._table, E)
        else:
            embedding_forward(x, tokens, self._table)
        return x, 0

    def _multiply(self, c: Array, a: Array, row: int, b: Array, M: int, K: int) -> None:
        """c = a @ b, M rows of a from `row` on; the threads share the columns, so that they share what few rows cost too."""
        operands = self.operands
        (a, row), K = operands.words("words", a, row, M), operands.depth(K)

        def by_columns(first: int, last: int) -> None:
            multiply(c[first:last], 0, a, row, b[first:last], M, K, False)

        operands.team.share(by_columns, len(c), PANELS)
