"""A model's parameters under PyTorch's names and in its shapes, and as what they are stored.

    embedding.weight     (V,E)     not with one-hot inputs, nor where frames are read
    lstm.weight_ih_l0    (4H,D)    gates i, f, g, o; D: E, of one-hot inputs V, above layer 0 H
    lstm.weight_hh_l0    (4H,H)
    lstm.bias_ih_l0, lstm.bias_hh_l0    (4H,)    the second one zeros where the model has one bias
    output.weight        (O,C)     of O classes; not where tied
    output.bias          (O,)

Instead of lstm there are forward and backward (bilm), or encoder, whose layers in the other direction end in _reverse as those
of a bidirectional nn.LSTM, which puts both side by side too (M columns). Layers without bias are (units,inputs):

    projection.weight    (P,M)     where the model has it
    bridge.weight (H,M), keys.weight (H,M), combine.weight (C,H+M), gate.weight (1,H+M)    of seq2seq
    decoder.0.weight_ih_l0 ...     of seq2seq: layers that are an nn.LSTM each, for the attention stands between them

A file holds them as float32, as bfloat16 rounded to nearest even, or as int8: of a matrix x then NAME has q, NAME.scale (rows,)
has s, float32, with x ~ s q and s = max |x| / 127 of each row; vectors stay float32.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from typing import NamedTuple, TypeAlias

import numpy as np

from ..config import ModelConfig
from ..errors import UserError, reason
from ..files import safetensors, storage
from ..files.safetensors import READS, Stored
from ..kernels.compress import round_bf16
from ..kernels.types import Array
from . import blocks
from .layout import Layout

LEVELS = 127  # of int8, on either side of zero
SCALE = ".scale"
KINDS = {"fp32": "F32", "bf16": "BF16", "int8": "I8"}  # what weights may be stored as: the name in a file's header
HEADER = 1 << 20  # bytes that a file of ours may have beside its tensors
Tensors: TypeAlias = dict[str, Array]  # name -> float32 array
Expected: TypeAlias = dict[str, tuple[str, tuple[int, ...]]]  # name -> dtype in the header, shape


class Place(NamedTuple):
    """Where a tensor of PyTorch's lies here."""

    shape: tuple[int, ...]
    tensor: str  # of Layout
    transposed: bool = False
    bias: int | None = None  # which of an LSTM's biases it is


def places(config: ModelConfig, vocabulary: int) -> dict[str, Place]:
    """PyTorch's name -> Place of a model's tensors."""
    V, E, classes, found = vocabulary, config.embedding, blocks.outputs(config, vocabulary), dict[str, Place]()
    if E and not config.features:
        found["embedding.weight"] = Place((V, E), "embedding.weight")
    for block in reversed(blocks.between(config)):
        name = block.name
        if isinstance(block, blocks.Dense):
            found[f"{name}.weight"] = Place((block.units, block.inputs), f"{name}.weight", True)
            continue
        (module, end), H = _module(name), block.units
        inputs = Place((4 * H, block.inputs), f"{name}.weight_x", True)
        found[f"{module}.weight_ih{end}"] = inputs if block.inputs else Place((4 * H, V), "embedding.weight", True)
        found[f"{module}.weight_hh{end}"] = Place((4 * H, H), f"{name}.weight_h", True)
        for number, kind in enumerate(("ih", "hh")):
            found[f"{module}.bias_{kind}{end}"] = Place((4 * H,), f"{name}.bias", bias=number)
    if not config.tied:
        found["output.weight"] = Place((classes, blocks.top(config)), "output.weight")
    return found | {"output.bias": Place((classes,), "output.bias")}


def _module(name: str) -> tuple[str, str]:
    """The nn.LSTM that an LSTM here is a layer of, one of them or a direction of one, and what its tensors' names end in."""
    module, layer, *direction = name.split(".")
    if module == "decoder":
        return name, "_l0"
    return module, f"_l{layer}" + "_reverse" * (direction == ["backward"])


def shapes(config: ModelConfig, vocabulary: int) -> dict[str, tuple[int, ...]]:
    """name -> shape of a model's tensors."""
    return {name: place.shape for name, place in places(config, vocabulary).items()}


def read_vector(layout: Layout, vector: Array) -> Tensors:
    """The tensors of the flat vector (size,) of `layout`."""
    found = Tensors()
    for name, place in places(layout.config, layout.vocabulary).items():
        tensor = layout.read(vector, place.tensor)
        if place.bias is not None:
            tensor = tensor[place.bias] if place.bias < len(tensor) else np.zeros(place.shape)
        found[name] = np.ascontiguousarray(tensor.T if place.transposed else tensor, np.float32)
    return found


def write_vector(layout: Layout, vector: Array, tensors: Mapping[str, Array]) -> None:
    """Put such tensors into the flat vector (size,)."""
    biases: dict[str, list[Array]] = {}
    for name, place in places(layout.config, layout.vocabulary).items():
        if place.bias is None:
            layout.write(vector, place.tensor, tensors[name].T if place.transposed else tensors[name])
        else:
            biases.setdefault(place.tensor, []).append(tensors[name])
    for tensor, pair in biases.items():
        layout.write(vector, tensor, np.stack(pair[: layout.config.biases]))


def quantise(x: Array) -> tuple[Array, Array]:
    """q (rows,columns) int8 and s (rows,) float32 of a float32 matrix, x ~ s q."""
    s = np.abs(x).max(axis=1, initial=0) / np.float32(LEVELS)
    q = np.rint(x / np.where(s > 0, s, 1)[:, None])
    return q.clip(-LEVELS, LEVELS).astype(np.int8), s


def encode(tensors: Mapping[str, Array], kind: str) -> dict[str, Array]:
    """name -> array as it is stored where weights are of `kind`, one of KINDS; bfloat16 as its bits, uint16."""
    found: dict[str, Array] = {}
    for name, tensor in tensors.items():
        if kind == "int8" and tensor.ndim == 2:
            found[name], found[name + SCALE] = quantise(tensor)
        elif kind == "bf16":
            found[name] = np.empty(tensor.shape, np.uint16)
            round_bf16(found[name].reshape(-1), tensor.reshape(-1))
        else:
            found[name] = tensor
    return found


def decode(stored: Stored) -> Tensors:
    """The tensors of what a file holds, in float32."""
    scaled = {name for name in stored if _has_scale(stored, name)}
    found: Tensors = {}
    for name, (dtype, array) in stored.items():
        if name.removesuffix(SCALE) in scaled and name.endswith(SCALE):
            continue
        if dtype == "BF16":
            array = (array.astype(np.uint32) << np.uint32(16)).view(np.float32)
        with np.errstate(over="ignore"):  # what is not finite then is refused by whoever asks for the tensors
            found[name] = array.astype(np.float32)
            if name in scaled:
                found[name] *= stored[name + SCALE][1][:, None]
    return found


def _has_scale(stored: Stored, name: str) -> bool:
    """Whether `name` is a matrix of int8 whose factors are there."""
    if name + SCALE not in stored:
        return False
    (dtype, array), (scale, values) = stored[name], stored[name + SCALE]
    return dtype == "I8" and array.ndim == 2 and scale == "F32" and values.shape == array.shape[:1]


def expected(config: ModelConfig, vocabulary: int, kind: str) -> Expected:
    """All that a file of a model holds."""
    found: Expected = {}
    for name, shape in shapes(config, vocabulary).items():
        found[name] = "F32" if kind == "int8" and len(shape) == 1 else KINDS[kind], shape
        if kind == "int8" and len(shape) == 2:
            found[name + SCALE] = "F32", shape[:1]
    return found


def read_model(path: str | os.PathLike[str], config: ModelConfig, vocabulary: int, kind: str, digest: str) -> Tensors:
    """The tensors of a model's file, which must hold just what `expected` says and have the sha256 `digest`.

    Sizes are compared before anything is read. Raises UserError.
    """
    wanted = expected(config, vocabulary, kind)
    size = sum(math.prod(shape) * np.dtype(READS[dtype]).itemsize for dtype, shape in wanted.values())
    try:
        storage.check_regular(path)
        found = os.stat(path).st_size
    except OSError as error:
        raise UserError(f"cannot read {path}: {reason(error)}") from None
    if not size < found <= size + HEADER:
        raise UserError(f"{path} has {found:,} bytes, the weights of its config.json take {size:,}")
    safetensors.check_memory(path)
    storage.check_file(path, digest)
    stored = safetensors.read(path)
    for name in dict.fromkeys([*wanted, *stored]):
        there = (stored[name][0], stored[name][1].shape) if name in stored else None
        if there != wanted.get(name):
            raise UserError(f"{path}: {name!r:.60} is {_text(there)} there, {_text(wanted.get(name))} by its config.json")
    tensors = decode(stored)
    check_finite(path, tensors)
    for name, place in places(config, vocabulary).items():
        if config.biases == 1 and place.bias == 1 and tensors[name].any():
            raise UserError(f"{path}: '{name}' is not zero, but by its config.json the model has one bias")
    return tensors


def check_finite(path: str | os.PathLike[str], tensors: Mapping[str, Array]) -> None:
    """Raise UserError where a value is infinite or not a number."""
    for name, tensor in tensors.items():
        if not np.isfinite(tensor).all():
            raise UserError(f"{path}: {name!r:.60} has values that are not finite")


def _text(entry: tuple[str, tuple[int, ...]] | None) -> str:
    return "not" if entry is None else f"{entry[0]}{list(entry[1])}"
