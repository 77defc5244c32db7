"""Samples of sound as 256 levels that lie closer together where it is quiet, and back: mu-law, mu = 255.

    F(x) = sgn(x) ln(1 + mu |x|) / ln(1 + mu)        level = floor((F(x) + 1) mu / 2 + 1/2)
    x = sgn(F) ((1 + mu)^|F| - 1) / mu               F = 2 level / mu - 1

The continuous formula of ITU-T G.711, which telephones approximate; levels as in van den Oord et al. 2016, "WaveNet".
"""

import numpy as np

from .types import Array

MU = 255
LEVELS = MU + 1


def mulaw_levels(samples: Array) -> Array:
    """Levels (n,) uint8 of samples (n,) in [-1, 1]; what is beyond counts as the end of that."""
    x = np.clip(samples, -1, 1)
    F = np.sign(x) * np.log1p(MU * np.abs(x)) / np.log1p(MU)
    return np.floor((F + 1) * (MU / 2) + 0.5).astype(np.uint8)


def mulaw_samples(levels: Array) -> Array:
    """Samples (n,) float64 in [-1, 1] of levels (n,), whole numbers in [0, 256)."""
    F = 2 * np.asarray(levels, np.float64) / MU - 1
    return np.sign(F) * np.expm1(np.abs(F) * np.log1p(MU)) / MU
