"""What stands around a product of its own, as of a bridge between two layers: y = tanh(x @ W), in place.

    y = tanh(a)        da = dy (1 - y^2)

Biases there are none: every layer that follows has its own.
"""

import math
from typing import no_type_check

from numba import types
from numba.extending import overload

from .activations import tanh_row
from .compile import OPTIONS, kernel
from .gemm import width, zero_panels
from .tiles import ROW
from .types import Array, DType


@kernel
def tanh_rows(y: Array) -> None:
    """y (P,rows,R) = tanh(y). Panels may lie apart; threads take slices of panels or rows."""
    for panel in range(y.shape[0]):
        _tanh_panel(y[panel])


def _tanh_panel(y: Array) -> None:
    """`tanh_rows` of one panel (rows,R)."""


@overload(_tanh_panel, jit_options=OPTIONS)
@no_type_check
def _tanh_panel_of(y):
    def float32(y):
        for n in range(y.shape[0]):
            tanh_row(y.ctypes.data + n * ROW)

    def float64(y):
        for n in range(y.shape[0]):
            for j in range(width(y)):
                y[n, j] = math.tanh(y[n, j])

    return float32 if y.dtype == types.float32 else float64


@kernel
def tanh_backward(dy: Array, y: Array) -> None:
    """dy (P,rows,R) *= 1 - y^2."""
    one = y.dtype.type(1)
    for panel in range(y.shape[0]):
        for n in range(y.shape[1]):
            for j in range(width(y)):
                dy[panel, n, j] *= one - y[panel, n, j] * y[panel, n, j]


def tanh_backward_reference(dy: Array, y: Array) -> Array:
    """The gradient as it stands, any dtype and shape; the forward is NumPy's tanh."""
    return dy * (1 - y**2)


def warm_up(dtype: DType) -> None:
    """Run every kernel of this file once, for panels of `dtype`: all are compiled then, or loaded from the cache."""
    whole = zero_panels(2, 2 * width(dtype), dtype)
    for y in (whole, whole[:, :1]):  # panels that lie together, and apart, are two types to Numba
        tanh_rows(y)
        tanh_backward(y, y)
