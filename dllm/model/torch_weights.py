"""A model's parameters under PyTorch's names and in its shapes, and the safetensors files that hold them: their only door.

    embedding.weight     (V,E)     not with one-hot inputs
    lstm.weight_ih_l0    (4H,D)    gates i, f, g, o; D: E, of one-hot inputs V, above layer 0 H
    lstm.weight_hh_l0    (4H,H)
    lstm.bias_ih_l0, lstm.bias_hh_l0    (4H,)    the second one zeros where the model has one bias
    output.weight        (V,H)     not where tied
    output.bias          (V,)

A file holds them as float32, as bfloat16 rounded to nearest even, or as int8: of a matrix x then NAME has q, NAME.scale (rows,)
has s, float32, with x ~ s q and s = max |x| / 127 of each row; vectors stay float32.
"""

import math
import os
import pathlib

import numpy as np
from safetensors import SafetensorError, TensorSpec, deserialize, serialize

from ..errors import UserError
from ..files import storage
from ..kernels.compress import round_bf16

LEVELS = 127  # of int8, on either side of zero
SCALE = ".scale"
KINDS = {"fp32": "F32", "bf16": "BF16", "int8": "I8"}  # what weights may be stored as: the name in a file's header
READS = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": np.uint16, "I8": np.int8}  # BF16: its bits
WRITES = {"float32": "float32", "uint16": "bfloat16", "int8": "int8"}
HEADER = 1 << 20  # bytes that a file of ours may have beside its tensors


def shapes(config, vocabulary):
    """name -> shape of a model's tensors."""
    V, E, H = vocabulary, config.embedding, config.hidden
    found = {"embedding.weight": (V, E)} if E else {}
    for layer in range(config.layers):
        found[f"lstm.weight_ih_l{layer}"] = 4 * H, H if layer else E or V
        found[f"lstm.weight_hh_l{layer}"] = 4 * H, H
        found[f"lstm.bias_ih_l{layer}"] = found[f"lstm.bias_hh_l{layer}"] = (4 * H,)
    if not config.tied:
        found["output.weight"] = V, H
    return found | {"output.bias": (V,)}


def _ours(name, config):
    """The Layout's name for a tensor other than an LSTM's bias, and whether it is transposed there."""
    if not name.startswith("lstm."):
        return name, False
    kind, _, layer = name.removeprefix("lstm.weight_").partition("_l")
    if kind == "ih" and layer == "0" and not config.embedding:
        return "embedding.weight", True
    return f"lstm.{layer}.weight_{'x' if kind == 'ih' else 'h'}", True


def read_vector(layout, vector):
    """name -> float32 array of the flat vector (size,) of `layout`."""
    config, found = layout.config, {}
    for name in shapes(config, layout.tensors["output.bias"].shape[0]):
        if name.startswith("lstm.bias_"):
            bias = layout.read(vector, f"lstm.{name.rpartition('_l')[2]}.bias")
            both = bias if config.biases == 2 else [bias[0], np.zeros_like(bias[0])]
            tensor = both[int("_hh_" in name)]
        else:
            ours, transposed = _ours(name, config)
            tensor = layout.read(vector, ours)
            tensor = tensor.T if transposed else tensor
        found[name] = np.ascontiguousarray(tensor, np.float32)
    return found


def write_vector(layout, vector, tensors):
    """Put such tensors into the flat vector (size,)."""
    config = layout.config
    for name, tensor in tensors.items():
        if not name.startswith("lstm.bias_"):
            ours, transposed = _ours(name, config)
            layout.write(vector, ours, tensor.T if transposed else tensor)
    for layer in range(config.layers):
        pair = [tensors[f"lstm.bias_{kind}_l{layer}"] for kind in ("ih", "hh")]
        layout.write(vector, f"lstm.{layer}.bias", np.stack(pair[: config.biases]))


def quantise(x):
    """q (rows,columns) int8 and s (rows,) float32 of a float32 matrix, x ~ s q."""
    s = np.abs(x).max(axis=1, initial=0) / np.float32(LEVELS)
    q = np.rint(x / np.where(s > 0, s, 1)[:, None])
    return q.clip(-LEVELS, LEVELS).astype(np.int8), s


def encode(tensors, kind):
    """name -> array as it is stored; bfloat16 as its bits, uint16."""
    found = {}
    for name, tensor in tensors.items():
        if kind == "int8" and tensor.ndim == 2:
            found[name], found[name + SCALE] = quantise(tensor)
        elif kind == "bf16":
            found[name] = np.empty(tensor.shape, np.uint16)
            round_bf16(found[name].reshape(-1), tensor.reshape(-1))
        else:
            found[name] = tensor
    return found


def decode(stored):
    """name -> float32 array of name -> (dtype in the header, array as it is stored)."""
    scaled = {name for name in stored if _has_scale(stored, name)}
    found = {}
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


def _has_scale(stored, name):
    dtype, array = stored[name]
    scale, values = stored.get(name + SCALE, (None, None))
    return dtype == "I8" and array.ndim == 2 and scale == "F32" and values.shape == array.shape[:1]


def expected(config, vocabulary, kind):
    """name -> (dtype in the header, shape) of all that a file of a model holds."""
    found = {}
    for name, shape in shapes(config, vocabulary).items():
        found[name] = "F32" if kind == "int8" and len(shape) == 1 else KINDS[kind], shape
        if kind == "int8" and len(shape) == 2:
            found[name + SCALE] = "F32", shape[:1]
    return found


def pack(arrays):
    """The bytes of a safetensors file of what `encode` made."""
    specs = {
        name: TensorSpec(dtype=WRITES[array.dtype.name], shape=array.shape, data_ptr=array.ctypes.data, data_len=array.nbytes)
        for name, array in arrays.items()
    }
    return serialize(specs, {"format": "pt"})


def unpack(data, path):
    """name -> (dtype in the header, array) of the bytes of a safetensors file. Raises UserError that names `path`."""
    found = {}
    try:
        items = deserialize(data)
    except SafetensorError as error:
        raise UserError(f"{path} is no whole safetensors file: {str(error).rpartition(': ')[2]:.200}") from None
    for name, item in items:
        if item["dtype"] not in READS:
            raise UserError(f"{path}: {name!r:.60} is of {item['dtype']}; weights are of {', '.join(READS)}")
        found[name] = item["dtype"], np.frombuffer(item["data"], READS[item["dtype"]]).reshape(item["shape"])
    return found


def read(path):
    """The same of a file."""
    try:
        storage.check_regular(path)
        check_memory(path)
        return unpack(pathlib.Path(path).read_bytes(), path)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    except MemoryError:
        raise UserError(f"{path} does not fit into memory") from None


def check_memory(path):
    """Raise UserError where a file is larger than this machine's memory: of a sparse one that costs its maker nothing."""
    size, memory = os.stat(path).st_size, os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if size > memory:
        raise UserError(f"{path} has {size >> 20:,} MB; this machine's memory has {memory >> 20:,}")


def read_model(path, config, vocabulary, kind, digest):
    """name -> float32 array of a model's file, which must hold just what `expected` says and have the sha256 `digest`.

    Sizes are compared before anything is read. Raises UserError.
    """
    wanted = expected(config, vocabulary, kind)
    size = sum(math.prod(shape) * np.dtype(READS[dtype]).itemsize for dtype, shape in wanted.values())
    try:
        storage.check_regular(path)
        found = os.stat(path).st_size
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    if not size < found <= size + HEADER:
        raise UserError(f"{path} has {found:,} bytes, the weights of its config.json take {size:,}")
    check_memory(path)
    storage.check_file(path, digest)
    stored = read(path)
    for name in dict.fromkeys([*wanted, *stored]):
        there = (stored[name][0], stored[name][1].shape) if name in stored else None
        if there != wanted.get(name):
            raise UserError(f"{path}: {name!r:.60} is {_text(there)} there, {_text(wanted.get(name))} by its config.json")
    tensors = decode(stored)
    check_finite(path, tensors)
    for name, tensor in tensors.items():
        if config.biases == 1 and name.startswith("lstm.bias_hh_") and tensor.any():
            raise UserError(f"{path}: '{name}' is not zero, but by its config.json the model has one bias")
    return tensors


def check_finite(path, tensors):
    """Raise UserError where a value is infinite or not a number."""
    for name, tensor in tensors.items():
        if not np.isfinite(tensor).all():
            raise UserError(f"{path}: {name!r:.60} has values that are not finite")


def _text(entry):
    return "not" if entry is None else f"{entry[0]}{list(entry[1])}"
