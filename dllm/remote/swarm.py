"""Ethereum Swarm: files and folders by the HTTP of a Bee node, which is believed in nothing.

What it gives is hashed here and compared with the address; what it takes has its address computed here first. A file is moved
in pieces of 512 KiB (POST and GET /bytes) and in the chunks of addresses above them (/chunks), so no question takes long.
A folder is a file, the index: JSON that begins as no other does, and lists paths, references and sizes by path.

Source: https://docs.ethswarm.org/api/.
"""

from __future__ import annotations

import io
import json
import os
import pathlib
import re
import urllib.parse
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Annotated, BinaryIO, Literal

import msgspec

from ..config import StorageConfig
from ..errors import UserError, printable, reason, shown
from ..files import storage
from . import chunks
from .chunks import CHUNK, LARGEST_FILE, PIECE
from .http import Answer, Server, is_loopback
from .unixfs import check_name

BEE, STAMP = "DLLM_BEE", "DLLM_BEE_STAMP"  # variables
SCHEME = "swarm://"
HEXADECIMAL = re.compile(r"[0-9a-f]{64}")
LARGEST_ANSWER = 1 << 16  # bytes of an answer that is no data
LARGEST_INDEX = 1 << 24  # bytes
MOST_FILES = 1 << 16  # of a folder
LONGEST_PATH = 1024  # bytes


class Entry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A file of a folder."""

    reference: Annotated[str, msgspec.Meta(pattern=r"\A[0-9a-f]{64}\Z")]
    size: Annotated[int, msgspec.Meta(ge=0, le=LARGEST_FILE)]


class Index(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A folder. What `encode` makes of it begins with BEGINNING, which tells it from any other file."""

    format: Literal["dllm-folder-1"]
    files: dict[str, Entry]


# keccak256 of mantaray:0.1 and mantaray:0.2, but for the last byte
MANIFESTS = (
    "025184789d63635766d78c41900196b57d7400875ebe4d9b5d1e76bd9652a9",
    "5768b3b6a7db56d21d1abff40d41cebfc83448fed8d7e9b06ec0d3b073f28f",
)
BEGINNING = b'{"format":"dllm-folder-1","files":{'


def encode(files: Mapping[str, Entry]) -> bytes:
    """The index of a folder. Raises ValueError where the names are none, or there are too many."""
    index = Index("dllm-folder-1", {name: files[name] for name in sorted(files)})
    _check_names(index.files)
    data = msgspec.json.encode(index)
    if len(data) > LARGEST_INDEX:
        raise ValueError(f"the list of its files has over {LARGEST_INDEX:,} bytes")
    return data


def decode(data: bytes) -> dict[str, Entry]:
    """The files of an index, which must be what `encode` makes. Raises ValueError."""
    try:
        files = msgspec.json.decode(data, type=Index).files
    except msgspec.MsgspecError as error:
        raise ValueError(reason(error)[:200]) from None  # which quotes names of fields
    if encode(files) != data:  # a name that stands there twice, another order
        raise ValueError("it is not written as dllm writes it")
    return files


def _check_names(names: Collection[str]) -> None:
    """Raise ValueError where these are no paths of files in a folder."""
    if len(names) > MOST_FILES:
        raise ValueError(f"it has over {MOST_FILES:,} files")
    folders: set[str] = set()
    for name in names:
        *above, _ = [check_name(part) for part in name.split("/")]
        if len(name.encode()) > LONGEST_PATH:
            raise ValueError(f"{shown(name)} is too long a path")
        folders.update("/".join(above[:depth]) for depth in range(1, len(above) + 1))
    if both := folders & set(names):
        raise ValueError(f"{shown(min(both))} is a file and a folder")


class Bee:
    """A node of Swarm, by its HTTP.

    Parameters
    ----------
    address : str
        Such as http://127.0.0.1:1633. Another than of this machine needs https: who can change what travels could answer
        that he has taken a file, and nobody would have it.
    timeout : float
        Seconds for each question and its whole answer.
    stamp : str
        The batch of postage stamps that pays for what is published, 64 hexadecimal digits.

    Raises
    ------
    UserError
        Where it may not be asked.
    """

    def __init__(self, address: str, timeout: float, stamp: str = "") -> None:
        self._server, self._stamp = Server(address, timeout), stamp
        self.name = self._server.name
        if not (is_loopback(self._server.host) or self.name.startswith("https:")):
            raise UserError(f"{self.name} is not on this machine, so its address has to begin with https://")

    def open(self, address: bytes) -> tuple[int, Iterator[bytes]]:
        """How many bytes a file has, and the bytes: at most PIECE at a time, each checked. Raises UserError."""
        span, payload = self._chunk(address)
        return span, self._below(address, span, payload)

    def _below(self, address: bytes, span: int, payload: bytes) -> Iterator[bytes]:
        if span <= CHUNK:
            yield payload
        elif span <= PIECE:
            yield self._piece(address, span)
        else:
            for part, size in chunks.parts_below(span, payload):
                if size <= PIECE:
                    yield self._piece(part, size)
                    continue
                found, inner = self._chunk(part)
                if found != size:
                    raise UserError(f"{self.name} has a file with {found:,} bytes at {part.hex()}, where {size:,} should be")
                yield from self._below(part, size, inner)

    def _chunk(self, address: bytes) -> tuple[int, bytes]:
        body = self._get(f"/chunks/{address.hex()}", 8 + CHUNK)
        try:
            return chunks.read_chunk(address, body)
        except ValueError as error:
            raise UserError(f"{self.name} gives {address.hex()}, but {error}") from None

    def _piece(self, address: bytes, size: int) -> bytes:
        data = self._get(f"/bytes/{address.hex()}", size)
        if len(data) != size or chunks.piece_address(data) != address:
            raise UserError(f"{self.name} gives {address.hex()}, but it is damaged")
        return data

    def _get(self, path: str, most: int) -> bytes:
        answer = self._server.ask("GET", path, most=max(most, LARGEST_ANSWER))
        self._check(answer, 200, f"asked for {path}")
        return answer.body

    def publish(self, files: Mapping[str, pathlib.Path], moved: Callable[[int], object] = lambda size: None) -> str:
        """Give it files by their paths in a folder, or one file by the name "". Returns the reference. Raises UserError.

        moved : told the bytes of each piece, twice: when it is named, when it is sent
        """
        if list(files) == [""]:
            return self._put_file("", files[""], moved).reference
        try:
            _check_names(files)
            data = encode({name: self._put_file(name, path, moved) for name, path in files.items()})
        except ValueError as error:
            raise UserError(f"the folder cannot be published: {error}") from None
        return self._put(io.BytesIO(data), moved)

    def _put_file(self, name: str, path: pathlib.Path, moved: Callable[[int], object]) -> Entry:
        try:
            storage.check_regular(path)
            with open(path, "rb") as file:
                return Entry(self._put(file, moved), file.tell())
        except OSError as error:
            raise UserError(f"cannot read {path}: {reason(error)}") from None

    def _put(self, file: BinaryIO, moved: Callable[[int], object]) -> str:
        headers = {"Swarm-Postage-Batch-Id": self._stamp, "Swarm-Redundancy-Level": "0"}
        headers["Content-Type"] = "application/octet-stream"
        for part in chunks.parts(file):
            size = 0 if part.inner else len(part.data)
            moved(size)
            path, ours = "/chunks" if part.inner else "/bytes", part.address.hex()
            answer = self._server.ask("POST", path, part.data, most=LARGEST_ANSWER, headers=headers)
            self._check(answer, 201, f"given a piece of {len(part.data):,} bytes")
            if (theirs := _said(answer, "reference")) != ours:
                raise UserError(f"{self.name} gives the reference {shown(theirs, 80)} to what has {ours}")
            moved(size)
        return ours

    def _check(self, answer: Answer, status: int, when: str) -> None:
        """Raise UserError where the answer has another status."""
        if answer.status != status:
            said = printable(_said(answer, "message"))[:200]
            raise UserError(f"{self.name} answers {answer.status}{said and ': '}{said}, {when}")


class Files:
    """The file or the files that an URL names. The index is read at once, files when they are asked for.

    Parameters
    ----------
    bee : Bee
    root : str
        A reference, 64 hexadecimal digits.
    path : str
        Of a file or folder in it, such as a/b.

    Raises
    ------
    UserError
    """

    def __init__(self, bee: Bee, root: str, path: str = "") -> None:
        self._bee = bee
        size, pieces = bee.open(bytes.fromhex(root))
        first = next(pieces)
        if not first.startswith(BEGINNING):
            if _is_manifest(first):
                raise UserError(f"{root} is a folder of Bee's own (/bzz); dllm reads those that dllm publish makes")
            if path:
                raise UserError(f"{root} is a file, so it has no {shown(path, 200)}")
            self._files = {"": Entry(root, size)}
            return
        try:
            if size > LARGEST_INDEX:
                raise ValueError(f"it has {size:,} bytes, it may have {LARGEST_INDEX:,}")
            files = decode(first + b"".join(pieces))
        except ValueError as error:
            raise UserError(f"{root} is no list of files: {error}") from None
        inside = f"{path}/" if path else ""
        self._files = {name.removeprefix(inside): entry for name, entry in files.items() if name.startswith(inside)}
        if path in files:
            self._files = {"": files[path]}
        if path and not self._files:
            raise UserError(f"{root} has no {shown(path, 200)}")

    @property
    def names(self) -> Sequence[str]:
        """Of all files, such as a/b for one in a folder; [""] where it is a file."""
        return list(self._files)

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(entry.size for entry in self._files.values())

    def read(self, name: str, most: int) -> bytes:
        """The bytes of a file of at most `most` bytes. Raises UserError."""
        return b"".join(self._pieces(name, most))

    def fetch(
        self, name: str, target: pathlib.Path, most: int | None = None, moved: Callable[[int], object] = lambda size: None
    ) -> None:
        """Make the file `target` of one that has at most `most` bytes, whole or not at all. Raises UserError.

        moved : told the bytes of each piece
        """
        storage.write_pieces(target, lambda limit: self._pieces(name, limit), most, moved)

    def _pieces(self, name: str, most: int) -> Iterator[bytes]:
        if name not in self._files:
            raise UserError(f"there is no file {shown(name, 200)}")
        entry = self._files[name]
        if entry.size > most:
            raise UserError(f"{name or entry.reference} has {entry.size:,} bytes, it may have {most:,}")
        size, pieces = self._bee.open(bytes.fromhex(entry.reference))
        if size != entry.size:
            raise UserError(f"{name or entry.reference} has {size:,} bytes, its folder says {entry.size:,}")
        return pieces


def open_files(url: str, settings: StorageConfig) -> Files:
    """The files of swarm://REFERENCE[/path]. Raises UserError."""
    name, _, path = url.removeprefix(SCHEME).partition("/")
    try:
        path = urllib.parse.unquote(path, errors="strict").strip("/")
    except UnicodeDecodeError:
        raise UserError(f"{shown(url, 200)} has a path that is no text") from None
    if re.fullmatch(r"[0-9a-fA-F]{128}", name):
        raise UserError(f"{name[:16]}... is the reference of an encrypted file, which dllm does not read")
    if not HEXADECIMAL.fullmatch(name.lower()):
        raise UserError(f"{shown(name, 200)} is no reference of Swarm: 64 hexadecimal digits")
    return Files(Bee(_address(settings), settings.timeout), name.lower(), path)


def node(settings: StorageConfig) -> Bee:
    """The node that files are published to, with the stamp that pays for them. Raises UserError."""
    address, stamp = _address(settings), os.environ.get(STAMP, "").lower().removeprefix("0x")
    if not HEXADECIMAL.fullmatch(stamp):
        raise UserError(f"Swarm takes files for a postage stamp: put its batch, 64 hexadecimal digits, into {STAMP}")
    return Bee(address, settings.timeout, stamp)


def _address(settings: StorageConfig) -> str:
    address = settings.bee or os.environ.get(BEE, "")
    if not address:
        raise UserError(f"nobody to ask for swarm://: give a Bee node's address by {BEE} or storage.bee")
    return address


def _said(answer: Answer, key: str) -> str:
    """What an answer in JSON says, "" where it does not."""
    try:
        return str(json.loads(answer.body)[key])
    except (ValueError, LookupError, TypeError, RecursionError):
        return ""


def _is_manifest(data: bytes) -> bool:
    """Whether a file is a node of a manifest, as Bee makes of folders: a key, and behind it a hash that is hidden with it."""
    hidden = bytes(one ^ other for one, other in zip(data[:31], data[32:63], strict=False))
    return hidden.hex() in MANIFESTS
