"""The HDF5 files of a corpus's tokens: a dataset `tokens`, chunked, with checksums, in the smallest dtype.

Text with labels comes in records, and has two more beside it:

ends    int64   of each record, where in the shard the next one begins
labels  int32   tags: of each token, -1 where it has none; classes: of each record
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from types import TracebackType
from typing import Any, NamedTuple

import numpy as np

from ..files import hdf5
from ..kernels.types import Array, DType

FORMAT, LABELS_FORMAT = 1, 2  # of a corpus, and of one with labels
LABELLED = ("tags", "classes")  # contents
MOST_LABELS = 1 << 15
LABEL_DTYPE, END_DTYPE = np.dtype(np.int32), np.dtype(np.int64)


class Column(NamedTuple):
    """A dataset of a shard."""

    dtype: np.dtype[Any]
    per: str  # "tokens" or "records": what it has a row for


def columns(content: str, dtype: DType) -> dict[str, Column]:
    """The datasets of a shard. content, dtype : of a corpus, and of its tokens"""
    found = {"tokens": Column(np.dtype(dtype), "tokens")}
    if content in LABELLED:
        found["ends"] = Column(END_DTYPE, "records")
        found["labels"] = Column(LABEL_DTYPE, "tokens" if content == "tags" else "records")
    return found


def rows(part: Mapping[str, Any], column: Column) -> int:
    """How many rows a column of a shard has. part : the shard as a manifest has it"""
    count: int = part["stop"] - part["start"] if column.per == "tokens" else part["records"]
    return count


class ShardWriter:
    """Appends tokens to one shard file; `with` it, and it is whole under its name or not there. content : of the corpus"""

    def __init__(self, path: str | os.PathLike[str], dtype: DType, content: str = "text") -> None:
        self.path, self.tokens = path, 0
        self._columns = columns(content, dtype)

    def __enter__(self) -> ShardWriter:
        self._whole = hdf5.write_hdf5(self.path)
        options, file = {"chunks": (1 << 16,), "maxshape": (None,), "fletcher32": True}, self._whole.__enter__()
        self._data = {name: file.create_dataset(name, (0,), column.dtype, **options) for name, column in self._columns.items()}
        return self

    def append(self, tokens: Array, ends: Array | None = None, labels: Array | None = None) -> None:
        """Write tokens (n,) behind those that are there. ends, labels : of records, where their first token is the 0th here"""
        self._write("tokens", tokens)
        if ends is not None and labels is not None:
            self._write("ends", ends + self.tokens)
            self._write("labels", labels)
        self.tokens += len(tokens)

    def _write(self, name: str, values: Array) -> None:
        data = self._data[name]
        start = len(data)
        data.resize((start + len(values),))
        data[start:] = values

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool | None:
        return self._whole.__exit__(kind, error, trace)


def token_dtype(vocabulary: int) -> np.dtype[Any]:
    """The smallest unsigned dtype that holds the vocabulary."""
    kinds: list[np.dtype[Any]] = [np.dtype(name) for name in ("u1", "u2", "u4")]
    return next(kind for kind in kinds if vocabulary <= 1 << 8 * kind.itemsize)


def read_shard(
    path: str | os.PathLike[str], table: Mapping[str, Column], part: Mapping[str, Any], name: str, start: int, stop: int
) -> Array:
    """Rows [start, stop) of a dataset of a shard. Raises UserError.

    Parameters
    ----------
    path : path
    table : dict
        The datasets that the file must have: `columns` of its corpus.
    part : dict
        The shard as the manifest has it.
    name : str
    start, stop : int
    """
    column = table[name]
    with hdf5.open_arrays(path, table) as array:
        values: Array = array(name, column.dtype, (rows(part, column),))[start:stop]
        return values
