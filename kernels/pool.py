"""A sequence becomes one row a lane: the largest of each unit over time, the mean, or where the sequence ends.

    max    y_n = max_t x_t,n        dx_t,n = dy_n where t is the first at which unit n had its largest       t < len_n
    mean   y_n = sum_t x_t,n / len_n                dx_t,n = dy_n / len_n
    last   y_n = x_(len_n - 1),n                    dx_(len_n - 1),n = dy_n

Of two directions side by side, `last` takes from the second half of the panels row 0: there that direction has read all, as
in Keras' Bidirectional without return_sequences. max over time: Collobert et al. 2011, "Natural language processing (almost)
from scratch". A lane of length 0 has zeros, and no gradient.
"""

import numpy as np

from .compile import kernel
from .gemm import zero_panels
from .types import Array, DType

MAX, MEAN, LAST = range(3)
HOW = {"max": MAX, "mean": MEAN, "last": LAST}


@kernel
def pool_forward(
    out: Array, arg: Array, x: Array, x_row: int, lengths: Array, T: int, B: int, how: int, directions: int = 1
) -> None:
    """out (P,B,R) of T B rows of x (P,:,R), from x_row on.

    arg (P,B,R) int32 becomes, of MAX alone, the step of the largest, for the backward. lengths (B,) int64, each 0 to T.
    how: MAX, MEAN or LAST; directions: 1 or 2, then P is even.
    """
    P, R = out.shape[0], out.shape[2]
    for panel in range(P):
        for n in range(B):
            y, where, length = out[panel, n], arg[panel, n], lengths[n]
            y[:] = 0
            if how == LAST:
                t = end_of(panel, P, length, directions)
                for j in range(R):
                    y[j] = x[panel, x_row + t * B + n, j] if length > 0 else 0
                continue
            where[:] = 0
            for t in range(length):
                row = x[panel, x_row + t * B + n]
                for j in range(R):
                    if how == MEAN:
                        y[j] += row[j]
                    elif t == 0 or row[j] > y[j] or row[j] != row[j]:  # what is no number stays, and is seen
                        y[j], where[j] = row[j], t
            if how == MEAN and length > 0:
                for j in range(R):
                    y[j] /= length


@kernel
def pool_backward(
    dx: Array, dx_row: int, dout: Array, arg: Array, lengths: Array, T: int, B: int, how: int, directions: int = 1
) -> None:
    """T B rows of dx (P,:,R), from dx_row on, of dout (P,B,R); overwritten. The rest as in `pool_forward`."""
    P, R = dout.shape[0], dout.shape[2]
    for panel in range(P):
        for t in range(T):
            for n in range(B):
                row, dy, length = dx[panel, dx_row + t * B + n], dout[panel, n], lengths[n]
                for j in range(R):
                    if t >= length:
                        row[j] = 0
                    elif how == MEAN:
                        row[j] = dy[j] / length
                    elif how == MAX:
                        row[j] = dy[j] if arg[panel, n, j] == t else 0
                    else:
                        row[j] = dy[j] if t == end_of(panel, P, length, directions) else 0


@kernel
def end_of(panel: int, P: int, length: int, directions: int) -> int:
    """The step at which a direction has read all; `panel` of P says which."""
    return 0 if directions == 2 and panel >= P // 2 else length - 1


def pool_reference(x: Array, lengths: Array, how: int, directions: int = 1) -> Array:
    """The same of x (T,B,N), any dtype, complex too, whose real parts are compared. Returns (B,N)."""
    y = np.zeros_like(x[0])
    half = x.shape[2] // 2 if directions == 2 else x.shape[2]
    for n, length in enumerate(lengths):
        if length and how == MEAN:
            y[n] = x[:length, n].mean(axis=0)
        elif length and how == MAX:
            y[n] = np.take_along_axis(x[:length, n], x[:length, n].real.argmax(axis=0)[None], axis=0)[0]
        elif length:
            y[n, :half], y[n, half:] = x[length - 1, n, :half], x[0, n, half:]
    return y


def pool_backward_reference(dy: Array, x: Array, lengths: Array, how: int, directions: int = 1) -> Array:
    """The gradient with respect to x (T,B,N) of dy (B,N)."""
    dx, units = np.zeros_like(x), np.arange(x.shape[2])
    half = x.shape[2] // 2 if directions == 2 else x.shape[2]
    for n, length in enumerate(lengths):
        if length and how == MEAN:
            dx[:length, n] = dy[n] / length
        elif length and how == MAX:
            dx[x[:length, n].real.argmax(axis=0), n, units] = dy[n]
        elif length:
            dx[length - 1, n, :half], dx[0, n, half:] = dy[n, :half], dy[n, half:]
    return dx


def warm_up(dtype: DType) -> None:
    """Run every kernel of this file once, for panels of `dtype`: all are compiled then, or loaded from the cache."""
    x, lengths = zero_panels(1, 1, dtype), np.ones(1, np.int64)
    arg = np.zeros(x.shape, np.int32)
    pool_forward(x.copy(), arg, x, 0, lengths, 1, 1, MAX, 1)
    pool_backward(x.copy(), 0, x, arg, lengths, 1, 1, MAX, 1)
