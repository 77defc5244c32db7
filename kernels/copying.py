r"""Copying from the source: the pointer-generator of See, Liu and Manning 2017, over a fixed vocabulary.

    P_n = g_n q_n + (1 - g_n) a_n      q_n  softmax's probability of the target      a_n = sum over s of A_s [token_s = target]
    loss_n = -log P_n                  g_n = sigma(z_n)                              A    attention (attention.py)

Backward, with w_n = g_n q_n / P_n, the share of the vocabulary in P_n:

    dz_n = g_n - w_n         da_n = -(1 - g_n) / P_n         dA_s = da_n where token_s = target
    dlogits_n = w_n (q - onehot): the softmax's own gradient, weighted (smoothing.py)

Rows are t B + n, lane n at step t. tokens (S,B), targets (T,B) and lengths (B,) are int64; a target of -1 is none. The gate
has panels (gemm.py) of one unit: column 0 of (1,:,R).
"""

import math

import numpy as np

from .compile import kernel
from .gemm import zero_panels
from .lstm import sigmoid
from .types import Array, DType

FAR = 80.0  # e^80 is the steepest of da: what is steeper belongs to attention that has come to zero, and would be infinite


@kernel
def copied(a: Array, A: Array, tokens: Array, targets: Array, lengths: Array) -> None:
    """a (TB,) = the attention A (B,T,S) on each target in the source, of which `lengths` steps count."""
    T, B = targets.shape
    for n in range(B):
        for t in range(T):
            total = A.dtype.type(0)
            for s in range(lengths[n] if targets[t, n] >= 0 else 0):
                total += A[n, t, s] if tokens[s, n] == targets[t, n] else 0
            a[t * B + n] = total


@kernel
def copied_backward(dA: Array, da: Array, tokens: Array, targets: Array, lengths: Array) -> None:
    """dA (B,T,S), overwritten, of da (TB,), which is not looked at where there is no target."""
    T, B = targets.shape
    for n in range(B):
        for t in range(T):
            for s in range(dA.shape[2]):
                same = targets[t, n] >= 0 and s < lengths[n] and tokens[s, n] == targets[t, n]
                dA[n, t, s] = da[t * B + n] if same else 0


@kernel
def mix(losses: Array, weights: Array, dgate: Array, da: Array, a: Array, gate: Array, rows: Array, scale: float) -> None:
    """The losses of some rows with the copies in them, and all gradients, for the softmax's `weigh`.

    Parameters
    ----------
    losses : (N,), in and out
        -log q; becomes -log P. In logarithms, so that neither P nor q has to be a number above zero.
    weights : (N,), out
        w.
    dgate, da : (1,TB,R), (TB,), out
        scale times dz, in column 0, and times da, in these rows alone.
    a, gate : (TB,), (1,TB,R)
        z is in column 0 of gate.
    rows : (N,) int64
        The row of each.
    scale : float
        Factor on the gradients; with smoothing, times 1 - eps.
    """
    for n in range(rows.size):
        row = rows[n]
        z = float(gate[0, row, 0])
        log_g, log_rest = -softplus(-z), -softplus(z)
        by_word = log_g - losses[n]
        by_copy = -math.inf if a[row] <= 0 else log_rest + math.log(a[row])
        log_P = larger_of(by_word, by_copy)
        if log_P > -math.inf:
            log_P += math.log(math.exp(by_word - log_P) + math.exp(by_copy - log_P))
        w = math.exp(by_word - log_P)
        losses[n], weights[n] = -log_P, w
        dgate[0, row, 0] = scale * (math.exp(log_g) - w)
        da[row] = -scale * math.exp(min(log_rest - log_P, FAR))


@kernel
def mix_distributions(probabilities: Array, A: Array, gate: Array, tokens: Array, source: Array, lengths: Array) -> None:
    """probabilities (N,V), those of the softmax, become those of the whole, in place: for decoding.

    A (N,S), gate (1,N,R), source (N,) int64 the lane of each row in tokens (S,B) and lengths (B,). Threads take slices of rows.
    """
    for n in range(source.size):
        g = 0.5 + 0.5 * math.tanh(0.5 * gate[0, n, 0])
        row, lane = probabilities[n], source[n]
        for v in range(row.size):
            row[v] *= g
        for s in range(lengths[lane]):
            row[tokens[s, lane]] += (1 - g) * A[n, s]


@kernel
def softplus(x: float) -> float:
    """log(1 + e^x)."""
    return max(x, 0.0) + math.log1p(math.exp(-abs(x)))


@kernel
def larger_of(x: float, y: float) -> float:
    """The larger; where one is no number, that."""
    return x if x > y or x != x else y


def copied_reference(A: Array, tokens: Array, targets: Array, lengths: Array) -> Array:
    """a (T,B) as it stands, any dtype, complex too."""
    return (A * matches(tokens, targets, lengths)).sum(axis=2).T


def matches(tokens: Array, targets: Array, lengths: Array) -> Array:
    """(B,T,S) bool: where the source has the target."""
    there = (np.arange(len(tokens)) < np.asarray(lengths)[:, None])[:, None]
    return there & (tokens.T[:, None] == targets.T[:, :, None]) & (targets.T[:, :, None] >= 0)


def mix_reference(loss: Array, a: Array, z: Array) -> Array:
    """-log P, any shape and dtype, complex too. loss is that of the softmax."""
    g = sigmoid(z)
    return -np.log(g * np.exp(-loss) + (1 - g) * a)


def mix_backward_reference(loss: Array, a: Array, z: Array) -> tuple[Array, Array, Array]:
    """The gradients with respect to the three: w, da, dz."""
    g, P = sigmoid(z), np.exp(-mix_reference(loss, a, z))
    w = g * np.exp(-loss) / P
    return w, -(1 - g) / P, g - w


def warm_up(dtype: DType) -> None:
    """Run every kernel of this file once, for panels of `dtype`: all are compiled then, or loaded from the cache."""
    A, a, gate = np.ones((1, 1, 1), dtype), np.ones(1, dtype), zero_panels(1, 1, dtype)
    tokens, one = np.zeros((1, 1), np.int64), np.ones(1, np.int64)
    copied(a, A, tokens, tokens, one)
    copied_backward(A, a, tokens, tokens, one)
    mix(a.copy(), a.copy(), gate.copy(), a.copy(), a, gate, one - 1, 1.0)
    mix_distributions(A[0], A[0], gate, tokens, one - 1, one)
