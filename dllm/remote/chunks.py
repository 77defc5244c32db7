"""Files as Swarm cuts them: chunks of 4,096 bytes, each named by an address, below chunks that hold 128 addresses.

    chunk(x) = x                              of at most 4,096 bytes
    chunk(x) = address(x_1) ... address(x_n)  of more: x_i has 4096 128^k bytes, k the least with n <= 128, and x_n what is left

The last part is cut like a file of its own, so a lone chunk of bytes may lie right below the root (The Book of Swarm, 2.2).
In front of a chunk stand 8 bytes, the length of x in little-endian order.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

import numpy as np

from ..kernels import keccak

CHUNK = keccak.CHUNK  # bytes
ADDRESS = 32  # bytes
WIDTH = CHUNK // ADDRESS  # addresses in a chunk
PIECE = CHUNK * WIDTH  # bytes of a file that are moved at a time: all that lies below one chunk of addresses
LARGEST_FILE = 1 << 40  # bytes; the addresses of its pieces take 200 MB


@dataclass(frozen=True, slots=True)
class Part:
    """What a file consists of: a piece of its bytes, or a chunk of addresses (with its length in front) above pieces."""

    address: bytes
    data: bytes
    inner: bool


def piece_address(data: bytes | memoryview) -> bytes:
    """The address of a file of at most PIECE bytes, 32 bytes."""
    count = max(1, -(-len(data) // CHUNK))
    chunks = np.zeros((count, CHUNK), np.uint8)
    chunks.reshape(-1)[: len(data)] = np.frombuffer(data, np.uint8)
    spans = np.full(count, CHUNK, np.uint64)
    spans[-1] = len(data) - CHUNK * (count - 1)
    found = np.empty((count, ADDRESS // 8), np.uint64)
    keccak.addresses(found, chunks.view(np.uint64), spans)
    return found.tobytes() if count == 1 else chunk_address(len(data), found.tobytes())


def chunk_address(span: int, payload: bytes) -> bytes:
    """The address of a chunk with `payload`, below which lie `span` bytes of a file."""
    chunk = np.zeros((1, CHUNK), np.uint8)
    chunk[0, : len(payload)] = np.frombuffer(payload, np.uint8)
    found = np.empty((1, ADDRESS // 8), np.uint64)
    keccak.addresses(found, chunk.view(np.uint64), np.array([span], np.uint64))
    return found.tobytes()


def parts(file: BinaryIO) -> Iterator[Part]:
    """All parts of a file, from here to its end: pieces first, and each chunk behind what lies below it. The last is the root.

    Raises OSError; ValueError where the file is too large.
    """
    addresses: list[bytes] = []
    size = 0
    while (data := file.read(PIECE)) or not addresses:
        size += len(data)
        if size > LARGEST_FILE:
            raise ValueError(f"it has over {LARGEST_FILE:,} bytes")
        addresses.append(piece_address(data))
        yield Part(addresses[-1], data, False)
    below = PIECE
    while len(addresses) > 1:
        above = []
        for i in range(0, len(addresses), WIDTH):
            group = addresses[i : i + WIDTH]
            if len(group) > 1:
                span, payload = min(below * len(group), size - below * i), b"".join(group)
                group = [chunk_address(span, payload)]
                yield Part(group[0], span.to_bytes(8, "little") + payload, True)
            above.append(group[0])  # the last, where it is alone, goes up as it is
        addresses, below = above, below * WIDTH


def reference_of(path: str | os.PathLike[str]) -> str:
    """The address of a file in hexadecimal. Raises OSError; ValueError where it is too large."""
    with open(path, "rb") as file:
        for part in parts(file):
            last = part.address
    return last.hex()


def read_chunk(address: bytes, data: bytes) -> tuple[int, bytes]:
    """(span, payload) of the chunk with this address. Raises ValueError where the data is not that chunk."""
    span, payload = int.from_bytes(data[:8], "little"), data[8:]
    if not 8 <= len(data) <= 8 + CHUNK or chunk_address(span, payload) != address:
        raise ValueError("it is damaged")
    if span > LARGEST_FILE:
        kind = "encrypted, or stored with redundancy" if span >> 56 else f"of {span:,} bytes"
        raise ValueError(f"it belongs to a file that is {kind}, which is not taken")
    if len(payload) != (span if span <= CHUNK else ADDRESS * -(-span // part_of(span))):
        raise ValueError("its length is not what its file asks for")
    return span, payload


def part_of(span: int) -> int:
    """Bytes of all parts but the last of a file of more than CHUNK bytes."""
    size = CHUNK
    while size * WIDTH < span:
        size *= WIDTH
    return size


def parts_below(span: int, payload: bytes) -> Iterator[tuple[bytes, int]]:
    """(address, bytes) of the parts of a file of more than CHUNK bytes, out of its chunk."""
    size = part_of(span)
    for i in range(0, len(payload), ADDRESS):
        yield payload[i : i + ADDRESS], min(size, span - size * (i // ADDRESS))
