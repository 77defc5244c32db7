"""Files that a model folder may hold beside its own, for other programs: dllm export --also FORMAT.

To add a format: a file beside this with `pack(Stored) -> bytes`, or -> a dict of names and bytes, and its line in FORMATS.
Nothing is imported before it is used.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import NamedTuple

from ..config import Config
from ..data.tokenizer import Tokenizer
from ..kernels.types import Array
from ..model import torch_weights
from ..model.torch_weights import Tensors


class Stored(NamedTuple):
    """A model as it is stored in its folder."""

    settings: Config
    tokenizer: Tokenizer
    arrays: dict[str, Array]  # what torch_weights.encode gives
    kind: str  # of weights, one of torch_weights.KINDS

    @property
    def tensors(self) -> Tensors:
        """What they stand for, in float32."""
        names = {"float32": "F32", "uint16": "BF16", "int8": "I8"}
        return torch_weights.decode({name: (names[array.dtype.name], array) for name, array in self.arrays.items()})


class Format(NamedTuple):
    """What writes files of a model folder."""

    module: str  # beside this
    files: tuple[str, ...]  # that it may write; where it gives bytes alone, they are the first one's


FORMATS: dict[str, Format] = {
    "keras": Format("keras_out", ("model.keras",)),
    "onnx": Format("onnx_file", ("model.onnx", "encoder.onnx", "decoder.onnx")),
}


def pack(names: Sequence[str], stored: Stored) -> dict[str, bytes]:
    """File name -> bytes, of the formats `names`. Raises UserError where a format cannot hold such a model."""
    files = dict[str, bytes]()
    for name in names:
        module = importlib.import_module(f".{FORMATS[name].module}", __package__)
        packed = module.pack(stored)
        files |= packed if isinstance(packed, dict) else {FORMATS[name].files[0]: packed}
    return files
