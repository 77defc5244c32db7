"""CAR files: the blocks of a tree in one file. Version 1, https://ipld.io/specs/transport/car/carv1/.

A header, DAG-CBOR of {"roots": [CID], "version": 1}, then sections of a CID and a block, each behind its length as a varint.
"""

from __future__ import annotations

import os
import pathlib
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import BinaryIO

from ..errors import UserError, reason
from ..files import storage
from .cid import Cid, varint
from .unixfs import LARGEST_BLOCK, Block, blocks_of

BEFORE, BEHIND = b"\xa2\x65roots\x81\xd8\x2a\x58", b"\x67version\x01"  # a root's length, a zero and its CID
MOST_BLOCKS = 1 << 20  # of a file that is read; with whole leaves a TB


def header(root: Cid) -> bytes:
    """What a CAR file with this root begins with."""
    name = bytes(root)
    text = BEFORE + bytes((len(name) + 1, 0)) + name + BEHIND
    return varint(len(text)) + text


def section(cid: Cid, block: bytes) -> bytes:
    """A block as a CAR file has it."""
    name = bytes(cid)
    return varint(len(name) + len(block)) + name + block


def write(
    path: str | os.PathLike[str], files: Mapping[str, pathlib.Path], moved: Callable[[int], object] = lambda size: None
) -> Cid:
    """Make a CAR file of `unixfs.blocks_of(files)`, whole or not at all. Returns its root. Raises UserError.

    moved : told the bytes of each block
    """
    root, placeholder = None, header(Cid.of(0, b""))
    try:
        with storage.atomic(path) as temporary, open(temporary, "xb") as file:
            file.write(placeholder)
            for root, block in blocks_of(files):
                file.write(section(root, block))
                moved(len(block))
            assert root is not None
            file.seek(0)
            file.write(header(root))
    except OSError as error:
        raise UserError(f"cannot write {path}: {reason(error)}") from None
    return root


class CarFile:
    """The blocks of a CAR file, in any order in it, once or more often. A block is checked each time it is read.

    Raises UserError where the file is none.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.name = os.fspath(path)
        self._lock = threading.Lock()
        self._places: dict[Cid, tuple[int, int]] = {}
        try:
            storage.check_regular(path)
            self._file: BinaryIO = open(path, "rb")  # noqa: SIM115
        except OSError as error:
            raise UserError(f"cannot read {path}: {reason(error)}") from None
        try:
            self._size = os.fstat(self._file.fileno()).st_size
            self.root = self._root()
            self._read_places()
        except (ValueError, OSError) as error:
            self.close()
            raise UserError(f"{path} is not a CAR file that can be read: {reason(error)}") from None

    def get(self, cid: Cid) -> bytes:
        """A block. Raises UserError where it is not there, or damaged."""
        if cid not in self._places:
            raise UserError(f"{self.name} has no block {cid}")
        place, size = self._places[cid]
        try:
            with self._lock:
                self._file.seek(place)
                block = self._file.read(size)
        except OSError as error:
            raise UserError(f"cannot read {self.name}: {reason(error)}") from None
        if not cid.names(block):
            raise UserError(f"{self.name} is damaged: block {cid} is not what its name says")
        return block

    def close(self) -> None:
        """The file."""
        self._file.close()

    def _root(self) -> Cid:
        size = self._varint() or 0
        length = size - len(BEFORE) - 2 - len(BEHIND)
        text = self._file.read(size) if length in (34, 36) else b""  # of a root in version 0, in version 1
        name = text[len(BEFORE) + 2 :][:length]
        if text != BEFORE + bytes((length + 1 & 255, 0)) + name + BEHIND or not name:
            raise ValueError("its header is none of version 1 with one root")
        return Cid.from_bytes(name)

    def _read_places(self) -> None:
        for cid, place, size in self._sections():
            self._places.setdefault(cid, (place, size))
            if len(self._places) > MOST_BLOCKS:
                raise ValueError(f"it has over {MOST_BLOCKS:,} blocks")

    def _sections(self) -> Iterator[tuple[Cid, int, int]]:
        """(CID, where the block begins, its bytes) of all sections."""
        place = self._file.tell()
        while (length := self._varint()) is not None:
            begin = self._file.tell()
            name = self._file.read(36)
            short = name[:2] == b"\x12\x20"
            cid = Cid.from_bytes(name[:34] if short else name)
            skip = 34 if short else 36
            if not 0 <= length - skip <= LARGEST_BLOCK:
                raise ValueError(f"the block at byte {place:,} is over {LARGEST_BLOCK >> 20} MiB, or none")
            place = begin + length
            if place > self._size:
                raise ValueError("it ends early")
            yield cid, begin + skip, length - skip
            self._file.seek(place)

    def _varint(self) -> int | None:
        """The number that comes next; None at the end of the file."""
        number = 0
        for shift in range(0, 63, 7):
            byte = self._file.read(1)
            if not byte and shift == 0:
                return None
            if not byte:
                raise ValueError("it ends early")
            number |= (byte[0] & 127) << shift
            if byte[0] < 128:
                return number
        raise ValueError("it has a number that does not end")


def size_of(blocks: Iterator[Block]) -> tuple[Cid, int]:
    """The root of blocks, and the bytes of a CAR file of them."""
    total, last = 0, None
    for cid, block in blocks:
        last = cid
        total += len(varint(36 + len(block))) + 36 + len(block)
    assert last is not None
    return last, len(header(last)) + total
