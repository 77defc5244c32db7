"""The order of time turned round within each lane's own length: what the backward direction of a bidirectional layer reads.

    y_t,n = x_(len_n - 1 - t),n    for t < len_n          y_t,n = x_t,n    behind it

(Schuster and Paliwal 1997, for lanes of several lengths.) Padding stays where it is, behind all that counts, in both
directions: so the recurrence needs no mask. The map is its own inverse, and as a permutation its own gradient: dx is the same
function of dy.
"""

import numpy as np

from .compile import kernel
from .gemm import zero_panels
from .types import Array, DType


@kernel
def reverse_rows(out: Array, out_row: int, x: Array, x_row: int, lengths: Array, T: int, B: int, add: bool) -> None:
    """T B rows of out (P,:,R), from out_row on, = those of x (P,:,R), from x_row on, turned; or += where `add`.

    lengths (B,) int64, each 0 to T. out and x are different arrays. Panels are independent: threads take slices of both.
    """
    for panel in range(x.shape[0]):
        for t in range(T):
            for n in range(B):
                source = lengths[n] - 1 - t if t < lengths[n] else t
                target, values = out[panel, out_row + t * B + n], x[panel, x_row + source * B + n]
                for j in range(values.size):
                    target[j] = target[j] + values[j] if add else values[j]


def reverse_reference(x: Array, lengths: Array) -> Array:
    """The same of x (T,B,N), any dtype."""
    y = x.copy()
    for n, length in enumerate(lengths):
        y[:length, n] = x[:length, n][::-1]
    return y


def warm_up(dtype: DType) -> None:
    """Run every kernel of this file once, for panels of `dtype`: all are compiled then, or loaded from the cache."""
    x = zero_panels(1, 1, dtype)
    reverse_rows(x, 0, x.copy(), 0, np.zeros(1, np.int64), 1, 1, False)
