r"""The LSTM of Hochreiter and Schmidhuber (1997) with forget gates (Gers et al. 2000), a whole window at a time.

Notation, here and in every kernel
----------------------------------
T time, B lanes on this rank, D input width, H hidden width, V vocabulary; arrays are time-major.
The gradient of the loss with respect to z is written dz. sigma is the logistic function.

    x  (T,B,D)      the inputs                    Wx (D,4H)   Wh (H,4H)   b (4H,)
    h, c (T+1,B,H)  output and cell, slot 0 holds the state before the window, slot T the state after it

    a = x_t @ Wx + h_{t-1} @ Wh + b               (B,4H), gates i | f | g | o as in PyTorch
    i = sigma(a_i)   f = sigma(a_f)   g = tanh(a_g)   o = sigma(a_o)
    c_t = f * c_{t-1} + i * g
    h_t = o * tanh(c_t)

Backward, from t = T-1 down to 0, with dh_t coming from above and from step t+1, dc_t from step t+1:

    dc_t += dh_t * o * (1 - tanh(c_t)^2)
    da_i = dc_t * g * i (1 - i)             da_f = dc_t * c_{t-1} * f (1 - f)
    da_g = dc_t * i * (1 - g^2)             da_o = dh_t * tanh(c_t) * o (1 - o)
    dc_{t-1} = dc_t * f                     dh_{t-1} = da @ Wh^T

    dx = da @ Wx^T     dWx = sum_t x_t^T @ da_t     dWh = sum_t h_{t-1}^T @ da_t     db = sum_t da_t

What makes it fast: only h_{t-1} @ Wh and its mirror da @ Wh^T depend on the step before. The input product of the
whole window is one large matrix product ahead of the recurrence, and dx, dWx, dWh are three large ones behind it. The
gates overwrite the products that made them, and da overwrites the gates, so a window needs one 4H array a layer.

Everything lies in panels (gemm.py) of R columns; row t B + n of a panel is lane n at time t. The columns of a, Wx, Wh and
b are dealt to panels so that the four gates of R units are neighbours: panel 4u + q holds gate q (of i f g o) of the units
u R ... u R + R - 1. So the recurrence finishes R units at a time, from the product to h, before it leaves the
first-level cache. Units beyond H have zero weights, and stay zero: tanh(0) = 0 is all that reaches their cell.
"""

import math
from collections.abc import Callable
from typing import no_type_check

import numpy as np
from numba import types
from numba.extending import overload, register_jitable

from .activations import cell_backward_row, cell_forward_row
from .compile import OPTIONS, kernel
from .gemm import leave_tiles, multiply_on, width
from .operands import Operands, Weight, keep_left
from .team import meet, new_barrier, share_in_pairs
from .tiles import ROW
from .types import Array

STRIDE = 1 << 27  # operations that a thread does going back, about a millisecond's, before `between` is called


def lstm_forward(
    h: Array,
    c: Array,
    gates: Array,
    operands: Operands,
    x: Array | None,
    x_row: int,
    Wx: Weight | None,
    Wh: Weight,
    b: Array,
    T: int,
    B: int,
) -> None:
    """Run the window; fill slots 1 to T of h and c, and gates.

    Parameters
    ----------
    h, c : (H/R,(T+1)B,R), in and out
        Slot 0 is read, the others are written.
    gates : (4H/R,TB,R), out
        The activations, saved for the backward.
    operands : operands.Operands
    x, x_row : (D/R,:,R), int; or None
        The inputs, from row x_row on. None: `gates` already holds x_t @ Wx, as for one-hot inputs, whose product is a row
        of Wx, which is not looked at.
    Wx, Wh : Weight
        Of (4H/R,D,R) and (4H/R,H,R).
    b : (4H/R,R)
    T, B : int
        Steps and lanes; h, c and gates may be longer.
    """
    if x is not None and Wx is not None:
        left, row = operands.words("x", x, x_row, T * B)
        operands.multiply(gates, 0, left, row, Wx.factor, T * B, operands.depth(Wx.rows), False)
    left, barrier, threads = operands.like("h", h), new_barrier(), operands.team.size
    arguments = h, c, gates, left, Wh.factor, operands.depth(Wh.rows), b, T, B, barrier, threads
    operands.team.run(lambda part: forward_steps(*arguments, part))


def lstm_backward(
    dx: Array | None,
    dWx: Array | None,
    dWh: Array,
    db: Array,
    gates: Array,
    dh_next: Array,
    dc: Array,
    operands: Operands,
    dh: Array,
    x: Array | None,
    x_row: int,
    h: Array,
    c: Array,
    Wx: Weight | None,
    Wh: Weight,
    T: int,
    B: int,
    between: Callable[[], object] | None = None,
    ends: bool = False,
) -> None:
    """The gradients of `lstm_forward`; no gradient flows into the window from behind it (truncated, Williams and Peng 1990).

    Parameters
    ----------
    dx : (D/R,TB,R) or None, out
        None where x was.
    dWx, dWh, db : (4H/R,D,R), (4H/R,H,R), (4H/R,R), out
        Overwritten. dWx is not touched where x is None.
    gates : (4H/R,TB,R), in and out
        The saved activations; becomes da.
    dh_next, dc : (H/R,B,R), scratch
        Where `ends`, out: the gradients of slot 0 of h and of c.
    operands : operands.Operands
    dh : (H/R,TB,R)
        Gradient of slots 1 to T of h from the layers above.
    x, x_row, h, c, Wx, Wh, T, B
        As in the forward.
    between : callable, optional
        Called every millisecond or time step, whichever is longer, so that the caller can keep communication moving.
    ends : bool
        True: the state before the window has a gradient too, for a product more.
    """
    H, all_gates = Wh.rows, operands.depth(len(gates) * operands.R)
    dh_next[:], dc[:], db[:] = 0, 0, 0
    right = Wh.transposed(operands)
    da, team = operands.like("da", gates), operands.team
    stride = max(1, STRIDE * team.size // (8 * B * H * H))
    for last in range(T, 0, -stride):
        steps = max(0, last - stride), last, B
        arguments = dh_next, dc, db, gates, da, dh, c, right, all_gates, *steps, ends, new_barrier(), team.size
        team.run(lambda part: backward_steps(*arguments, part))
        if between is not None:
            between()
    da_pairs, da_row = operands.pairs("da pairs", gates, 0, T * B)
    if x is not None and Wx is not None and dx is not None and dWx is not None:
        operands.multiply(dx, 0, da, 0, Wx.transposed(operands), T * B, all_gates, False)
        operands.multiply_transposed(dWx, "x", x, x_row, da_pairs, da_row, T * B)
    operands.multiply_transposed(dWh, "x", h, 0, da_pairs, da_row, T * B)


@kernel
def forward_steps(
    h: Array,
    c: Array,
    gates: Array,
    left: Array,
    Wh: Array,
    K: int,
    b: Array,
    T: int,
    B: int,
    barrier: Array,
    threads: int,
    part: int,
) -> None:
    """The recurrence of `lstm_forward`, of one thread's share of the units: gates holds x @ Wx.

    left is h as a left factor, kept up with it. Every other step goes through the units from the last to the first, so that it
    begins with those weights that the caches still have of the step before.
    """
    first, last = share_in_pairs(h.shape[0], threads, part)
    keep_left(left[first // 2 : (last + 1) // 2], h[first:last], 0, B)
    tiles = 0
    for t in range(T):
        meet(barrier, threads, t + 1)
        for n in range(first, last):
            u = n if t % 2 == 0 else first + last - 1 - n
            block = gates[4 * u : 4 * u + 4]
            tiles = multiply_on(tiles, block, t * B, left, t * B, Wh[4 * u : 4 * u + 4], B, K, True)
            cell_forward(h[u], c[u], block, b[4 * u : 4 * u + 4], t, B)
        keep_left(left[first // 2 : (last + 1) // 2], h[first:last], (t + 1) * B, B)
    leave_tiles(left)


def cell_forward(h: Array, c: Array, gates: Array, b: Array, t: int, B: int) -> None:
    """R units, one time step: gates (4,TB,R) + b (4,R) become i, f, g, o; slot t+1 of h and c ((T+1)B,R) is written."""


@overload(cell_forward, jit_options=OPTIONS)
@no_type_check
def _cell_forward(h, c, gates, b, t, B):
    def float32(h, c, gates, b, t, B):
        for n in range(t * B, t * B + B):
            here, after = n * ROW, (n + B) * ROW
            cell_forward_row(
                gates.ctypes.data + here, gates.strides[0], b.ctypes.data,
                c.ctypes.data + here, c.ctypes.data + after, h.ctypes.data + after,
            )  # fmt: skip

    def float64(h, c, gates, b, t, B):
        for n in range(t * B, t * B + B):
            for k in range(width(h)):
                i, f = sigmoid(gates[0, n, k] + b[0, k]), sigmoid(gates[1, n, k] + b[1, k])
                g, o = math.tanh(gates[2, n, k] + b[2, k]), sigmoid(gates[3, n, k] + b[3, k])
                gates[0, n, k], gates[1, n, k], gates[2, n, k], gates[3, n, k] = i, f, g, o
                c[n + B, k] = f * c[n, k] + i * g
                h[n + B, k] = o * math.tanh(c[n + B, k])

    return float32 if c.dtype == types.float32 else float64


@kernel
def backward_steps(
    dh_next: Array,
    dc: Array,
    db: Array,
    gates: Array,
    left: Array,
    dh: Array,
    c: Array,
    WhT: Array,
    K: int,
    begin: int,
    end: int,
    B: int,
    ends: bool,
    barrier: Array,
    threads: int,
    part: int,
) -> None:
    """Time steps end - 1 down to begin of `lstm_backward`, of one thread's share of the units.

    Slot t of gates becomes da, and left with it; dc is that of t - 1, and dh_next too where that is a step, or `ends`. Every
    other step takes the units the other way round, as in `forward_steps`: two panels of WhT at a time, each pair of them a
    product of its own.
    """
    first, last = share_in_pairs(dc.shape[0], threads, part)
    tiles = 0
    for t in range(end - 1, begin - 1, -1):
        for u in range(first, last):
            cell_backward(gates[4 * u : 4 * u + 4], db[4 * u : 4 * u + 4], dc[u], dh_next[u], dh[u], c[u], t, B)
        keep_left(left[2 * first : 2 * last], gates[4 * first : 4 * last], t * B, B)
        meet(barrier, threads, end - t)
        if t > 0 or ends:
            for n in range(first, last, 2):
                u = n if t % 2 == 0 else first + (last - 1 - n) // 2 * 2
                two = min(u + 2, last)
                tiles = multiply_on(tiles, dh_next[u:two], 0, left, t * B, WhT[u:two], B, K, False)
    leave_tiles(left)


def cell_backward(gates: Array, db: Array, dc: Array, dh_next: Array, dh: Array, c: Array, t: int, B: int) -> None:
    """R units, one time step back: slot t of gates (4,TB,R) becomes da, which db (4,R) adds up; dc (B,R) becomes dc_{t-1}."""


@overload(cell_backward, jit_options=OPTIONS)
@no_type_check
def _cell_backward(gates, db, dc, dh_next, dh, c, t, B):
    def float32(gates, db, dc, dh_next, dh, c, t, B):
        for n in range(B):
            here, after, lane = (t * B + n) * ROW, (t * B + B + n) * ROW, n * ROW
            cell_backward_row(
                gates.ctypes.data + here, gates.strides[0], db.ctypes.data, c.ctypes.data + here, c.ctypes.data + after,
                dc.ctypes.data + lane, dh_next.ctypes.data + lane, dh.ctypes.data + here,
            )  # fmt: skip

    def float64(gates, db, dc, dh_next, dh, c, t, B):
        for n in range(t * B, t * B + B):
            lane = n - t * B
            for k in range(width(c)):
                i, f, g, o = gates[0, n, k], gates[1, n, k], gates[2, n, k], gates[3, n, k]
                tanh_c, dh_t = math.tanh(c[n + B, k]), dh_next[lane, k] + dh[n, k]
                dc_t = dc[lane, k] + dh_t * o * (1 - tanh_c**2)
                da_i, da_f = dc_t * g * i * (1 - i), dc_t * c[n, k] * f * (1 - f)
                da_g, da_o = dc_t * i * (1 - g**2), dh_t * tanh_c * o * (1 - o)
                gates[0, n, k], gates[1, n, k], gates[2, n, k], gates[3, n, k] = da_i, da_f, da_g, da_o
                dc[lane, k] = dc_t * f
                db[0, k] += da_i
                db[1, k] += da_f
                db[2, k] += da_g
                db[3, k] += da_o

    return float32 if c.dtype == types.float32 else float64


@register_jitable
def sigmoid(x: Array) -> Array:
    """The logistic function of float64, or of an array of any dtype, complex too: tanh has no branch that a step could miss."""
    return 0.5 + 0.5 * np.tanh(0.5 * x)


def lstm_forward_reference(x: Array, h0: Array, c0: Array, Wx: Array, Wh: Array, b: Array) -> tuple[Array, Array, Array]:
    """The equations as they stand, any dtype, complex too. Returns h (T+1,B,H), c (T+1,B,H), gates (T,B,4H)."""
    h, c, gates = [h0], [c0], []
    for x_t in x:
        a_i, a_f, a_g, a_o = np.split(x_t @ Wx + h[-1] @ Wh + b, 4, axis=-1)
        i, f, g, o = sigmoid(a_i), sigmoid(a_f), np.tanh(a_g), sigmoid(a_o)
        c.append(f * c[-1] + i * g)
        h.append(o * np.tanh(c[-1]))
        gates.append(np.concatenate([i, f, g, o], axis=-1))
    return np.stack(h), np.stack(c), np.stack(gates)


def lstm_backward_reference(
    dh: Array, gates: Array, x: Array, h: Array, c: Array, Wx: Array, Wh: Array
) -> tuple[Array, Array, Array, Array, Array, Array]:
    """The gradients as they stand. Returns dx (T,B,D), dWx, dWh, db, dh0 (B,H), dc0."""
    dx, dWx, dWh, db = np.empty_like(x), np.zeros_like(Wx), np.zeros_like(Wh), np.zeros_like(Wh[0])
    dh_next, dc = np.zeros_like(h[0]), np.zeros_like(h[0])
    for t in reversed(range(len(x))):
        i, f, g, o = np.split(gates[t], 4, axis=-1)
        dh_t = dh[t] + dh_next
        dc_t = dc + dh_t * o * (1 - np.tanh(c[t + 1]) ** 2)
        da = np.concatenate(
            [
                dc_t * g * i * (1 - i),
                dc_t * c[t] * f * (1 - f),
                dc_t * i * (1 - g**2),
                dh_t * np.tanh(c[t + 1]) * o * (1 - o),
            ],
            axis=-1,
        )
        dc, dh_next = dc_t * f, da @ Wh.T
        dx[t] = da @ Wx.T
        dWx += x[t].T @ da
        dWh += h[t].T @ da
        db += da.sum(axis=0)
    return dx, dWx, dWh, db, dh_next, dc
