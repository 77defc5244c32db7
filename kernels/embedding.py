"""Table look-up: x_n = E[token_n], and its gradient, a scatter that adds: dE[token_n] += dx_n.

A table (V,E) is row-major, a row a token; x lies in panels (gemm.py). The same serves one-hot inputs, whose product with
Wx (V,4H) is the row Wx[token]: then x is the gates, whose panels lstm.py deals out. A tied table is the output layer's W,
in panels of V rows (softmax.py).
"""

import numpy as np

from .compile import kernel
from .gemm import width
from .types import Array


@kernel
def embedding_forward(x: Array, tokens: Array, table: Array) -> None:
    """x (E/R,N,R) = table (V,E)[tokens (N,)]."""
    E, R = table.shape[1], width(x)
    for n in range(tokens.shape[0]):
        for k in range(E):
            x[k // R, n, k % R] = table[tokens[n], k]


@kernel
def embedding_backward(dtable: Array, tokens: Array, dx: Array) -> None:
    """dtable (V,E)[tokens (N,)] += dx (E/R,N,R), in order of n; rows of other tokens are not touched."""
    E, R = dtable.shape[1], width(dx)
    for n in range(tokens.shape[0]):
        for k in range(E):
            dtable[tokens[n], k] += dx[k // R, n, k % R]


@kernel
def tied_embedding_forward(x: Array, tokens: Array, W: Array, E: int) -> None:
    """x (E/R,N,R) = W (:,V,R)[:, tokens (N,)], of which E columns count."""
    R = width(x)
    for n in range(tokens.shape[0]):
        for k in range(E):
            x[k // R, n, k % R] = W[k // R, tokens[n], k % R]


@kernel
def tied_embedding_backward(dW: Array, tokens: Array, dx: Array, E: int) -> None:
    """dW (:,V,R)[:, tokens (N,)] += dx (E/R,N,R), in order of n, in the first E columns."""
    R = width(dx)
    for n in range(tokens.shape[0]):
        for k in range(E):
            dW[k // R, tokens[n], k % R] += dx[k // R, n, k % R]


@kernel
def gates_forward(gates: Array, tokens: Array, table: Array) -> None:
    """gates (4H/R,N,R) = table (V,4H)[tokens (N,)]: gate q of unit k to panel 4 (k div R) + q."""
    H, R = table.shape[1] // 4, width(gates)
    for n in range(tokens.shape[0]):
        for q in range(4):
            for k in range(H):
                gates[4 * (k // R) + q, n, k % R] = table[tokens[n], q * H + k]


@kernel
def gates_backward(dtable: Array, tokens: Array, da: Array) -> None:
    """dtable (V,4H)[tokens (N,)] += da (4H/R,N,R), in order of n."""
    H, R = dtable.shape[1] // 4, width(da)
    for n in range(tokens.shape[0]):
        for q in range(4):
            for k in range(H):
                dtable[tokens[n], q * H + k] += da[4 * (k // R) + q, n, k % R]


def embedding_backward_reference(dtable: Array, tokens: Array, dx: Array) -> None:
    """The same by NumPy, for dx (N,E)."""
    np.add.at(dtable, tokens, dx)
