"""Streams of bytes as text: unpacked, and records as their texts.

A stream is unpacked as long as it begins as something of PACKED does, whatever its name. With a field it is made of records, of
the first kind of RECORDS as which it begins, and the text of a record is a document; without one its lines are.

To add a packing: what it begins with and a function that opens a stream, in PACKED. To add a kind of records: the same with a
function that gives their texts, in RECORDS.
"""

from __future__ import annotations

import bz2
import contextlib
import functools
import gzip
import io
import itertools
import lzma
import pathlib
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from typing import IO, Any, TypeAlias

import msgspec

Stream: TypeAlias = IO[bytes]

BLOCK = 1 << 20  # bytes that are read at a time
LONGEST_RECORD = 1 << 28  # bytes of a line that is read whole: of JSON, or where lines are dealt out
MOST_LAYERS = 4  # of packings in each other
ROWS = 256  # of a Parquet file that are in memory at a time


class TextError(Exception):
    """What is wrong with a stream, for a message that names it."""


def is_plain(head: bytes) -> bool:
    """Whether what begins with `head` is text as it is, where there are no records."""
    return _packing(head) is None and not head.startswith(PARQUET)


def texts(stream: Stream, field: str, folder: pathlib.Path, one_by_one: bool) -> Iterator[bytes]:
    """The text of a stream. Raises TextError, and what libraries raise.

    field : of records; "": there are none
    folder : where temporary files may be
    one_by_one : give documents or lines one at a time; else blocks will do
    """
    stream, head = _unpacked(stream)
    if field:
        read = next(read for magic, read in RECORDS if head.startswith(magic))
        return (text if text.endswith(b"\n") else text + b"\n" for text in read(stream, field, folder))
    if head.startswith(PARQUET):
        raise TextError("it is a Parquet file: say by --field which column is the text")
    return _lines(stream) if one_by_one else iter(functools.partial(stream.read, BLOCK), b"")


class _Begun(io.RawIOBase):
    """A stream of which the first bytes have been read: they come once more."""

    def __init__(self, head: bytes, rest: Stream) -> None:
        self._head, self._rest = head, rest

    def readable(self) -> bool:
        """It is."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Fill the buffer, or a part of it."""
        data, self._head = self._head[: len(buffer)], self._head[len(buffer) :]
        data = data or self._rest.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)


def _unpacked(stream: Stream) -> tuple[Stream, bytes]:
    """(a stream that is not packed, what it begins with)."""
    for _ in range(MOST_LAYERS):
        head = stream.read(8)
        stream = _again(stream, head)
        packing = _packing(head)
        if packing is None:
            return stream, head
        stream = packing(stream)
    raise TextError(f"it is packed more than {MOST_LAYERS - 1} times")


def _again(stream: Stream, head: bytes) -> Stream:
    try:
        stream.seek(0)
        return stream
    except (OSError, ValueError, AttributeError):
        return io.BufferedReader(_Begun(head, stream), BLOCK)


def _packing(head: bytes) -> Callable[[Any], Any] | None:
    return next((packing for magic, packing in PACKED if head.startswith(magic)), None)


def _zstd(stream: Stream) -> Stream:
    try:
        if sys.version_info >= (3, 14):
            from compression import zstd
        else:
            from backports import zstd
    except ImportError:
        raise TextError("it is packed by Zstandard, which takes pip install 'dllm[inputs]'") from None
    opened: Any = zstd.open(stream)
    return opened  # type: ignore[no-any-return]


def _lines(stream: Stream) -> Iterator[bytes]:
    """Lines with their ends. Raises TextError where one would take too much memory."""
    for number in itertools.count(1):
        line = stream.readline(LONGEST_RECORD + 1)
        if not line:
            return
        if len(line) > LONGEST_RECORD:
            raise TextError(f"line {number:,} has over {LONGEST_RECORD >> 20} MiB")
        yield line


def _json_lines(stream: Stream, name: str, folder: pathlib.Path) -> Iterator[bytes]:
    """The texts of a field of JSON lines."""
    record = msgspec.defstruct("Record", [("text", str)], rename={"text": name})
    decoder: Any = msgspec.json.Decoder(record)
    for number, line in enumerate(_lines(stream), 1):
        if number == 1:
            line = line.removeprefix(b"\xef\xbb\xbf")
        if line.strip():
            try:
                yield decoder.decode(line).text.encode()
            except (msgspec.DecodeError, UnicodeError) as error:
                raise TextError(f"line {number:,} is no record of JSON with a text '{name}' ({error})") from None
            except RecursionError:
                raise TextError(f"line {number:,} is nested too deeply") from None


def _parquet(stream: Stream, name: str, folder: pathlib.Path) -> Iterator[bytes]:
    """The texts of a column of a Parquet file."""
    try:
        import pyarrow as arrow
        from pyarrow import parquet
    except ImportError:
        raise TextError("it is a Parquet file, which takes pip install 'dllm[inputs]'") from None
    with contextlib.ExitStack() as opened:
        if not stream.seekable() or not isinstance(stream, io.BufferedReader | io.FileIO):  # it is read from its end
            stream, packed = opened.enter_context(tempfile.TemporaryFile(dir=folder)), stream
            shutil.copyfileobj(packed, stream, BLOCK)
        file = parquet.ParquetFile(stream, pre_buffer=False)
        columns = file.schema_arrow
        if name not in columns.names:
            raise TextError(f"it has no column '{name}'; it has {', '.join(columns.names)}"[:300])
        kind, row = columns.field(name).type, 0
        kind = kind.value_type if arrow.types.is_dictionary(kind) else kind
        if not (arrow.types.is_string(kind) or arrow.types.is_large_string(kind) or arrow.types.is_string_view(kind)):
            raise TextError(f"its column '{name}' is no text, but {kind}"[:300])
        for batch in file.iter_batches(ROWS, columns=[name], use_threads=False):
            for text in batch.column(0).to_pylist():
                row += 1
                if text is None:
                    raise TextError(f"row {row:,} has no '{name}'")
                yield text.encode()


PARQUET = b"PAR1"
PACKED: tuple[tuple[bytes, Callable[[Any], Any]], ...] = (
    (b"\x1f\x8b\x08", gzip.open),
    (b"\xfd7zXZ\0", lzma.open),
    (b"\x28\xb5\x2f\xfd", _zstd),
    (b"BZh", bz2.open),
)
RECORDS: tuple[tuple[bytes, Callable[[Stream, str, pathlib.Path], Iterator[bytes]]], ...] = (
    (PARQUET, _parquet),
    (b"", _json_lines),
)
