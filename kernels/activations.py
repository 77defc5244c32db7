"""exp, tanh and the logistic sigma inside compiled loops.

In float64 they are the C library's. In float32 they are polynomials that the compiler vectorises, a tenth of the time:

- exp(x) = 2^n e^r, n = round(x / ln 2), r = x - n ln 2 in two parts (Cody and Waite), e^r its Taylor polynomial of
  degree 7. Relative error at most 2e-7 for -87 <= x <= 88; x is clamped to that range.
- tanh(x) = x P(x^2) / Q(x^2), degrees 13 / 6 (the coefficients of Eigen's `ptanh_float`), constant beyond |x| = 7.9.
  Absolute error at most 4e-7.
- sigma(x) = (1 + tanh(x / 2)) / 2, a form that is analytic, so complex-step differentiation holds. Absolute error 2e-7.

NaN goes through all of them. Called from plain Python they are NumPy's, which is what the tests compare with.
"""

import math

import numpy as np
from numba import types
from numba.extending import overload

# No reordering here: it would undo the two-part reduction.
_OPTIONS = {"fastmath": {"contract", "nsz", "arcp"}, "error_model": "numpy", "boundscheck": False, "nogil": True}
_LOG2E = np.float32(1.4426950408889634)
_LN2_HIGH = np.float32(0.693359375)
_LN2_LOW = np.float32(-2.12194440e-4)
_TAYLOR = tuple(np.float32(1 / math.factorial(k)) for k in range(8))


def exp(x):
    """e^x of one float32 or float64."""
    return np.exp(x)


def tanh(x):
    """Hyperbolic tangent of one float32 or float64."""
    return np.tanh(x)


def sigmoid(x):
    """The logistic function 1 / (1 + e^-x) of one float32 or float64."""
    return 0.5 + 0.5 * np.tanh(0.5 * x)


@overload(exp, jit_options=_OPTIONS)
def _exp(x):
    if x != types.float32:
        return lambda x: math.exp(x)

    def polynomial(x):
        low, high = np.float32(-87.0), np.float32(88.0)
        x = low if x < low else x
        x = high if x > high else x
        n = np.rint(x * _LOG2E)
        r = (x - n * _LN2_HIGH) - n * _LN2_LOW
        p = _TAYLOR[7]
        p = p * r + _TAYLOR[6]
        p = p * r + _TAYLOR[5]
        p = p * r + _TAYLOR[4]
        p = p * r + _TAYLOR[3]
        p = p * r + _TAYLOR[2]
        p = p * r + _TAYLOR[1]
        p = p * r + _TAYLOR[0]
        return p * np.int32((np.int32(n) + np.int32(127)) << np.int32(23)).view(np.float32)

    return polynomial


@overload(tanh, jit_options=_OPTIONS)
def _tanh(x):
    if x != types.float32:
        return lambda x: math.tanh(x)

    def rational(x):
        low, high = np.float32(-7.90531110763549805), np.float32(7.90531110763549805)
        x = low if x < low else x
        x = high if x > high else x
        s = x * x
        p = np.float32(-2.76076847742355e-16)
        p = p * s + np.float32(2.00018790482477e-13)
        p = p * s + np.float32(-8.60467152213735e-11)
        p = p * s + np.float32(5.12229709037114e-08)
        p = p * s + np.float32(1.48572235717979e-05)
        p = p * s + np.float32(6.37261928875436e-04)
        p = p * s + np.float32(4.89352455891786e-03)
        q = np.float32(1.19825839466702e-06)
        q = q * s + np.float32(1.18534705686654e-04)
        q = q * s + np.float32(2.26843463243900e-03)
        q = q * s + np.float32(4.89352518554385e-03)
        return x * p / q

    return rational


@overload(sigmoid, jit_options=_OPTIONS)
def _sigmoid(x):
    half = np.float32(0.5) if x == types.float32 else 0.5
    return lambda x: half + half * tanh(half * x)
