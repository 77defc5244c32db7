"""The HDF5 files of a corpus's tokens: a dataset `tokens`, chunked, with checksums, in the smallest dtype.

Text with labels comes in records, and has two more beside it:

ends    int64   of each record, where in the shard the next one begins
labels  int32   tags: of each token, -1 where it has none; classes: of each record; transcripts: of the first frames of each
                record the letters one by one, then -1

Recordings have `frames` (n,bands) float16 in the place of tokens.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from types import TracebackType
from typing import Any, NamedTuple

import numpy as np

from ..files import hdf5
from ..kernels.types import Array, DType
from .tokenizer import Tokenizer

FORMAT, LABELS_FORMAT = 1, 2  # of a corpus, and of one with labels
LABELLED = ("tags", "classes", "transcripts")  # contents
FRAME_DTYPE = np.dtype(np.float16)  # of numbers between about -10 and 10, to three digits
LABEL_DTYPE, END_DTYPE = np.dtype(np.int32), np.dtype(np.int64)


class Column(NamedTuple):
    """A dataset of a shard."""

    dtype: np.dtype[Any]
    per: str  # "tokens" or "records": what it has a row for
    width: int = 0  # numbers of a row; 0: one, along one axis

    def shape(self, rows: int) -> tuple[int, ...]:
        """Of so many rows."""
        return (rows, self.width) if self.width else (rows,)


def columns(content: str, dtype: DType, bands: int = 0) -> dict[str, Column]:
    """The datasets of a shard. content, dtype, bands : of a corpus, of its tokens, and of frames that stand for these"""
    found = {"frames" if bands else "tokens": Column(np.dtype(dtype), "tokens", bands)}
    if content in LABELLED:
        found["ends"] = Column(END_DTYPE, "records")
        found["labels"] = Column(LABEL_DTYPE, "records" if content == "classes" else "tokens")
    return found


def rows(part: Mapping[str, Any], column: Column) -> int:
    """How many rows a column of a shard has. part : the shard as a manifest has it"""
    count: int = part["stop"] - part["start"] if column.per == "tokens" else part["records"]
    return count


class ShardWriter:
    """Appends tokens to one shard file; `with` it, and it is whole under its name or not there.

    dtype, content, bands : as those of `columns`
    """

    def __init__(self, path: str | os.PathLike[str], dtype: DType, content: str = "text", bands: int = 0) -> None:
        self.path, self.tokens = path, 0
        self._columns = columns(content, dtype, bands)

    def __enter__(self) -> ShardWriter:
        self._whole = hdf5.write_hdf5(self.path)
        file = self._whole.__enter__()
        self._data = {
            name: file.create_dataset(
                name, column.shape(0), column.dtype, maxshape=(None, *column.shape(0)[1:]), fletcher32=True,
                chunks=column.shape((1 << 16) // max(1, column.width)),
            )
            for name, column in self._columns.items()
        }  # fmt: skip
        return self

    def append(self, tokens: Array, ends: Array | None = None, labels: Array | None = None) -> None:
        """Write tokens (n,), or frames (n,bands), behind those that are there.

        ends, labels : of records, where their first token is the 0th here
        """
        self._write(next(iter(self._columns)), tokens)
        if ends is not None and labels is not None:
            self._write("ends", ends + self.tokens)
            self._write("labels", labels)
        self.tokens += len(tokens)

    def _write(self, name: str, values: Array) -> None:
        data = self._data[name]
        start = len(data)
        data.resize(start + len(values), axis=0)
        data[start:] = values

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool | None:
        return self._whole.__exit__(kind, error, trace)


def dtype_of(tokenizer: Tokenizer) -> np.dtype[Any]:
    """What tokens, or frames, are kept as."""
    return FRAME_DTYPE if tokenizer.bands else token_dtype(tokenizer.size)


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
        values: Array = array(name, column.dtype, column.shape(rows(part, column)))[start:stop]
        return values
