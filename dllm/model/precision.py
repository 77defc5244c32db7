"""Precisions of a model: the type of its vectors for each `train.precision`, and what this processor makes of it."""

import numpy as np

from ..kernels import int8
from ..kernels.processor import BF16
from ..kernels.types import DType

DTYPES: dict[str, type[np.floating]] = {"fp32": np.float32, "fp64": np.float64, "bf16": np.float32}


def uses_bf16(precision: str) -> bool:
    """Whether products are of bfloat16: where it was asked for, and this processor is faster with it than with float32."""
    return precision == "bf16" and bool(BF16)


def products_of(precision: str, dtype: DType) -> str:
    """What a Decoder multiplies for a `precision` and parameters of dtype: "fp32", "fp64", "bf16" or "int8"."""
    if np.dtype(dtype) == np.float64:
        return "fp64"
    return precision if uses_bf16(precision) or (precision == "int8" and int8.HOW) else "fp32"


def described(precision: str, dtype: DType = np.float32) -> str:
    """The precision, with what multiplies bfloat16 or int8 here, or why nothing does."""
    if precision in ("fp32", "fp64"):
        return precision
    if np.dtype(dtype) == np.float64:
        return f"{precision} asked for, products in fp64: the model's parameters are float64"
    how = {"bf16": {"amx": "AMX tiles", "avx512_bf16": "AVX512_BF16"}.get(BF16), "int8": int8.HOW}[precision]
    why = "is no faster with bfloat16" if precision == "bf16" else "has no instructions for int8"
    return f"{precision} by {how}" if how else f"{precision} asked for, products in fp32: this processor {why}"
