"""The HDF5 files of a corpus's tokens: one dataset, `tokens`, chunked, with checksums, in the smallest dtype."""

from __future__ import annotations

import os
from types import TracebackType
from typing import Any

import numpy as np

from ..files import hdf5
from ..kernels.types import Array, DType

FORMAT = 1  # of a corpus


class ShardWriter:
    """Appends tokens to one shard file; `with` it, and it is whole under its name or not there."""

    def __init__(self, path: str | os.PathLike[str], dtype: DType) -> None:
        self.path, self.dtype, self.tokens = path, np.dtype(dtype), 0

    def __enter__(self) -> ShardWriter:
        self._whole = hdf5.write_hdf5(self.path)
        options = {"chunks": (1 << 16,), "maxshape": (None,), "fletcher32": True}
        self._data = self._whole.__enter__().create_dataset("tokens", (0,), self.dtype, **options)
        return self

    def append(self, tokens: Array) -> None:
        """Write tokens (n,) behind those that are there."""
        start, self.tokens = self.tokens, self.tokens + len(tokens)
        self._data.resize((self.tokens,))
        self._data[start:] = tokens

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool | None:
        return self._whole.__exit__(kind, error, trace)


def token_dtype(vocabulary: int) -> np.dtype[Any]:
    """The smallest unsigned dtype that holds the vocabulary."""
    kinds: list[np.dtype[Any]] = [np.dtype(name) for name in ("u1", "u2", "u4")]
    return next(kind for kind in kinds if vocabulary <= 1 << 8 * kind.itemsize)


def read_shard(path: str | os.PathLike[str], dtype: DType, length: int, start: int, stop: int) -> Array:
    """Tokens [start, stop) of a shard that holds `length`. Raises UserError."""
    with hdf5.open_arrays(path, ["tokens"]) as array:
        tokens: Array = array("tokens", dtype, (length,))[start:stop]
        return tokens
