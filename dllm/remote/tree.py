"""Files out of a tree of blocks of UnixFS, by any function that gives blocks: a node's, a gateway's, a CAR file's.

What a tree may cost is bounded before it is paid: depth, names, parts of a file, and bytes, which must be those that were said.
"""

from __future__ import annotations

import functools
import pathlib
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

from ..errors import UserError, shown
from ..files import storage
from .cid import RAW, Cid
from .unixfs import Link, Node, decode

AHEAD = 8  # blocks of a file that are under way at once
DEEPEST = 16  # folders in folders, nodes of a file below each other
MOST_FILES = 100_000  # and folders
LEAST_PART = 1024  # bytes of a file for each of its blocks, on the average, beyond the first ones
FIRST_PARTS = 4096


class Tree:
    """The files below a CID. Folders are read when they are needed, once; files when they are asked for.

    Parameters
    ----------
    get : callable
        The block of a CID, checked. Raises UserError.
    root : Cid
    path : str
        Of a file or folder below it, such as a/b.

    Raises
    ------
    UserError
        Where there is none.
    """

    def __init__(self, get: Callable[[Cid], bytes], root: Cid, path: str = "") -> None:
        self._get, self._root = get, root
        self._folders: dict[Cid, Node] = {}
        self._start = self._below(root, path)
        node = self._node(self._start)
        self._is_file = not node.folder
        self._size = node.size

    @functools.cached_property
    def names(self) -> Sequence[str]:
        """Of all files, such as a/b for one in a folder; [""] where it is a file. Takes a block for each large file."""
        found: list[str] = []
        if self._is_file:
            return [""]
        self._list("", self._start, DEEPEST, found, [0])
        return found

    @property
    def size(self) -> int:
        """Bytes of all blocks, as the maker of the tree says."""
        return self._size

    def read(self, name: str, most: int) -> bytes:
        """The bytes of a file of at most `most` bytes. Raises UserError."""
        with ThreadPoolExecutor(AHEAD) as pool:
            return b"".join(self._bytes(pool, name, most))

    def fetch(
        self, name: str, target: pathlib.Path, most: int | None = None, moved: Callable[[int], object] = lambda size: None
    ) -> None:
        """Make the file `target` of one that has at most `most` bytes, whole or not at all. Raises UserError.

        moved : told the bytes of each block
        """
        with ThreadPoolExecutor(AHEAD) as pool:
            storage.write_pieces(target, lambda limit: self._bytes(pool, name, limit), most, moved)

    def _node(self, cid: Cid) -> Node:
        node = self._folders.get(cid) or decode(cid, self._get(cid))
        if node.folder:
            self._folders[cid] = node
        return node

    def _below(self, cid: Cid, path: str) -> Cid:
        for part in filter(None, path.split("/")):
            node = self._node(cid)
            below = next((link.cid for link in node.links if link.name == part), None)
            if not node.folder or below is None:
                raise UserError(f"{self._root} has no {shown(path, 200)}")
            cid = below
        return cid

    def _list(self, name: str, cid: Cid, depth: int, found: list[str], visited: list[int]) -> None:
        visited[0] += 1
        if not depth or visited[0] > MOST_FILES:
            raise UserError(f"{self._root} has folders more than {DEEPEST} deep, or over {MOST_FILES:,} files")
        if cid.codec == RAW or not (node := self._node(cid)).folder:
            found.append(name)
            return
        for link in node.links:
            self._list(f"{name}/{link.name}" if name else link.name, link.cid, depth - 1, found, visited)

    def _bytes(self, pool: ThreadPoolExecutor, name: str, most: int) -> Iterator[bytes]:
        cid = self._below(self._start, name)
        node = self._node(cid)
        if node.folder:
            raise UserError(f"{name or cid} is a folder, not a file")
        if node.size > most:
            raise UserError(f"{name or cid} has {node.size:,} bytes, it may have {most:,}")
        left = FIRST_PARTS + node.size // LEAST_PART  # blocks
        for data in self._parts(pool, node, DEEPEST):
            left -= 1
            if left < 0:
                raise UserError(f"{name or cid} is cut into too many parts")
            yield data

    def _parts(self, pool: ThreadPoolExecutor, node: Node, depth: int) -> Iterator[bytes]:
        """The bytes of a file below one of its nodes, a block at a time, in order."""
        if not depth:
            raise UserError(f"a file has nodes more than {DEEPEST} deep")
        yield node.data
        under_way: deque[tuple[Link, Future[bytes] | None]] = deque()
        rest = iter(node.links)
        try:
            while True:
                while len(under_way) < AHEAD and (link := next(rest, None)):
                    # Nodes are few and leaves many; were nodes read ahead, too, each level would hold as many blocks.
                    under_way.append((link, pool.submit(self._get, link.cid) if link.cid.codec == RAW else None))
                if not under_way:
                    return
                link, coming = under_way.popleft()
                below = decode(link.cid, coming.result()) if coming else self._node(link.cid)
                if below.folder or below.size != link.size:
                    raise UserError(f"block {link.cid} is not the {link.size:,} bytes that the file has there")
                yield from self._parts(pool, below, depth - 1)
        finally:
            for _, coming in under_way:
                if coming:
                    coming.cancel()
