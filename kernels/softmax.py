r"""Output projection, softmax and cross-entropy in one, a chunk of tokens at a time, so that memory need not hold T x B x V.

    z = y @ W^T + b                               (N,V), N = T B tokens
    loss_n = log sum_v exp(z_nv) - z_n,target     nats
    dz = scale (softmax(z) - onehot(target))      dy = dz @ W    dW = dz^T @ y    db = sum_n dz_n

Recomputing z in the backward would cost a third product, so the gradients are taken while the chunk is there. Tokens with
target -1 are padding: their loss and gradient are zero.

What makes it fast. Logits become exp(z) a few rows at a time, while the cache still has them, and are never divided: with
s_n = sum_v exp(z_nv) and f_n = scale / s_n, dz_nv = f_n p_nv where p_nv = exp(z_nv) - s_n [v = target], so

    dy_n = f_n (p @ W)_n        dW = p^T @ (f y)        db = p^T @ f, one more column of f y

and the factors go to the narrow y and dy instead of the wide p. Smoothing and weights of tokens change f_n, what is taken off
at the target, and what dy and dW begin with (smoothing.py). exp(z) needs no shift while its sums stay well within float32's
range; where one does not, the chunk is done again with the largest logit of that token taken off first. So a token's loss is
the same whatever tokens are beside it.

All matrices lie in panels (gemm.py). The chunk is kept as p^T (V,N): then all three products take W (V,H) as it lies, and
only the small y is transposed. The bias is the last column of W: (H+1)/R panels of V rows. In bfloat16 dy^T = W^T p^T is
computed, and the small dy^T is transposed at the end.
"""

import math
from collections.abc import Callable
from typing import Any, no_type_check

import numpy as np
from numba import types
from numba.extending import overload

from .activations import exp_rows, exp_rows_to_bf16
from .amx import SPAN
from .compile import OPTIONS, kernel
from .gemm import aligned, multiply, multiply_transposed, width, zero_panels
from .operands import Operands, bf16, to_words, transpose_to_words
from .smoothing import even_part, row_factors
from .team import share_in_pairs
from .tiles import ROW
from .types import Array

IGNORE = -1  # the target of a padded position
GROUP = 224  # rows of p^T that are made, and turned into exp, at a time; a multiple of 2 SPAN
SMALL, LARGE = 1e-30, 1e30  # between which a token's sum must lie


class Chunk:
    """Memory for `tokens` tokens (a multiple of 2 R, unless one chunk takes all) at a time.

    training : bool
        False: for losses alone, which need no more than GROUP logits of a token at a time.
    """

    def __init__(self, tokens: int, H: int, V: int, operands: Operands, training: bool) -> None:
        self.tokens, self.H, self.operands = tokens, H, operands
        dtype, whole = operands.dtype, training and not operands.bf16
        P = -(-tokens // operands.R)
        self.z = zero_panels(V if whole else min(V, GROUP), tokens, dtype)
        self.words = self.pairs = self.z
        threads, panels = operands.team.size, H // operands.R + 1
        if operands.bf16:
            self.left = aligned((threads, (panels + 1) // 2, min(GROUP, V), operands.R), np.uint32)
        if training and operands.bf16:
            self.words = aligned(((P + 1) // 2, V, operands.R), np.uint32)
            self.pairs = aligned((P, GROUP // 2, operands.R), np.uint32)
            self.of_transpose = aligned((threads, GROUP // (2 * SPAN), panels * operands.R, operands.R), np.uint32)
            self.dyT, self.dy = zero_panels(H, tokens, dtype), zero_panels(P * operands.R, H, dtype)
        self.fy = zero_panels(tokens, H + 1, dtype)
        self.b, self.none = np.zeros(V, dtype), zero_panels(0, 1, dtype)
        self.sums, self.shift, self.factor, self.taken = (np.zeros(P * operands.R, dtype) for _ in range(4))
        self.weights, self.even = np.ones(P * operands.R, dtype), np.zeros((panels, operands.R), dtype)


def softmax_cross_entropy(
    loss: Array,
    dy: Array | None,
    dW: Array | None,
    chunk: Chunk,
    y: Array,
    y_row: int,
    W: Array,
    targets: Array,
    scale: float,
    between: Callable[[], object] | None = None,
    smoothing: float = 0.0,
    weigh: Callable[[slice, Array], Array] | None = None,
) -> None:
    """Losses and, for training, all gradients of the output layer.

    Parameters
    ----------
    loss : (N,), out
        Nats a token, whatever the smoothing.
    dy, dW : (H/R,N,R), ((H+1)/R,V,R), out
        Overwritten. Both None: only the losses are computed.
    chunk : Chunk
        Scratch.
    y, y_row : (H/R,:,R), int
        The layer's input: N rows from y_row on.
    W : ((H+1)/R,V,R)
        The weights, with the bias as column H.
    targets : (N,) integer
    scale : float
        Factor on the gradients: one over the number of tokens that share the loss.
    between : callable, optional
        Called after each chunk, so that the caller can keep communication moving.
    smoothing : float
        eps of smoothing.py.
    weigh : callable, optional
        weigh(part, losses) of each chunk, some tokens `part` and their losses, which it may replace, gives their weights (n,).
    """
    s, operands, N, H = chunk, chunk.operands, len(targets), chunk.H
    V = W.shape[1]
    s.b[:] = W[H // operands.R, :, H % operands.R]
    s.weights[:], s.even[:] = 1, 0
    if dW is not None and smoothing:
        even_part(s.even, dW, W, y, y_row, H, targets, scale * smoothing / V, operands.team)
    for start in range(0, N, s.tokens):
        count = min(s.tokens, N - start)
        part, here = slice(start, start + count), targets[start : start + count]
        yT = operands.transposed("yT", y, y_row + start, count)
        P = len(yT)
        s.shift[:] = 0
        out = loss[part], s.none if dy is None else s.dyT if operands.bf16 else dy, start
        if not all(_by_team(s, exponentials, out, W, yT, here)):
            _by_team(s, largest_logits, (), W, yT, here)
            _by_team(s, exponentials, out, W, yT, here)
        if weigh is not None:
            s.weights[:count] = weigh(part, loss[part])
        if dy is None or dW is None:
            continue
        words, (p_W, row) = s.words[: -(-P // 2) if operands.bf16 else P], (dy, start)
        if operands.bf16:
            p_W, row = s.dy, 0
            operands.transpose(s.dy, s.dyT[:P], 0, H)
        row_factors(s.factor, s.taken, s.sums, here, s.weights, scale, smoothing)
        finish_chunk(s.fy, s.factor, dy, start, p_W, row, words, W, y, y_row + start, H, s.taken, s.even, here)
        fy, _ = operands.pairs("fy", s.fy, 0, count)
        operands.multiply(dW, 0, words, 0, fy, V, operands.depth(count), start > 0 or smoothing > 0)
        if between is not None:
            between()


def _by_team(s: Chunk, function: Callable[..., Any], out: tuple[Any, ...], W: Array, yT: Array, targets: Array) -> list[bool]:
    """`exponentials` or `largest_logits` of a chunk, each thread some of its tokens. Returns what each of them returned."""
    operands, H, results = s.operands, s.H, [True] * s.operands.team.size

    def work(part: int) -> None:
        first, last = share_in_pairs(len(yT), operands.team.size, part)
        tokens = slice(first * operands.R, last * operands.R)
        if first == last:
            return
        left = s.left[part] if operands.bf16 else W
        of_transpose = s.of_transpose[part] if s.words.dtype == np.uint32 else W
        logits = s.z[first:last], s.shift[tokens], W, left, s.b, yT[first:last], operands.depth(H)
        if function is largest_logits:
            function(s.sums[tokens], *logits)
            return
        loss, dy, row = out
        words = s.words[first // 2 : (last + 1) // 2] if operands.bf16 else s.words[first:last]
        dy, row = (dy[first:last], 0) if operands.bf16 and dy.size else (dy, row + first * operands.R)
        own = loss[tokens], s.sums[tokens], words, s.pairs[first:last], dy, row, targets[tokens]
        results[part] = function(*own, *logits, of_transpose)

    operands.team.run(work)
    return results


@kernel
def exponentials(
    loss: Array,
    sums: Array,
    words: Array,
    pairs: Array,
    dy: Array,
    dy_row: int,
    targets: Array,
    z: Array,
    shift: Array,
    W: Array,
    left: Array,
    b: Array,
    yT: Array,
    K: int,
    of_transpose: Array,
) -> bool:
    """exp(z)^T of a chunk in words and pairs, its losses (N,), and dy = exp(z) @ W from row dy_row on, all at one go.

    Where z (N/R,:,R) has as many rows as W, exp(z)^T is left there; else z is scratch, and where dy is empty nothing but losses
    is computed. left and of_transpose are W, or for bfloat16 memory for a group of its rows as a left factor, and for the same
    of its transpose; dy is dy^T then. Returns whether all sums are within the safe range.
    """
    R = width(z)
    V, whole = W.shape[1], z.shape[1] == W.shape[1]
    sums[:] = 0
    for first in range(0, V, GROUP):
        count, at = min(GROUP, V - first), first if whole else 0
        row = left_factor(left, W, first, count)
        multiply(z, at, left, row, yT, count, K, False)
        for n in range(targets.size):
            row = targets[n] - first
            if 0 <= row < count:
                loss[n] = z[n // R, at + row, n % R] + b[first + row] - shift[n]
        exponentiate(words, pairs, sums, z, at, shift, b, first, count)
        if dy.size > 0:
            add_to_dy(dy, dy_row, pairs, W, of_transpose, first, count, targets.size)
    safe = True
    for n in range(sums.size):  # also of what fills up a panel: infinity there, times zero, would be no number
        safe &= SMALL < sums[n] < LARGE
    for n in range(targets.size):
        loss[n] = math.log(sums[n]) - loss[n] if targets[n] >= 0 else 0
    return safe


@kernel
def largest_logits(sums: Array, z: Array, shift: Array, W: Array, left: Array, b: Array, yT: Array, K: int) -> None:
    """shift (N,) = the largest logit of each token of a chunk whose sum is not within the safe range; of others 0."""
    R = width(z)
    shift[:] = -math.inf
    for first in range(0, W.shape[1], GROUP):
        count = min(GROUP, W.shape[1] - first)
        multiply(z, 0, left, left_factor(left, W, first, count), yT, count, K, False)
        for panel in range(z.shape[0]):
            for v in range(count):
                for j in range(R):
                    logit = z[panel, v, j] + b[first + v]
                    if logit > shift[panel * R + j]:
                        shift[panel * R + j] = logit
    for n in range(shift.size):
        if SMALL < sums[n] < LARGE:
            shift[n] = 0


def left_factor(left: Array, W: Array, first: int, count: int) -> int:
    """Make `count` rows of W, from `first` on, ready as a left factor. Returns the row where they begin in left."""
    raise NotImplementedError("for kernels only")


@overload(left_factor, jit_options=OPTIONS)
@no_type_check
def _left_factor(left, W, first, count):
    def bfloat16(left, W, first, count):
        to_words(left, 0, W, first, count)
        return 0

    return bfloat16 if left.dtype == types.uint32 else lambda left, W, first, count: first


def exponentiate(
    words: Array, pairs: Array, sums: Array, z: Array, row: int, shift: Array, b: Array, first: int, count: int
) -> None:
    """exp(z + b - shift) of `count` logits of each token, from `first` on: in z at `row`; for bfloat16 in words and pairs."""


@overload(exponentiate, jit_options=OPTIONS)
@no_type_check
def _exponentiate(words, pairs, sums, z, row, shift, b, first, count):
    def float64(words, pairs, sums, z, row, shift, b, first, count):
        R = width(z)
        for panel in range(z.shape[0]):
            total, off = sums[panel * R : panel * R + R], shift[panel * R : panel * R + R]
            for v in range(count):
                here, b_v = z[panel, row + v], b[first + v]
                for j in range(R):
                    here[j] = math.exp(here[j] + b_v - off[j])
                    total[j] += here[j]

    def float32(words, pairs, sums, z, row, shift, b, first, count):
        for panel in range(z.shape[0]):
            here = z.ctypes.data + panel * z.strides[0] + row * ROW
            columns = shift.ctypes.data + panel * ROW, sums.ctypes.data + panel * ROW
            for v in range(0, count, 2):
                exp_rows(v + 1 < count, here + v * ROW, b.ctypes.data + 4 * (first + v), *columns)

    def bfloat16(words, pairs, sums, z, row, shift, b, first, count):
        for panel in range(0, z.shape[0], 2):
            two = panel + 1 < z.shape[0]
            here = z.ctypes.data + panel * z.strides[0]
            left = words.ctypes.data + panel // 2 * words.strides[0] + first * ROW
            right = pairs.ctypes.data + panel * pairs.strides[0]
            columns = shift.ctypes.data + panel * ROW, sums.ctypes.data + panel * ROW
            for v in range(0, count, 2):
                exp_rows_to_bf16(
                    v + 1 < count, here + v * ROW, here + v * ROW + z.strides[0] if two else 0, b.ctypes.data + 4 * (first + v),
                    *columns, left + v * ROW, right + v // 2 * ROW, right + v // 2 * ROW + pairs.strides[0],
                )  # fmt: skip

    return float64 if z.dtype == types.float64 else bfloat16 if words.dtype == types.uint32 else float32


def add_to_dy(dy: Array, row: int, pairs: Array, W: Array, of_transpose: Array, first: int, count: int, N: int) -> None:
    """dy += exp(z) @ W for `count` rows of exp(z)^T, from `first` on; bfloat16: dy^T += W^T exp(z)^T, pairs has these rows
    alone.
    """


@overload(add_to_dy, jit_options=OPTIONS)
@no_type_check
def _add_to_dy(dy, row, pairs, W, of_transpose, first, count, N):
    def plain(dy, row, pairs, W, of_transpose, first, count, N):
        multiply_transposed(dy, row, pairs, first, W, first, N, count, first > 0)

    def bfloat16(dy, row, pairs, W, of_transpose, first, count, N):
        transpose_to_words(of_transpose, 0, W, first, count)
        pairs[:, (count + 1) // 2 : (count + 2 * SPAN - 1) // (2 * SPAN) * SPAN] = 0  # whole spans
        multiply(dy, 0, of_transpose, 0, pairs, dy.shape[1], (count + 1) // 2, first > 0)

    return bfloat16 if pairs.dtype == types.uint32 else plain


def subtract_targets(words: Array, taken: Array, targets: Array) -> None:
    """Take taken_n off p at each target."""


@overload(subtract_targets, jit_options=OPTIONS)
@no_type_check
def _subtract_targets(words, taken, targets):
    def plain(words, taken, targets):
        R = width(words)
        for n in range(targets.size):
            if targets[n] >= 0:
                words[n // R, targets[n], n % R] -= taken[n]

    def bfloat16(words, taken, targets):
        R = 16
        left = words.view(np.uint16)
        bits = np.empty(1, np.uint32)
        for n in range(targets.size):
            t = targets[n]
            if t >= 0:
                column = n // R % 2 * R + n % R
                bits[0] = np.uint32(left[n // R // 2, t, column]) << np.uint32(16)
                left[n // R // 2, t, column] = bf16(bits.view(np.float32)[0] - taken[n])

    return bfloat16 if words.dtype == types.uint32 else plain


@kernel
def finish_chunk(
    fy: Array,
    factor: Array,
    dy: Array,
    row: int,
    p_W: Array,
    p_row: int,
    words: Array,
    W: Array,
    y: Array,
    y_row: int,
    H: int,
    taken: Array,
    even: Array,
    targets: Array,
) -> None:
    """exp(z)^T in words becomes p^T; fy = f y with f, factor (N,), as column H; dy = f p @ W - even of p_W = exp(z) @ W, from
    row p_row on, which may be dy itself.
    """
    subtract_targets(words, taken, targets)
    R = width(y)
    for panel in range(y.shape[0]):
        for n in range(targets.size):
            for j in range(R):
                fy[panel, n, j] = y[panel, y_row + n, j] * factor[n]
    for n in range(targets.size):
        fy[H // R, n, H % R] = factor[n]
        for panel in range(dy.shape[0]):
            for j in range(R):
                value = p_W[panel, p_row + n, j]
                if targets[n] >= 0:
                    value = (value - taken[n] * W[panel, targets[n], j]) * factor[n] - even[panel, j]
                dy[panel, row + n, j] = value if targets[n] >= 0 else 0
        for j in range(H % R, R if H % R else 0):  # W has the bias there, and dy nothing
            dy[H // R, row + n, j] = 0


def softmax_cross_entropy_reference(
    y: Array, W: Array, b: Array, targets: Array, scale: float, smoothing: float = 0.0, weights: Array | float = 1.0
) -> tuple[Array, Array, Array, Array]:
    """The equations as they stand, any dtype, complex too. Returns loss (N,), dy, dW, db."""
    z = y @ W.T + b
    z = z - z.real.max(axis=1, keepdims=True)
    total = np.exp(z).sum(axis=1, keepdims=True)
    real = targets != IGNORE
    loss = np.where(real, np.log(total[:, 0]) - z[np.arange(len(z)), targets], 0)
    own = (1 - smoothing) * weights * np.ones(len(z))
    dz = (own + smoothing)[:, None] * np.exp(z) / total - smoothing / W.shape[0]
    dz[np.arange(len(z)), targets] -= own
    dz = dz * scale * real[:, None]
    return loss, dz @ W, dz.T @ y, dz.sum(axis=0)
