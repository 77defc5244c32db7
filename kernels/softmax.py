r"""Output projection, softmax and cross-entropy in one, a chunk of rows at a time, so that T x B x V is never stored.

    z = y @ W^T + b                               (N,V), N = T B rows
    loss_n = log sum_v exp(z_nv) - z_n,target     nats
    dz = scale (softmax(z) - onehot(target))      dy = dz @ W    dW = dz^T @ y    db = sum_n dz_n

Recomputing z in the backward would cost a third product, so the gradients are taken while the chunk is there. Rows with
target -1 are padding: their loss and gradient are zero.
"""

import math

import numpy as np

from .activations import exp
from .compile import kernel
from .gemm import matmul, matmul_add

IGNORE = -1  # the target of a padded position


def softmax_cross_entropy(loss, dy, dW, db, logits, y, W, b, targets, scale, between=None):
    """Losses and, for training, all gradients of the output layer.

    Parameters
    ----------
    loss : (N,), out
        Nats a token.
    dy, dW, db : (N,H), (V,H), (V,), out
        Overwritten. All None: only the losses are computed.
    logits : (R,V), scratch
        R is the number of rows of a chunk.
    y, W, b, targets : (N,H), (V,H), (V,), (N,) integer
    scale : float
        Factor on the gradients: one over the number of tokens that share the loss.
    between : callable, optional
        Called after each chunk, so that the caller can keep communication moving.
    """
    N, R = y.shape[0], logits.shape[0]
    for start in range(0, N, R):
        rows = slice(start, min(start + R, N))
        z = logits[: rows.stop - start]
        matmul(z, y[rows], W.T)
        if dy is None:
            cross_entropy_rows(loss[rows], z, b, targets[rows])
            continue
        if start == 0:
            db[:] = 0
        cross_entropy_gradient_rows(loss[rows], z, db, b, targets[rows], scale)
        matmul(dy[rows], z, W)
        if start == 0:
            matmul(dW, z.T, y[rows])
        else:
            matmul_add(dW, z.T, y[rows])
        if between is not None:
            between()


@kernel
def cross_entropy_rows(loss, z, b, targets):
    """loss (N,) of the logits z (N,V) + b (V,); z becomes exp(z + b - maximum)."""
    for n in range(z.shape[0]):
        row = z[n]
        top = row[0] + b[0]
        for k in range(row.shape[0]):
            row[k] += b[k]
            top = row[k] if row[k] > top else top
        target = targets[n]
        at_target = row[target] - top if target >= 0 else row[0]
        total = row.dtype.type(0)
        for k in range(row.shape[0]):
            row[k] = exp(row[k] - top)
            total += row[k]
        loss[n] = math.log(total) - at_target if target >= 0 else 0


@kernel
def cross_entropy_gradient_rows(loss, z, db, b, targets, scale):
    """loss (N,) of the logits z (N,V) + b (V,); z becomes dz; db (V,) is added to."""
    cross_entropy_rows(loss, z, b, targets)
    for n in range(z.shape[0]):
        row = z[n]
        target = targets[n]
        if target < 0:
            row[:] = 0
            continue
        total = row.dtype.type(0)
        for k in range(row.shape[0]):
            total += row[k]
        factor = row.dtype.type(scale) / total
        for k in range(row.shape[0]):
            row[k] *= factor
        row[target] -= row.dtype.type(scale)
        for k in range(row.shape[0]):
            db[k] += row[k]


def softmax_cross_entropy_reference(y, W, b, targets, scale):
    """The equations as they stand, any dtype, complex too. Returns loss (N,), dy, dW, db."""
    z = y @ W.T + b
    z = z - z.real.max(axis=1, keepdims=True)
    total = np.exp(z).sum(axis=1, keepdims=True)
    real = targets != IGNORE
    loss = np.where(real, np.log(total[:, 0]) - z[np.arange(len(z)), targets], 0)
    dz = np.exp(z) / total
    dz[np.arange(len(z)), targets] -= 1
    dz = dz * scale * real[:, None]
    return loss, dz @ W, dz.T @ y, dz.sum(axis=0)
