"""Table look-up: x_n = E[token_n], and its gradient, a scatter that adds: dE[token_n] += dx_n.

The same two functions serve one-hot inputs, whose product with Wx (V,4H) is the row Wx[token].
"""

import numpy as np

from .compile import kernel


@kernel
def embedding_forward(x, tokens, table):
    """x (N,E) = table (V,E)[tokens (N,)]."""
    for n in range(tokens.shape[0]):
        row = table[tokens[n]]
        for k in range(row.shape[0]):
            x[n, k] = row[k]


@kernel
def embedding_backward(dtable, tokens, dx):
    """dtable (V,E)[tokens (N,)] += dx (N,E), in order of n; rows of other tokens are not touched."""
    for n in range(tokens.shape[0]):
        row = dtable[tokens[n]]
        for k in range(row.shape[0]):
            row[k] += dx[n, k]


def embedding_backward_reference(dtable, tokens, dx):
    """The same by NumPy."""
    np.add.at(dtable, tokens, dx)
