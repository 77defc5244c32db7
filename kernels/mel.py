"""Log-mel frames: what a recording sounds like, 100 times a second, in bands as wide as the ear has them.

    X_t = rfft(w * x[t hop : t hop + len w])         w the periodic Hann window of 25 ms, hop 10 ms
    e_tb = log max(sum_f m_fb |X_tf|^2, floor)       floor: 80 dB below the loudest
    y_tb = (e_tb - mean) / deviation                 over all frames and bands of the recording, so that loudness says nothing

m are triangles between points that are equally far apart in mel(f) = 2595 log10(1 + f / 700) (O'Shaughnessy 1987, HTK).
Bands are not brought to a mean of their own (Viikki and Laurila 1998): of a single word that would take away the vowel, too.
"""

import functools
import math

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from .types import Array

WINDOW, HOP = 0.025, 0.010  # seconds
RANGE = 1e-8  # of the loudest band's power: what is below counts as that
LEAST_DEVIATION = 1e-3  # nats; of a recording in which nothing happens
BLOCK = 1 << 12  # frames at a time


def mel(frequency: Array | float) -> Array:
    """The mel scale of frequencies in Hz."""
    return 2595 * np.log10(1 + np.asarray(frequency) / 700)


@functools.lru_cache
def mel_filters(rate: int, size: int, bands: int) -> Array:
    """Weights (size/2 + 1, bands) float64 of the frequencies of an FFT of `size` samples, `rate` of them a second."""
    points = 700 * (10 ** (np.linspace(0, mel(rate / 2), bands + 2) / 2595) - 1)
    low, middle, high = points[:-2], points[1:-1], points[2:]
    f = (np.arange(size // 2 + 1) * (rate / size))[:, None]
    return np.maximum(0, np.minimum((f - low) / (middle - low), (high - f) / (high - middle)))


def log_mel(samples: Array, rate: int, bands: int) -> Array:
    """Frames (T, bands) float32 of samples (n,), T = 1 + max(0, (n - window) // hop); a shorter recording ends in silence."""
    window, hop = round(WINDOW * rate), round(HOP * rate)
    size = 2 << math.ceil(math.log2(window))  # twice the least: the lowest bands are narrower than a line of that
    padded = np.pad(np.asarray(samples, np.float64), (0, max(0, window - len(samples))))
    parts = sliding_window_view(padded, window)[::hop]
    w, m = np.hanning(window + 1)[:-1], mel_filters(rate, size, bands)
    blocks = (parts[start : start + BLOCK] for start in range(0, len(parts), BLOCK))
    power = np.concatenate([np.square(np.abs(np.fft.rfft(part * w, size))) @ m for part in blocks])
    e = np.log(np.maximum(power, RANGE * power.max() + np.finfo(np.float64).tiny))
    return ((e - e.mean()) / max(e.std(), LEAST_DEVIATION)).astype(np.float32)
