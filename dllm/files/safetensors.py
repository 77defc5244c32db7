"""The one door to safetensors files: bytes to arrays and back. Nothing in a file is believed before it was checked.

A file holds name -> array with a header that says each one's dtype and shape. bfloat16, which NumPy does not have, is handed
on as its bits, uint16.
"""

from __future__ import annotations

import os
import pathlib
from collections.abc import Mapping
from typing import Any, TypeAlias

import numpy as np
from safetensors import SafetensorError, TensorSpec, deserialize, serialize

from ..errors import UserError, reason
from ..kernels.types import Array
from . import storage

READS: dict[str, type[np.generic]] = {  # the name in a header -> dtype here
    "F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": np.uint16, "I8": np.int8,
}  # fmt: skip
WRITES = {"float32": "float32", "uint16": "bfloat16", "int8": "int8"}
Stored: TypeAlias = dict[str, tuple[str, Array]]  # name -> dtype in the header, array as it is stored


def pack(arrays: Mapping[str, Array]) -> bytes:
    """The bytes of a safetensors file of float32, int8 and uint16 arrays; uint16 are bits of bfloat16."""
    specs = {
        name: TensorSpec(dtype=WRITES[array.dtype.name], shape=array.shape, data_ptr=array.ctypes.data, data_len=array.nbytes)
        for name, array in arrays.items()
    }
    data: bytes = serialize(specs, {"format": "pt"})
    return data


def unpack(data: bytes, path: str | os.PathLike[str]) -> Stored:
    """What the bytes of a safetensors file hold. Raises UserError that names `path`."""
    found: Stored = {}
    try:
        items: list[tuple[str, dict[str, Any]]] = deserialize(data)  # type: ignore[no-untyped-call]
    except SafetensorError as error:
        raise UserError(f"{path} is no whole safetensors file: {str(error).rpartition(': ')[2]:.200}") from None
    for name, item in items:
        if item["dtype"] not in READS:
            raise UserError(f"{path}: {name!r:.60} is of {item['dtype']}; weights are of {', '.join(READS)}")
        found[name] = item["dtype"], np.frombuffer(item["data"], READS[item["dtype"]]).reshape(item["shape"])
    return found


def read(path: str | os.PathLike[str]) -> Stored:
    """What a file holds. Raises UserError."""
    return unpack(read_bytes(path), path)


def read_bytes(path: str | os.PathLike[str]) -> bytes:
    """All of a file that fits into memory. Raises UserError."""
    try:
        storage.check_regular(path)
        check_memory(path)
        return pathlib.Path(path).read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {path}: {reason(error)}") from None
    except MemoryError:
        raise UserError(f"{path} does not fit into memory") from None


def check_memory(path: str | os.PathLike[str]) -> None:
    """Raise UserError where a file is larger than this machine's memory: of a sparse one that costs its maker nothing."""
    size, memory = os.stat(path).st_size, os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if size > memory:
        raise UserError(f"{path} has {size >> 20:,} MB; this machine's memory has {memory >> 20:,}")
