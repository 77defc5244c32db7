"""IPFS: blocks from a node by its RPC and from trustless gateways, and files to a node. No block is believed unseen.

Sources: https://docs.ipfs.tech/reference/kubo/rpc/ (block/get, dag/import),
https://specs.ipfs.tech/http-gateways/trustless-gateway/ (format=raw).
A node hands out blocks that were damaged on its disk, and searches for those that nobody has until it is told to stop.
"""

from __future__ import annotations

import base64
import json
import os
import pathlib
import urllib.parse
import uuid
from collections.abc import Callable, Iterator, Mapping
from typing import Protocol

from ..config import StorageConfig
from ..errors import UserError, printable, shown
from . import car
from .cid import Cid
from .http import Answer, Server, is_loopback
from .tree import Tree
from .unixfs import LARGEST_BLOCK, blocks_of

RPC, GATEWAYS, TOKEN = "DLLM_IPFS", "IPFS_GATEWAY", "DLLM_IPFS_TOKEN"  # variables
LARGEST_ANSWER = 1 << 20  # bytes of a dag/import
SCHEME = "ipfs://"


class Source(Protocol):
    """Something that has blocks."""

    name: str

    def get(self, cid: Cid) -> bytes:
        """What it says the block is. Raises UserError."""


class Node:
    """A node of IPFS, by its RPC. Raises UserError where it may not be asked.

    Its token, of DLLM_IPFS_TOKEN, goes to the address in DLLM_IPFS alone: another may come from settings of somebody else.
    """

    def __init__(self, address: str, timeout: float) -> None:
        ours, token = os.environ.get(RPC, "").rstrip("/"), os.environ.get(TOKEN, "")
        headers = {"Authorization": _authorization(token)} if token and address.rstrip("/") == ours else {}
        self._server = Server(address, timeout, headers)
        self.name = self._server.name
        if headers and not (is_loopback(self._server.host) or address.startswith("https:")):
            raise UserError(f"{self.name} would get the token of {TOKEN} in clear: give an address with https in {RPC}")
        if not (headers or is_loopback(self._server.host)):
            raise UserError(f"{self.name} can be reached by others: put its address into {RPC} and its token into {TOKEN}")

    def get(self, cid: Cid) -> bytes:
        """What the node says the block is. Raises UserError."""
        return self._call(f"block/get?arg={cid}", most=LARGEST_BLOCK).body

    def publish(self, files: Mapping[str, pathlib.Path], pin: bool, moved: Callable[[int], object] = lambda size: None) -> Cid:
        """Give the node the blocks of `unixfs.blocks_of(files)`. Returns the root. Raises UserError.

        pin : the node keeps them
        moved : told the bytes of each block, twice: when it is named, when it is sent
        """
        root, size = car.size_of(_told(blocks_of(files), moved))
        mark = uuid.uuid4().hex
        head = f'--{mark}\r\nContent-Disposition: form-data; name="file"; filename="dllm.car"\r\n'
        head += "Content-Type: application/octet-stream\r\n\r\n"
        tail = f"\r\n--{mark}--\r\n"

        def body() -> Iterator[bytes]:
            yield head.encode() + car.header(root)
            last = None
            for last, block in _told(blocks_of(files), moved):
                yield car.section(last, block)
            if last != root:
                raise UserError("a file was changed while it was published")
            yield tail.encode()

        length = len(head) + size + len(tail)
        headers = {"Content-Type": f"multipart/form-data; boundary={mark}", "Content-Length": str(length)}
        answer = self._call(f"dag/import?pin-roots={str(pin).lower()}", body(), headers, LARGEST_ANSWER)
        self._check_import(answer, root, pin)
        return root

    def _check_import(self, answer: Answer, root: Cid, pin: bool) -> None:
        """Raise UserError where the node does not have what it was given."""
        try:
            lines = [json.loads(line) for line in answer.body.splitlines()]
            roots = [line["Root"] for line in lines if line.get("Root")]
            failed = next((str(found["PinErrorMsg"]) for found in roots if found.get("PinErrorMsg")), "")
            named = [Cid.parse(str(found["Cid"]["/"])) for found in roots]
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
            raise UserError(f"{self.name} gives no answer that a node of IPFS gives") from None
        if failed:
            raise UserError(f"{self.name} does not keep {root}: {printable(failed)[:200]}")
        if (pin and named != [root]) or not root.names(self.get(root)):
            raise UserError(f"{self.name} did not take {root}")

    def _call(
        self, what: str, body: bytes | Iterator[bytes] = b"", headers: Mapping[str, str] | None = None, most: int = 0
    ) -> Answer:
        answer = self._server.ask("POST", f"/api/v0/{what}", body, most=most, headers=headers)
        if answer.status != 200:
            raise UserError(f"{self.name} answers {answer.status}{_message(answer.body)}")
        return answer


class Gateway:
    """A trustless gateway: blocks by GET. Raises UserError where its address is none."""

    def __init__(self, address: str, timeout: float) -> None:
        self._server = Server(address, timeout, {"Accept": "application/vnd.ipld.raw"})
        self.name = self._server.name

    def get(self, cid: Cid) -> bytes:
        """What the gateway says the block is. Raises UserError."""
        answer = self._server.ask("GET", f"/ipfs/{cid}?format=raw", most=LARGEST_BLOCK)
        if answer.status != 200:
            raise UserError(f"{self.name} answers {answer.status}")
        return answer.body


class Blocks:
    """Blocks of the first source that has them; one that failed is asked last from then on."""

    def __init__(self, sources: list[Source]) -> None:
        self._sources = sources

    def get(self, cid: Cid) -> bytes:
        """The block, checked. Raises UserError that says what each source said."""
        said = []
        for source in tuple(self._sources):
            try:
                block = source.get(cid)
            except UserError as error:
                said.append(str(error))
            else:
                if cid.names(block):
                    return block
                said.append(f"{source.name} gives a damaged one")
            self._sources = [*(other for other in self._sources if other is not source), source]
        raise UserError(f"no block {cid}: {'; '.join(said)}")


def open_tree(url: str, settings: StorageConfig) -> Tree:
    """The files of ipfs://CID[/path]. Raises UserError."""
    root, path = split(url)
    return Tree(Blocks(_sources(settings)).get, root, path)


def split(url: str) -> tuple[Cid, str]:
    """The CID and the path of an URL. Raises UserError."""
    name, _, path = url.removeprefix(SCHEME).partition("/")
    try:
        path = urllib.parse.unquote(path, errors="strict")
    except UnicodeDecodeError:
        raise UserError(f"{shown(url, 200)} has a path that is no text") from None
    return Cid.parse(name), path.strip("/")


def node(settings: StorageConfig) -> Node:
    """The node that files are published to. Raises UserError."""
    address = settings.ipfs or os.environ.get(RPC, "")
    if not address:
        raise UserError(
            f"there is no node of IPFS: give the address of its RPC by {RPC} or storage.ipfs, or take --to FILE.car"
        )
    return Node(address, settings.timeout)


def _sources(settings: StorageConfig) -> list[Source]:
    """Those of the settings, or of the environment: the node first."""
    address = settings.ipfs or os.environ.get(RPC, "")
    gateways = (settings.gateways or os.environ.get(GATEWAYS, "")).split(",")
    found: list[Source] = [Node(address, settings.timeout)] if address else []
    found += [Gateway(gateway.strip(), settings.timeout) for gateway in gateways if gateway.strip()]
    if not found:
        raise UserError(f"nobody to ask for ipfs://: give a node's RPC by {RPC}, or a trustless gateway by {GATEWAYS}")
    return found


def _authorization(token: str) -> str:
    """The header of a token; of USER:PASSWORD as Basic. Raises UserError."""
    if not (token.isascii() and token.isprintable()):
        raise UserError(f"{TOKEN} is no token: it has characters that no header has")
    return f"Basic {base64.b64encode(token.encode()).decode()}" if ":" in token else f"Bearer {token}"


def _message(body: bytes) -> str:
    """What a node says of an error."""
    try:
        return f": {printable(str(json.loads(body)['Message']))[:200]}"
    except (ValueError, LookupError, TypeError, RecursionError):
        return ""


def _told(blocks: Iterator[tuple[Cid, bytes]], moved: Callable[[int], object]) -> Iterator[tuple[Cid, bytes]]:
    for cid, block in blocks:
        yield cid, block
        moved(len(block))
