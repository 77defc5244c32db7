r"""Inverted dropout with masks that nobody stores: each is computed where it is needed, from a counter.

    y = x * m / (1 - p),  m = 1 with probability 1 - p;   dx = dy * m / (1 - p): the same function with the same counter

The random word of element (t, lane, k) of a layer is Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as
1, 2, 3", SC11) at counter (position, lane, step, layer), key seed. It depends on the lane, not on the rank that computes it.
One call makes four words: of each 64 units, word w serves the w-th 16, which keeps every loop within a panel (gemm.py).
"""

from collections.abc import Sequence

import numpy as np

from .compile import kernel
from .gemm import width
from .types import Array

_LOW = np.uint64(0xFFFFFFFF)
_HALF = np.uint64(32)
_M0, _M1 = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
_W0, _W1 = np.uint64(0x9E3779B9), np.uint64(0xBB67AE85)


@kernel
def philox(
    c0: np.uint64, c1: np.uint64, c2: np.uint64, c3: np.uint64, k0: np.uint64, k1: np.uint64
) -> tuple[np.uint64, np.uint64, np.uint64, np.uint64]:
    """Philox4x32-10: four 32-bit words, each held in an uint64, from four counter and two key words."""
    for _ in range(10):
        p0, p1 = c0 * _M0, c2 * _M1
        c0, c1, c2, c3 = (p1 >> _HALF) ^ c1 ^ k0, p1 & _LOW, (p0 >> _HALF) ^ c3 ^ k1, p0 & _LOW
        k0, k1 = (k0 + _W0) & _LOW, (k1 + _W1) & _LOW
    return c0, c1, c2, c3


@kernel
def philox_of_sixteen(words: Array, k0: np.uint64, k1: np.uint64) -> None:
    """The same of 16 counters, words (4,16), which become the random words: vectors, round by round."""
    for _ in range(10):
        for j in range(16):
            p0, p1 = (words[0, j] & _LOW) * _M0, (words[2, j] & _LOW) * _M1
            words[0, j], words[2, j] = (p1 >> _HALF) ^ words[1, j] ^ k0, (p0 >> _HALF) ^ words[3, j] ^ k1
            words[1, j], words[3, j] = p1 & _LOW, p0 & _LOW
        k0, k1 = (k0 + _W0) & _LOW, (k1 + _W1) & _LOW


@kernel
def dropout(
    y: Array, x: Array, x_row: int, begin: int, end: int, p: float, lanes: Array, seed: int, step: int, layer: int
) -> None:
    """y = x * mask / (1 - p), time steps begin to end - 1: of B rows each of y (H/R,:,R), and of x (H/R,:,R) from x_row on.

    lanes (B,) int64 are global lane numbers; seed, step, layer are not negative. The gradient is the same call on dy.
    p is kept to 2^-32; p = 0 copies. R divides 16.
    """
    B, R = lanes.shape[0], width(x)
    parts = 16 // R  # panels of a block
    groups = (x.shape[0] + 4 * parts - 1) // (4 * parts)
    threshold = np.uint64(p * 4294967296.0)
    keep = x.dtype.type(1 / (1 - p))
    zero = x.dtype.type(0)
    k0, k1 = np.uint64(seed) & _LOW, np.uint64(seed) >> _HALF
    c2 = np.uint64(step) & _LOW
    c3 = np.uint64(layer) | ((np.uint64(step) >> _HALF) << np.uint64(8))
    words = np.empty((4, 16), np.uint64)
    for t in range(begin, end):
        for n in range(B):
            lane, row = np.uint64(lanes[n]), t * B + n
            for group in range(groups):
                for j in range(16):
                    words[0, j], words[1, j], words[2, j], words[3, j] = np.uint64((t * groups + group) * 16 + j), lane, c2, c3
                philox_of_sixteen(words, k0, k1)
                for part in range(min(4 * parts, x.shape[0] - 4 * parts * group)):
                    panel, block, first = 4 * parts * group + part, part // parts, part % parts * R
                    for j in range(R):
                        y[panel, row, j] = x[panel, x_row + row, j] * (keep if words[block, first + j] >= threshold else zero)


def dropout_reference(x: Array, p: float, lanes: Array, seed: int, step: int, layer: int) -> Array:
    """The same for x (T,B,H), an element at a time in Python's own integers."""
    T, B, H = x.shape
    y, groups = np.zeros_like(x), (H + 63) // 64
    for t in range(T):
        for n in range(B):
            for k in range(H):
                counter = [(t * groups + k // 64) * 16 + k % 16, int(lanes[n]), step & 0xFFFFFFFF, layer | (step >> 32) << 8]
                word = philox_reference(counter, [seed & 0xFFFFFFFF, seed >> 32])[k % 64 // 16]
                y[t, n, k] = x[t, n, k] / (1 - p) if word >= int(p * 2**32) else 0
    return y


def philox_reference(counter: Sequence[int], key: Sequence[int]) -> tuple[int, int, int, int]:
    """Philox4x32-10 by Python integers. counter: four words, key: two words. Returns four words."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        p0, p1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = p1 >> 32 ^ c1 ^ k0, p1 & 0xFFFFFFFF, p0 >> 32 ^ c3 ^ k1, p0 & 0xFFFFFFFF
        k0, k1 = k0 + 0x9E3779B9 & 0xFFFFFFFF, k1 + 0xBB67AE85 & 0xFFFFFFFF
    return c0, c1, c2, c3
