"""UnixFS: files and folders as blocks with links. A block's words are checked here; that they are those of its CID, before.

Sources: https://ipld.io/specs/codecs/dag-pb/spec/ (PBNode, PBLink), https://specs.ipfs.tech/unixfs/ (Data). In protobuf terms

    PBNode {Data = 1, Links = 2}   PBLink {Hash = 1, Name = 2, Tsize = 3}
    Data {Type = 1, Data = 2, filesize = 3, blocksizes = 4}

Files are made as Kubo's profile unixfs-v1-2025 has it (IPIP-499): raw leaves of 1 MiB, at most 1,024 links a node,
balanced. So a CID depends on nothing but names and bytes. Folders are plain: Kubo divides those beyond 256 KiB of names.
"""

from __future__ import annotations

import pathlib
from collections.abc import Generator, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

from ..errors import UserError, reason, shown
from .cid import DAG_PB, RAW, Cid, read_varint, varint

LEAF, WIDTH = 1 << 20, 1024  # bytes of a leaf, links of a node
LARGEST_BLOCK = 2 << 20  # bytes; nodes of IPFS move no larger ones
LARGEST_FOLDER = 1 << 20  # bytes of the block of one that is made: 10,000 files and more
MOST_PARTS = 1 << 14  # links of a node of a file
MOST_NAMES = 1 << 15  # of a folder
LARGEST_FILE = 1 << 50  # bytes
DIRECTORY, FILE, BYTES = 1, 2, 0  # types of UnixFS; the last are bytes that belong to a file
REFUSED = {3: "metadata", 4: "a symbolic link", 5: "a folder in several blocks (HAMT)"}

Block: TypeAlias = tuple[Cid, bytes]


@dataclass(frozen=True, slots=True)
class Link:
    """From a node to a part of a file, or to what a folder holds."""

    name: str
    cid: Cid
    size: int  # of a part: bytes of the file; of what a folder holds: bytes of all its blocks, as its maker says


@dataclass(frozen=True, slots=True)
class Node:
    """What a block says: bytes of a file and links to those that follow, or a folder."""

    folder: bool
    data: bytes
    links: tuple[Link, ...]

    @property
    def size(self) -> int:
        """Bytes of the file."""
        return len(self.data) + sum(link.size for link in self.links)


def check_name(name: str) -> str:
    """The name, where a file can have it. Raises ValueError."""
    if name in ("", ".", "..") or "/" in name or not name.isprintable() or len(name.encode(errors="replace")) > 255:
        raise ValueError(f"{shown(name)} is no name of a file")
    return name


def decode(cid: Cid, block: bytes) -> Node:
    """What the block says that has the name `cid`. Raises UserError."""
    if cid.codec == RAW:
        return Node(False, block, ())
    try:
        links, data = _node(block)
        kind, content, size, sizes = _data(data)
        if kind in REFUSED:
            raise ValueError(f"it is {REFUSED[kind]}, which is not taken")
        if kind == DIRECTORY:
            return _folder_node(links)
        if kind not in (FILE, BYTES):
            raise ValueError("its type is unknown")
        return _file_node(links, content, size, sizes)
    except ValueError as error:
        raise UserError(f"block {cid} is no file and no folder: {reason(error)}") from None


def _folder_node(links: list[Link]) -> Node:
    if len(links) > MOST_NAMES:
        raise ValueError(f"it has over {MOST_NAMES:,} names")
    if len({check_name(link.name) for link in links}) < len(links):
        raise ValueError("it has a name twice")
    return Node(True, b"", tuple(links))


def _file_node(links: list[Link], content: bytes, size: int | None, sizes: list[int]) -> Node:
    if len(sizes) != len(links):
        raise ValueError("it does not have a size for each part")
    if len(links) > MOST_PARTS:
        raise ValueError(f"it has over {MOST_PARTS:,} parts")
    if 0 in sizes:
        raise ValueError("it has an empty part")
    node = Node(False, content, tuple(Link("", link.cid, size) for link, size in zip(links, sizes, strict=True)))
    if node.size > LARGEST_FILE or size not in (None, node.size):
        raise ValueError("its sizes do not add up")
    return node


def _fields(data: bytes) -> Iterator[tuple[int, Any]]:
    """(number, value) of the fields of a protobuf message: an int or bytes. Raises ValueError."""
    place = 0
    while place < len(data):
        tag, place = read_varint(data, place)
        if tag & 7 == 0:
            value, place = read_varint(data, place)
            yield tag >> 3, value
        elif tag & 7 == 2:
            length, place = read_varint(data, place)
            if length > len(data) - place:
                raise ValueError("it ends early")
            yield tag >> 3, data[place : place + length]
            place += length
        else:
            raise ValueError("it has a field of another kind")


def _of_kind(value: Any, kind: type) -> Any:
    """The value, where a field that must be of that kind is. Raises ValueError."""
    if not isinstance(value, kind):
        raise ValueError("a field has another kind than it must have")
    return value


def _node(block: bytes) -> tuple[list[Link], bytes]:
    """The links and the data of a PBNode. Raises ValueError."""
    links: list[Link] = []
    data = None
    for number, value in _fields(block):
        if number == 2:
            links.append(_link(_of_kind(value, bytes)))
        elif number == 1 and data is None:
            data = _of_kind(value, bytes)
        else:
            raise ValueError("it has a field that no node has")
    return links, data or b""


def _link(data: bytes) -> Link:
    found: dict[int, Any] = {}
    for number, value in _fields(data):
        if number not in (1, 2, 3) or number in found:
            raise ValueError("a link has a field that no link has")
        found[number] = _of_kind(value, int if number == 3 else bytes)
    return Link(found.get(2, b"").decode(), Cid.from_bytes(found.get(1, b"")), found.get(3, 0))


def _data(data: bytes) -> tuple[int, bytes, int | None, list[int]]:
    """(type, bytes, filesize, blocksizes) of a Data. Raises ValueError."""
    kind, content, size, sizes = -1, b"", None, []
    for number, value in _fields(data):
        if number == 1:
            kind = _of_kind(value, int)
        elif number == 2:
            content = _of_kind(value, bytes)
        elif number == 3:
            size = _of_kind(value, int)
        elif number == 4:
            sizes.append(_of_kind(value, int))
    return kind, content, size, sizes


def blocks_of(files: Mapping[str, pathlib.Path]) -> Iterator[Block]:
    """The blocks of files, children first, so that the root is the last one.

    files : name -> where the file lies; the name a/b is that of b in the folder a. {"": path}: one file, without a folder

    Raises
    ------
    UserError
        Where a file cannot be read, a name is none, or a folder holds too much.
    """
    if list(files) == [""]:
        yield from _make_file(files[""])
    else:
        yield from _make_folder({tuple(name.split("/")): path for name, path in files.items()})


@dataclass(frozen=True, slots=True)
class _Made:
    """A node that was made."""

    cid: Cid
    size: int  # bytes of the file
    total: int  # bytes of its block and of all below


_Making: TypeAlias = Generator[Block, None, _Made]


def _make(codec: int, block: bytes, size: int, below: Iterable[_Made] = ()) -> _Making:
    made = _Made(Cid.of(codec, block), size, len(block) + sum(one.total for one in below))
    yield made.cid, block
    return made


def _make_file(path: pathlib.Path) -> _Making:
    level: list[_Made] = []
    try:
        with open(path, "rb") as file:
            while (leaf := file.read(LEAF)) or not level:
                level.append((yield from _make(RAW, leaf, len(leaf))))
                if not leaf:
                    break
    except OSError as error:
        raise UserError(f"cannot read {path}: {reason(error)}") from None
    while len(level) > 1:
        groups = [level[start : start + WIDTH] for start in range(0, len(level), WIDTH)]
        level = []
        for parts in groups:
            size = sum(part.size for part in parts)
            sizes = b"".join(b"\x20" + varint(part.size) for part in parts)
            block = _encode([("", part) for part in parts], bytes((0x08, FILE, 0x18)) + varint(size) + sizes)
            level.append((yield from _make(DAG_PB, block, size, parts)))
    return level[0]


def _make_folder(files: Mapping[tuple[str, ...], pathlib.Path]) -> _Making:
    inside: dict[str, dict[tuple[str, ...], pathlib.Path]] = {}
    for (first, *rest), path in files.items():
        inside.setdefault(first, {})[tuple(rest)] = path
    entries = []
    for name in sorted(inside, key=str.encode):
        try:
            check_name(name)
        except ValueError as error:
            raise UserError(reason(error)) from None
        alone = inside[name].get(())
        entries.append((name, (yield from _make_folder(inside[name]) if alone is None else _make_file(alone))))
    block = _encode(entries, bytes((0x08, DIRECTORY)))
    if len(block) > LARGEST_FOLDER:
        raise UserError(f"{len(entries):,} files are too many for one folder of IPFS")
    return (yield from _make(DAG_PB, block, 0, [made for _, made in entries]))


def _encode(links: Iterable[tuple[str, _Made]], data: bytes) -> bytes:
    """A PBNode: links first, as dag-pb has it."""
    block = bytearray()
    for name, made in links:
        label = name.encode()
        link = b"\x0a\x24" + bytes(made.cid) + b"\x12" + varint(len(label)) + label + b"\x18" + varint(made.total)
        block += b"\x12" + varint(len(link)) + link
    return bytes(block + b"\x0a" + varint(len(data)) + data)
