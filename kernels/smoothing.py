r"""Label smoothing (Szegedy et al. 2016) and weights of rows, as the softmax (softmax.py) takes them into its gradient.

    dz_nv = scale (a_n q_nv - b_n [v = target] - eps / V)        q = softmax(z)   b_n = (1 - eps) w_n   a_n = b_n + eps

It is the gradient of (1 - eps) loss + eps (mean of -log q_nv over v); with w_n = 1, a_n is 1. Copying (copying.py) has other
weights. The even part, the same for all v, is a product of two vectors, and is never spread over the wide p:

    dy_n -= (scale eps / V) sum_v W_v               dW_v -= (scale eps / V) sum_n y_n             db_v -= (scale eps / V) N
"""

import numpy as np

from .compile import kernel
from .gemm import width, zero_panels
from .team import Team
from .types import Array, DType


def even_part(
    even: Array, dW: Array, W: Array, y: Array, y_row: int, H: int, targets: Array, extent: float, team: Team
) -> None:
    """What every class takes alike.

    Parameters
    ----------
    even : (P,R), out
        extent times the sum of all rows of W.
    dW : (P,V,R), out
        Every row: -extent times the sum of those rows of y that have a target, with their number as column H.
    W : (P,V,R)
        P = (H+1)/R, with the bias as column H.
    y, y_row : (H/R,:,R), int
    H : int
    targets : (N,) integer
    extent : float
        scale eps / V.
    team : team.Team
        Shares the panels.
    """
    team.share(lambda first, last: sum_of_rows(even[first:last], W[first:last], extent), len(W))
    team.share(lambda first, last: fill_rows(dW, y, y_row, H, targets, extent, first, last), len(dW))


@kernel
def sum_of_rows(even: Array, W: Array, extent: float) -> None:
    """even (P,R) = extent times the sum of the rows of W (P,V,R)."""
    for panel in range(W.shape[0]):
        total = even[panel]
        total[:] = 0
        for v in range(W.shape[1]):
            for j in range(width(W)):
                total[j] += W[panel, v, j]
        for j in range(width(W)):
            total[j] *= extent


@kernel
def fill_rows(dW: Array, y: Array, y_row: int, H: int, targets: Array, extent: float, first: int, last: int) -> None:
    """Panels first to last - 1 of dW, as in `even_part`."""
    R = width(dW)
    for panel in range(first, last):
        total = dW[panel, 0]
        total[:] = 0
        for n in range(targets.size):
            if targets[n] >= 0:
                if panel < y.shape[0]:
                    for j in range(R):
                        total[j] += y[panel, y_row + n, j]
                if panel == H // R:
                    total[H % R] += 1
        for j in range(R):
            total[j] *= -extent
        for v in range(1, dW.shape[1]):
            for j in range(R):
                dW[panel, v, j] = total[j]


@kernel
def row_factors(
    factor: Array, taken: Array, sums: Array, targets: Array, weights: Array, scale: float, smoothing: float
) -> None:
    """factor (N,) = scale a_n / s_n, of rows with no target 0, and taken (N,) = s_n b_n / a_n, from s_n = sum_v exp(z_nv)."""
    number = sums.dtype.type
    eps, unit = number(smoothing), number(scale)
    for n in range(targets.size):
        own = (number(1) - eps) * weights[n]
        whole = own + eps
        factor[n] = unit * whole / sums[n] if targets[n] >= 0 else 0
        taken[n] = sums[n] * (own / whole) if whole > 0 else 0


def warm_up(dtype: DType) -> None:
    """Run every kernel of this file once, for panels of `dtype`: all are compiled then, or loaded from the cache."""
    W, y, n = zero_panels(1, 2, dtype), zero_panels(1, 1, dtype), np.ones(1, dtype)
    target = np.zeros(1, np.int64)
    even_part(W[:, 0].copy(), W.copy(), W, y, 0, 1, target, 0.0, Team())
    row_factors(n.copy(), n.copy(), n, target, n, 1.0, 0.1)
