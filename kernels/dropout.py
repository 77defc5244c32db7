r"""Inverted dropout with masks that nobody stores: each is computed where it is needed, from a counter.

    y = x * m / (1 - p),  m = 1 with probability 1 - p;   dx = dy * m / (1 - p): the same function with the same counter

The random word of element (t, lane, k) of a layer is Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as
1, 2, 3", SC11) at counter (position, lane, step, layer), key seed. It depends on the lane, not on the rank that computes it.
One call makes four words; word w serves the w-th quarter of the row, which keeps every loop contiguous.
"""

import numpy as np

from .compile import kernel

_LOW = np.uint64(0xFFFFFFFF)
_HALF = np.uint64(32)
_M0, _M1 = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
_W0, _W1 = np.uint64(0x9E3779B9), np.uint64(0xBB67AE85)


@kernel
def philox(c0, c1, c2, c3, k0, k1):
    """Philox4x32-10: four 32-bit words, each held in an uint64, from four counter and two key words."""
    for _ in range(10):
        p0, p1 = c0 * _M0, c2 * _M1
        c0, c1, c2, c3 = (p1 >> _HALF) ^ c1 ^ k0, p1 & _LOW, (p0 >> _HALF) ^ c3 ^ k1, p0 & _LOW
        k0, k1 = (k0 + _W0) & _LOW, (k1 + _W1) & _LOW
    return c0, c1, c2, c3


@kernel
def dropout(y, x, p, lanes, seed, step, layer):
    """y (T,B,H) = x (T,B,H) * mask / (1 - p). lanes (B,) int64 global lane numbers; seed, step, layer not negative.

    The gradient is the same call on dy. p is kept to 2^-32; p = 0 copies.
    """
    T, B, H = x.shape
    quarter = (H + 3) // 4
    threshold = np.uint64(p * 4294967296.0)
    keep = x.dtype.type(1 / (1 - p))
    zero = x.dtype.type(0)
    k0, k1 = np.uint64(seed) & _LOW, np.uint64(seed) >> _HALF
    c2 = np.uint64(step) & _LOW
    c3 = np.uint64(layer) | ((np.uint64(step) >> _HALF) << np.uint64(8))
    for t in range(T):
        for n in range(B):
            lane = np.uint64(lanes[n])
            for q in range(quarter):
                r0, r1, r2, r3 = philox(np.uint64(t * quarter + q), lane, c2, c3, k0, k1)
                y[t, n, q] = x[t, n, q] * (keep if r0 >= threshold else zero)
                if q + quarter < H:
                    y[t, n, q + quarter] = x[t, n, q + quarter] * (keep if r1 >= threshold else zero)
                if q + 2 * quarter < H:
                    y[t, n, q + 2 * quarter] = x[t, n, q + 2 * quarter] * (keep if r2 >= threshold else zero)
                if q + 3 * quarter < H:
                    y[t, n, q + 3 * quarter] = x[t, n, q + 3 * quarter] * (keep if r3 >= threshold else zero)


def dropout_reference(x, p, lanes, seed, step, layer):
    """The same, an element at a time in Python's own integers."""
    T, B, H = x.shape
    y, quarter = np.zeros_like(x), (H + 3) // 4
    for t in range(T):
        for n in range(B):
            for k in range(H):
                counter = [t * quarter + k % quarter, int(lanes[n]), step & 0xFFFFFFFF, layer | (step >> 32) << 8]
                word = philox_reference(counter, [seed & 0xFFFFFFFF, seed >> 32])[k // quarter]
                y[t, n, k] = x[t, n, k] / (1 - p) if word >= int(p * 2**32) else 0
    return y


def philox_reference(counter, key):
    """Philox4x32-10 by Python integers. counter: four words, key: two words. Returns four words."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        p0, p1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = p1 >> 32 ^ c1 ^ k0, p1 & 0xFFFFFFFF, p0 >> 32 ^ c3 ^ k1, p0 & 0xFFFFFFFF
        k0, k1 = k0 + 0x9E3779B9 & 0xFFFFFFFF, k1 + 0xBB67AE85 & 0xFFFFFFFF
    return c0, c1, c2, c3
