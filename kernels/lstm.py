r"""The LSTM of Hochreiter and Schmidhuber (1997) with forget gates (Gers et al. 2000), a whole window at a time.

Notation, here and in every kernel
----------------------------------
T time, B lanes on this rank, D input width, H hidden width, V vocabulary; arrays are time-major and C-contiguous.
The gradient of the loss with respect to z is written dz. sigma is the logistic function.

    x  (T,B,D)      the inputs                    Wx (D,4H)   Wh (H,4H)   b (4H,)
    h, c (T+1,B,H)  output and cell, slot 0 holds the state before the window, slot T the state after it

    a = x_t @ Wx + h_{t-1} @ Wh + b               (B,4H), four blocks of H columns, in PyTorch's order i | f | g | o
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
gates overwrite the products that made them, and da overwrites the gates, so a window needs one (T,B,4H) array a layer.
The recurrent weights are packed once a window for the products in the recurrence (gemm.py).
"""

import numpy as np

from .activations import sigmoid, tanh
from .compile import kernel
from .gemm import matmul, matmul_add, pack, pack_transposed, packed_matmul

WORTH_PACKING = 4  # time steps


def lstm_forward(h, c, gates, Wh_packed, x, Wx, Wh, b):
    """Run the window; fill h[1:], c[1:] and gates.

    Parameters
    ----------
    h, c : (T+1,B,H), in and out
        Slot 0 is read, the others are written.
    gates : (T,B,4H), out
        The activations i | f | g | o, saved for the backward.
    Wh_packed : of gemm.packed_shape(H, 4H), scratch
    x : (T,B,D) or None
        None: `gates` already holds x_t @ Wx, as for one-hot inputs, whose product is a row of Wx.
    Wx, Wh, b : (D,4H), (H,4H), (4H,)
    """
    T, B, _ = gates.shape
    if x is not None:
        matmul(gates.reshape(T * B, -1), x.reshape(T * B, -1), Wx)
    if T >= WORTH_PACKING:
        pack(Wh_packed, Wh)
    for t in range(T):
        if T >= WORTH_PACKING:
            packed_matmul(gates[t], h[t], Wh_packed, True)
        else:
            matmul_add(gates[t], h[t], Wh)
        cell_forward(h[t + 1], c[t + 1], gates[t], b, c[t])


def lstm_backward(dx, dWx, dWh, db, gates, dh_next, dc, WhT_packed, dh, x, h, c, Wx, Wh, between=None):
    """The gradients of `lstm_forward`; no gradient flows into the window from behind it (truncated, Williams and Peng 1990).

    Parameters
    ----------
    dx : (T,B,D) or None, out
        None where x was.
    dWx, dWh, db : (D,4H), (H,4H), (4H,), out
        Overwritten. dWx is not touched where x is None.
    gates : (T,B,4H), in and out
        The saved activations; becomes da.
    dh_next, dc, WhT_packed : (B,H), (B,H), of gemm.packed_shape(4H, H), scratch; may share its memory with Wh_packed
    dh : (T,B,H)
        Gradient of h[1:] from the layers above.
    x, h, c, Wx, Wh
        As in the forward.
    between : callable, optional
        Called after each time step, so that the caller can keep communication moving.
    """
    T, B, _ = gates.shape
    dh_next[:] = 0
    dc[:] = 0
    pack_transposed(WhT_packed, Wh)
    for t in range(T - 1, -1, -1):
        cell_backward(gates[t], dc, dh[t], dh_next, c[t], c[t + 1])
        if t > 0:
            packed_matmul(dh_next, gates[t], WhT_packed, False)
        if between is not None:
            between()
    da = gates.reshape(T * B, -1)
    if x is not None:
        matmul(dx.reshape(T * B, -1), da, Wx.T)
        matmul(dWx, x.reshape(T * B, -1).T, da)
    matmul(dWh, h[:T].reshape(T * B, -1).T, da)
    sum_rows(db, da)


@kernel
def cell_forward(h, c, gates, b, c_prev):
    """One time step: gates (B,4H) holds x_t @ Wx + h_{t-1} @ Wh and becomes i | f | g | o."""
    B, H = c.shape
    for n in range(B):
        row = gates[n]
        for k in range(4 * H):
            row[k] += b[k]
        i, f, g, o = row[:H], row[H : 2 * H], row[2 * H : 3 * H], row[3 * H :]
        for k in range(H):  # slices from zero let the compiler vectorise this loop
            i[k], f[k], g[k], o[k] = sigmoid(i[k]), sigmoid(f[k]), tanh(g[k]), sigmoid(o[k])
            c[n, k] = f[k] * c_prev[n, k] + i[k] * g[k]
            h[n, k] = o[k] * tanh(c[n, k])


@kernel
def cell_backward(gates, dc, dh, dh_next, c_prev, c):
    """One time step back: gates (B,4H) becomes da; dc (B,H) is dc_t from behind and becomes dc_{t-1}."""
    B, H = c.shape
    one = gates.dtype.type(1)
    for n in range(B):
        i, f, g, o = gates[n, :H], gates[n, H : 2 * H], gates[n, 2 * H : 3 * H], gates[n, 3 * H :]
        for k in range(H):
            dh_k = dh[n, k] + dh_next[n, k]
            tanh_c = tanh(c[n, k])
            dc_k = dc[n, k] + dh_k * o[k] * (one - tanh_c * tanh_c)
            i_k, f_k, g_k, o_k = i[k], f[k], g[k], o[k]
            i[k] = dc_k * g_k * i_k * (one - i_k)
            f[k] = dc_k * c_prev[n, k] * f_k * (one - f_k)
            g[k] = dc_k * i_k * (one - g_k * g_k)
            o[k] = dh_k * tanh_c * o_k * (one - o_k)
            dc[n, k] = dc_k * f_k


@kernel
def sum_rows(total, rows):
    """total (N,) = the sum of rows (M,N) over M."""
    total[:] = 0
    for m in range(rows.shape[0]):
        for k in range(rows.shape[1]):
            total[k] += rows[m, k]


def lstm_forward_reference(x, h0, c0, Wx, Wh, b):
    """The equations as they stand, any dtype, complex too. Returns h (T+1,B,H), c (T+1,B,H), gates (T,B,4H)."""
    h, c, gates = [h0], [c0], []
    for x_t in x:
        a_i, a_f, a_g, a_o = np.split(x_t @ Wx + h[-1] @ Wh + b, 4, axis=-1)
        i, f, g, o = sigmoid(a_i), sigmoid(a_f), np.tanh(a_g), sigmoid(a_o)
        c.append(f * c[-1] + i * g)
        h.append(o * np.tanh(c[-1]))
        gates.append(np.concatenate([i, f, g, o], axis=-1))
    return np.stack(h), np.stack(c), np.stack(gates)


def lstm_backward_reference(dh, gates, x, h, c, Wx, Wh):
    """The gradients as they stand. Returns dx (T,B,D), dWx, dWh, db."""
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
    return dx, dWx, dWh, db
