"""HDF5 files from elsewhere, read without the HDF5 library, which may crash on a file that was made to harm it.

What h5py writes unless it is told otherwise, the format of HDF5 1.0, and of that what a file of weights needs: groups, and
arrays of floating-point numbers that lie in one piece. Whatever else there is, links, filters, chunks, other files, is refused
where it is met. Every address is compared with the size of the file before it is followed, a shape with the bytes that it has.

(HDF5 File Format Specification 3.0: superblock 0, object header 1, symbol tables, local heaps, layout 3.)
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from ..errors import UserError
from ..kernels.types import Array
from .storage import Path

SIGNATURE = b"\x89HDF\r\n\x1a\n"
LENGTHS = bytes([0, 0, 0, 0, 0, 8, 8, 0])  # versions and sizes behind the signature: addresses and lengths have 8 bytes
NOWHERE = (1 << 64) - 1
FLOATS = {  # a datatype as it is stored -> what NumPy calls it; little endian, IEEE 754
    bytes.fromhex("11200f000200000000001000" + "0a05000a0f000000"): "<f2",
    bytes.fromhex("11201f000400000000002000" + "170800177f000000"): "<f4",
    bytes.fromhex("11203f000800000000004000" + "340b0034ff030000"): "<f8",
}
SPACE, TYPE, EXTERNAL, LAYOUT, FILTERS, CONTINUED, TABLE = 0x01, 0x03, 0x07, 0x08, 0x0B, 0x10, 0x11
MOST_MESSAGES, MOST_BLOCKS, MOST_MEMBERS, MOST_LEVELS, MOST_AXES = 4096, 64, 4096, 8, 8
LONGEST_NAME = 1024
CONTIGUOUS, LINK = 1, 2
KINDS = {0: "compact", 2: "in chunks, perhaps with filters", 3: "virtual"}  # of layouts that are not read


class Dataset(NamedTuple):
    """An array of a file."""

    dtype: str  # of FLOATS
    shape: tuple[int, ...]
    start: int  # byte

    @property
    def stop(self) -> int:
        """The byte behind it."""
        return self.start + math.prod(self.shape) * np.dtype(self.dtype).itemsize


class PlainHdf5:
    """The bytes of a file, and what lies where. path : for messages"""

    def __init__(self, data: bytes, path: Path) -> None:
        """Raises UserError where this is no HDF5 of that format."""
        self.path, self._data = path, data
        self._known = dict[int, dict[str, tuple[int, bool]]]()
        if data[:8] != SIGNATURE:
            raise UserError(f"{path} is no HDF5 file")
        if data[8:16] != LENGTHS or len(data) < 96:
            raise self._newer()
        if struct.unpack_from("<Q", data, 24) != (0,):
            raise self._damaged("does not begin where it should")
        self._root = self._numbers("<Q", 64)[0]

    def names(self, group: str) -> list[str]:
        """The names of what a group holds, "": the root; in the order of the alphabet. Raises UserError where there is none."""
        return sorted(self._members(self._find(group), group))

    def has(self, path: str) -> bool:
        """Whether there is something at a path. Raises UserError where the file is damaged before that is known."""
        group, _, name = path.rpartition("/")
        return (not group or self.has(group)) and name in self._members(self._find(group), group)

    def dataset(self, path: str) -> Dataset:
        """What lies at a path. Raises UserError where it is no array that is read here; nothing of it is read."""
        found = dict[int, bytes]()
        for kind, body in self._messages(self._find(path)):
            if kind in (EXTERNAL, FILTERS):
                raise UserError(f"{self.path}: '{path}' is {'compressed' if kind == FILTERS else 'stored in another file'}")
            found.setdefault(kind, body)
        if not {SPACE, TYPE, LAYOUT} <= found.keys():
            raise UserError(f"{self.path}: '{path}' is no array")
        dtype = FLOATS.get(found[TYPE][:20])
        if dtype is None:
            raise UserError(f"{self.path}: '{path}' is not of float16, float32 or float64")
        shape = self._shape(found[SPACE], path)
        size = math.prod(shape) * np.dtype(dtype).itemsize
        layout = found[LAYOUT].ljust(18, b"\0")
        if layout[0] != 3 or layout[1] != CONTIGUOUS:
            raise UserError(f"{self.path}: '{path}' is stored {KINDS.get(layout[1], 'in a way that is not known here')}")
        start, stored = struct.unpack_from("<QQ", layout, 2)
        if not size or stored != size or start > len(self._data) - size:
            raise self._damaged(f"has no {size:,} bytes for '{path}', which is {list(shape)}")
        return Dataset(dtype, shape, start)

    def read(self, dataset: Dataset) -> Array:
        """A copy of an array as float32; of float64 what is too large is infinite."""
        found = np.frombuffer(self._data, dataset.dtype, math.prod(dataset.shape), dataset.start).reshape(dataset.shape)
        with np.errstate(over="ignore"):
            return found.astype(np.float32)

    def _find(self, path: str) -> int:
        """The address of the header of what lies at a path."""
        here, walked = self._root, ""
        for name in filter(None, path.split("/")):
            members, walked = self._members(here, walked), f"{walked}/{name}".lstrip("/")
            if name not in members:
                raise UserError(f"{self.path} has no '{walked}'")
            here, link = members[name]
            if link:
                raise UserError(f"{self.path}: '{walked}' is a link")
        return here

    def _members(self, header: int, path: str) -> dict[str, tuple[int, bool]]:
        """Name -> the address of its header and whether it is a link, of a group."""
        if header not in self._known:
            self._known[header] = self._read_members(header, path or "/")
        return self._known[header]

    def _read_members(self, header: int, path: str) -> dict[str, tuple[int, bool]]:
        tables = [body for kind, body in self._messages(header) if kind == TABLE and len(body) >= 16]
        if len(tables) != 1:
            raise UserError(f"{self.path}: '{path}' is no group that is read here: it may be of a newer form, or hold links")
        tree, heap = struct.unpack_from("<QQ", tables[0])
        if self._bytes(heap, 8) != b"HEAP\0\0\0\0":
            raise self._damaged(f"has no names in '{path}'")
        size, _, names = self._numbers("<QQQ", heap + 8)
        self._bytes(names, size)
        found = dict[str, tuple[int, bool]]()
        for node in self._leaves(tree):
            (count,) = self._numbers("<H", node + 6)
            for place in range(count):
                offset, address, cache = self._numbers("<QQI", node + 8 + 40 * place)
                name = self._name(names, size, offset)
                if name in found or len(found) >= MOST_MEMBERS:
                    raise self._damaged(f"has '{name}' twice, or too much, in '{path}'")
                found[name] = address, cache == LINK
        return found

    def _leaves(self, tree: int) -> Iterator[int]:
        """The addresses of the nodes that hold a group's symbols, each of them once."""
        level, seen = [tree], set[int]()
        for _ in range(MOST_LEVELS):
            below, depths = list[int](), set[int]()
            for node in level:
                if node in seen or len(seen) > MOST_MEMBERS:
                    raise self._damaged("has a circle of groups")
                seen.add(node)
                magic, kind, depth, count = struct.unpack("<4sBBH", self._bytes(node, 8))
                if magic != b"TREE" or kind:
                    raise self._damaged("has a damaged tree")
                depths.add(depth)
                below += [self._numbers("<Q", node + 32 + 16 * place)[0] for place in range(count)]
            if depths == {0}:
                for node in below:
                    if node in seen or self._bytes(node, 5) != b"SNOD\x01":
                        raise self._damaged("has a damaged list of members")
                    seen.add(node)
                    yield node
                return
            level = below
        if level:
            raise self._damaged("has a tree that is too deep")

    def _messages(self, header: int) -> Iterator[tuple[int, bytes]]:
        """The kind and the body of each message of an object's header, in their order."""
        version, _, count, _, size = self._numbers("<BBHII", header)
        if self._bytes(header, 4) == b"OHDR":
            raise self._newer()
        if version != 1 or count > MOST_MESSAGES:
            raise self._damaged("has a damaged header of an object")
        blocks, number = [(header + 16, size)], 0
        for start, length in blocks:  # which grows
            here, end = 0, self._bytes(start, length)
            while here + 8 <= length and number < count:
                kind, body, flags = struct.unpack_from("<HHB", end, here)
                here, number = here + 8 + body, number + 1
                if here > length:
                    raise self._damaged("has a message that is cut off")
                message = end[here - body : here]
                if kind == CONTINUED and body >= 16 and len(blocks) < MOST_BLOCKS:
                    blocks.append(struct.unpack_from("<QQ", message))
                elif flags & 2 and kind in (SPACE, TYPE, LAYOUT, FILTERS, TABLE):
                    raise UserError(f"{self.path} shares a datatype or the like between its arrays, which is not read here")
                else:
                    yield kind, message

    def _shape(self, body: bytes, path: str) -> tuple[int, ...]:
        version, axes = body[0] if body else 0, body[1] if len(body) > 1 else 0
        start = {1: 8, 2: 4}.get(version)
        if start is None or axes > MOST_AXES or len(body) < start + 8 * axes:
            raise self._damaged(f"has no shape of '{path}'")
        return struct.unpack_from(f"<{axes}Q", body, start)

    def _name(self, names: int, size: int, offset: int) -> str:
        if offset >= size:
            raise self._damaged("has a name outside of its names")
        text = self._data[names + offset : names + min(size, offset + LONGEST_NAME)]
        name, end, _ = text.partition(b"\0")
        if not end or not name or b"/" in name:
            raise self._damaged("has a name that is none")
        return name.decode("utf-8", "replace")

    def _numbers(self, form: str, start: int) -> tuple[int, ...]:
        return struct.unpack(form, self._bytes(start, struct.calcsize(form)))

    def _bytes(self, start: int, length: int) -> bytes:
        if start > len(self._data) or length > len(self._data) - start:
            raise self._damaged("points outside of itself")
        return self._data[start : start + length]

    def _newer(self) -> UserError:
        return UserError(f"{self.path} is HDF5 of another version than Keras and h5py write: save it anew, with no options")

    def _damaged(self, how: str) -> UserError:
        return UserError(f"{self.path} is damaged: it {how}")
