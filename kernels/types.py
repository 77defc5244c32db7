"""Types of arrays, for annotations: what an array holds and its shape stand in the docstring of whoever takes it."""

from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

Array: TypeAlias = npt.NDArray[Any]
Bytes: TypeAlias = npt.NDArray[np.uint8]
DType: TypeAlias = np.dtype[Any] | type[np.generic]
Int: TypeAlias = int | np.integer[Any]  # Python's or NumPy's
Real: TypeAlias = float | np.floating[Any]
