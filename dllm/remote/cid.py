"""CIDs: what a block of IPFS is called, which is a hash of what it holds.

Sources: https://github.com/multiformats/cid (versions 0 and 1), https://github.com/multiformats/multicodec (numbers of codecs
and hashes), https://github.com/multiformats/unsigned-varint, https://datatracker.ietf.org/doc/html/rfc4648 (base32).
"""

from __future__ import annotations

import base64
import hashlib
from dataclasses import dataclass

from ..errors import UserError, shown

RAW, DAG_PB = 0x55, 0x70  # codecs: bytes as they are; a node with links
SHA256, DIGEST = 0x12, 32  # the hash, and its bytes
BASE58 = "123456789ABCDEFGHJKLMNPQRSTUVWXYZabcdefghijkmnopqrstuvwxyz"


@dataclass(frozen=True, slots=True)
class Cid:
    """The name of a block. One of version 0 becomes that of version 1 for the same block."""

    codec: int
    digest: bytes  # (32,) sha256 of the block

    @classmethod
    def of(cls, codec: int, block: bytes) -> Cid:
        """That of a block."""
        return cls(codec, hashlib.sha256(block).digest())

    @classmethod
    def parse(cls, text: str) -> Cid:
        """That of a text: version 1 in base32, or version 0, which begins with Qm. Raises UserError."""
        try:
            if text.startswith("Qm") and len(text) == 46:
                number = 0
                for letter in text:
                    number = number * 58 + BASE58.index(letter)
                return cls.from_bytes(number.to_bytes(34, "big"))
            found = cls.from_bytes(base64.b32decode(text[1:].upper() + "=" * (-(len(text) - 1) % 8)))
        except (ValueError, OverflowError):
            found = None
        if found is None or str(found) != text:
            raise UserError(f"{shown(text)} is not a CID: those known here have sha2-256 and begin with bafy, bafk or Qm")
        return found

    @classmethod
    def from_bytes(cls, data: bytes) -> Cid:
        """That of its binary form, of version 0 or 1. Raises ValueError."""
        if len(data) == 34 and data[:2] == bytes((SHA256, DIGEST)):
            return cls(DAG_PB, data[2:])
        if len(data) == 36 and data[0] == 1 and data[1] in (RAW, DAG_PB) and data[2:4] == bytes((SHA256, DIGEST)):
            return cls(data[1], data[4:])
        raise ValueError("a CID of another codec or hash than those of files")

    def __bytes__(self) -> bytes:
        return bytes((1, self.codec, SHA256, DIGEST)) + self.digest

    def __str__(self) -> str:
        return "b" + base64.b32encode(bytes(self)).decode().lower().rstrip("=")

    def names(self, block: bytes) -> bool:
        """Whether a block is the one that has this name."""
        return hashlib.sha256(block).digest() == self.digest


def varint(number: int) -> bytes:
    """An unsigned number in groups of seven bits, the lowest first."""
    out = bytearray()
    while number > 127:
        out.append(number & 127 | 128)
        number >>= 7
    out.append(number)
    return bytes(out)


def read_varint(data: bytes, place: int) -> tuple[int, int]:
    """The number at `place`, below 2**63, and the place behind it. Raises ValueError."""
    number = shift = 0
    while True:
        if place >= len(data) or shift > 56:
            raise ValueError("a number that does not end")
        byte = data[place]
        place += 1
        number |= (byte & 127) << shift
        shift += 7
        if byte < 128:
            return number, place
