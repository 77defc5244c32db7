"""Precisions of a model: the type of its vectors for each `train.precision`, and what this processor makes of it."""

import numpy as np

from ..kernels.processor import BF16

DTYPES: dict[str, type[np.floating]] = {"fp32": np.float32, "fp64": np.float64, "bf16": np.float32}


def uses_bf16(precision: str) -> bool:
    """Whether products are of bfloat16: where it was asked for, and this processor is faster with it than with float32."""
    return precision == "bf16" and bool(BF16)


def described(precision: str) -> str:
    """The precision, with what multiplies bfloat16 here."""
    if precision != "bf16":
        return precision
    how = {"amx": "AMX tiles", "avx512_bf16": "AVX512_BF16"}.get(BF16)
    return f"bf16 by {how}" if how else "bf16 asked for, products in fp32: this processor is no faster with bfloat16"
