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


class Stored(NamedTuple):
    """A model as it is stored in its folder."""

    settings: Config
    tokenizer: Tokenizer
    arrays: dict[str, Array]  # what torch_weights.encode gives
    kind: str  # of weights, one of torch_weights.KINDS


class Format(NamedTuple):
    """A file of a model folder, or what gives several, by their names."""

    file: str
    module: str  # beside this


FORMATS: dict[str, Format] = {
    "keras": Format("model.keras", "keras_out"),
    "onnx": Format("model.onnx", "onnx_file"),
}


def pack(names: Sequence[str], stored: Stored) -> dict[str, bytes]:
    """File name -> bytes, of the formats `names`. Raises UserError where a format cannot hold such a model."""
    files = dict[str, bytes]()
    for name in names:
        module = importlib.import_module(f".{FORMATS[name].module}", __package__)
        packed = module.pack(stored)
        files |= packed if isinstance(packed, dict) else {FORMATS[name].file: packed}
    return files
