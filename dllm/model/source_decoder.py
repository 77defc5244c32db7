"""A trained Seq2Seq at work on many targets at once, step by step; rows may share a source, as those of a search do.

Sources are encoded once, all together: memory, keys and the decoder's first states. A row has its source's number and a state
of its own. What a row gets does not depend on the other rows, nor on the other sources, to the bit: every element of a product
is a sum over k in one order (gemm.py), all else is done a row at a time, and of a memory only its source's length counts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from ..kernels.attention import attend_rows
from ..kernels.copying import mix_distributions
from ..kernels.ctc import log_probabilities
from ..kernels.dense import tanh_rows
from ..kernels.sample import Choice, Scratch, draw
from ..kernels.slots import load_states, store_states
from ..kernels.types import Array
from . import blocks
from .decoder import check_finite
from .precision import products_of
from .products import products
from .seq2seq import Seq2Seq

LEAST = 1e-37  # a probability of float32 with a logarithm


class Kept(NamedTuple):
    """Targets under way, and what was read for them."""

    lengths: Array
    tokens: Array
    m: Array
    k: Array
    source: Array
    states: Array
    attention: Array
    top: Array


class SourceDecoder:
    """Targets of sources, a row each.

    Parameters
    ----------
    model : Seq2Seq
        With parameters, not for training; it encodes sources, as many at a time as it has lanes, of at most its window.
    rows : int
        At most.
    start : int
        The token that a target begins behind.
    precision : "fp32", "bf16" or "int8"
        Of the decoder's products, as of model/decoder.py. Sources are encoded as the model is.

    Attributes
    ----------
    states : (rows,L,2,P,R) array
    """

    def __init__(self, model: Seq2Seq, rows: int, start: int, precision: str = "fp32") -> None:
        self.model, self.vocabulary, self.dtype, self._start = model, model.vocabulary, model.dtype, start
        self._products = products(products_of(precision, model.dtype), model.dtype, model.operands.team)
        self._operands = self._products.operands
        config, p, R = model.config, model.layout.arrays(model.theta), model.layout.R
        H, M, right = config.hidden, blocks.memory(config), self._products.right
        self._H, self._M, self._columns = H, M, blocks.top(config)
        self._layers = []
        for name in (f"decoder.{layer}" for layer in range(config.layers)):
            x, h, b = (p[f"{name}.{part}"] for part in "xhb")
            self._layers.append((right(f"{name}.x", x, x.shape[1]), right(f"{name}.h", h, H), b.sum(axis=1)))
        self._combine, W = right("combine", p["combine"], H + M), p["output"]
        self._gate = right("gate", p["gate"], H + M) if config.copy else None
        self._W = self._products.right_of_transpose("output", W, self._columns)
        self._b = W[self._columns // R, :, self._columns % R].copy()
        self._scratch = Scratch(self.vocabulary, self._operands.team.size)
        self._choice = Choice(rows)
        self.states = np.zeros((rows, config.layers, 2, -(-H // R), R), self.dtype)

    def begin(self, sources: Sequence[Array]) -> Array:
        """Encode sources (n,), none of them empty; row n is the beginning of a target of source n. Returns lengths (B,)."""
        self._lengths = np.array([len(source) for source in sources], np.int64)
        tokens = np.zeros((int(self._lengths.max()), len(sources)), np.int64)
        for column, source in enumerate(sources):
            tokens[: len(source), column] = source
        self.model.factors.ready()
        self._tokens, self._m = tokens, self.model.encode(tokens, self._lengths)
        self._k = self.model.attention.keys(self._m, tokens.size)
        self._S, B = tokens.shape
        self.source = np.arange(B)
        self.states[:B, :, 0] = self.model.first[:, :B].transpose(1, 0, 2)[:, None]
        self.states[:B, :, 1] = 0
        self._read(np.full(B, self._start))
        return self._lengths

    def advance(self, parents: Array, tokens: Array) -> None:
        """Row i is what row parents[i] was, one token (N,) further."""
        self.source = self.source[parents]
        self.states[: len(parents)] = self.states[parents]
        self._read(tokens)

    def keep(self) -> Kept:
        """A copy of what the targets under way need, so that others may be begun before they go on."""
        size, rows = self._tokens.size, len(self.source)
        m, k = (panels[:, :size].copy() for panels in (self._m, self._k))
        return Kept(self._lengths, self._tokens, m, k, self.source, self.states[:rows].copy(), self._A.copy(), self._top.copy())

    def restore(self, kept: Kept) -> None:
        """Go on with targets where they were, to the bit."""
        self._lengths, self._tokens, self._m, self._k, self.source, states, self._A, self._top = kept
        self._S, self.states[: len(states)] = len(self._tokens), states

    def choose(self, most: int) -> tuple[Array, Array]:
        """The most likely next tokens (N,most) of each row and their log-probabilities. Raises UserError."""
        if self._choice.tokens.shape[1] != most:
            self._choice = Choice(len(self.states), most)
            self._choice.temperature[:], self._choice.wanted[:] = 0, most
        rows = self._draw()
        return self._choice.tokens[rows], self._choice.logprobs[rows]

    def logprobs(self, tokens: Array) -> Array:
        """The log-probability (N,), nats, of a next token (N,) of each row."""
        rows = np.arange(len(tokens))
        self._choice.given[rows] = tokens
        self._draw()
        self._choice.given[rows] = -1
        found: Array = self._choice.logprob[rows]
        return found

    def attention(self) -> Array:
        """(N,S), how much each place of its source counts for the next token of a row."""
        return self._A

    def _draw(self) -> Array:
        """Fill `_choice`. Returns its rows."""
        rows, operands = np.arange(len(self.source)), self._operands
        u = self._empty("u", -(-self._columns // operands.R), len(rows))
        z = self._empty("z", -(-self.vocabulary // operands.R), len(rows))
        self._products.multiply(u, self._top, 0, self._combine, self._H + self._M)
        tanh_rows(u)
        self._products.multiply(z, u, 0, self._W, self._columns)
        b = self._b
        if self._gate is not None:
            z, b = self._with_copies(z), np.zeros_like(b)
        draw(self._choice, rows, z, b, self._scratch, operands.team)
        check_finite(self._choice, rows)
        return rows

    def _with_copies(self, z: Array) -> Array:
        """Logarithms of the probabilities, in panels, that the logits z and the copies have together."""
        gate, (_, N, R), V = self._empty("gate", 1, z.shape[1]), z.shape, self.vocabulary
        self._products.multiply(gate, self._top, 0, self._gate, self._H + self._M)
        P = z.transpose(1, 0, 2).reshape(N, -1)[:, :V] + self._b
        P = np.exp(log_probabilities(P)).astype(self.dtype)
        mix_distributions(P, self._A, gate, self._tokens, self.source, self._lengths)
        z.transpose(1, 0, 2)[:] = np.pad(np.log(np.maximum(P, LEAST)), [(0, 0), (0, len(z) * R - V)]).reshape(N, len(z), R)
        return z

    def _read(self, tokens: Array) -> None:
        """Take each row a token (N,) further: its states, its attention, and [h ; c] of the last layer."""
        model, operands, (P, R), N, H = self.model, self._operands, self.states.shape[3:], len(tokens), self._H
        x, K = self._empty("embedded", -(-model.config.embedding // R), N), model.config.embedding
        x[-1] = 0  # beyond the embedding
        model.embedding.forward(x, tokens)
        h, c, gates = self._empty("h", P, 2 * N), self._empty("c", P, 2 * N), self._empty("gates", 4 * P, N)
        top, rows, one = self._empty("top", -(-(H + self._M) // R), N), np.arange(N), np.ones(N, np.int64)
        self._A = operands.empty("A", (N, self._S), self.dtype)
        for layer, (Wx, Wh, b) in enumerate(self._layers):
            self._products.multiply(gates, x, 0, Wx, K)
            load_states(h, c, self.states, rows, layer)
            self._products.forward_steps(h, c, gates, Wh, b, 1, N, H)
            store_states(self.states, h, c, rows, one, layer)
            top[:P] = h[:, N:]
            if layer == 0:
                B = len(self._lengths)
                attend_rows(top[P:], self._A, h, N, self._k, self._m, self.source, self._lengths, self._S, B, operands.team)
            x, K = (top, H + self._M) if layer == 0 else (top[:P], H)
        self._top = top

    def _empty(self, name: str, panels: int, rows: int) -> Array:
        return self._operands.empty(name, (panels, rows, self._operands.R), self.dtype)
