"""Precisions of a model: the type of its vectors for each `train.precision`, and whether this processor has it."""

import numpy as np

from ..errors import UserError
from ..kernels.tiles import BF16

DTYPES: dict[str, type[np.floating]] = {"fp32": np.float32, "fp64": np.float64, "bf16": np.float32}


def check_precision(precision: str) -> None:
    """Raise UserError where the processor would have to emulate it."""
    if precision == "bf16" and not BF16:
        raise UserError("this processor has no bfloat16 instructions (avx512_bf16): take precision fp32")
