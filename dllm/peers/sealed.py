"""A sealed channel between two ranks: both are who they say they are, and nobody else reads, changes, repeats or drops a word.

Each rank makes a key pair of X25519 (RFC 7748) when it starts, and public keys go to all ranks by MPI. Of a connection, key of
a direction and what is sent are

    key         = HKDF-SHA256(salt = nonce of the caller | nonce of the other | what it is about,
                              ikm = X25519 secret | common secret, info = caller, other, direction)   (RFC 5869)
    frame n     = length | ChaCha20Poly1305(key, nonce = n, what is sealed, aad = length)             (RFC 8439)
    what is sealed = length of the message | message | zeros up to a multiple of PAD

    other  -> caller    nonce, 32 bytes
    caller -> other     its rank, its nonce and a seal of them, 52 bytes, as frame 1; and at once, unasked, the first message

The nonces make every connection's keys new, so nothing can be repeated; info keeps a frame from being sent back to its sender.
A rank's private key opens nothing between two others. Sizes are rounded up, since the length of a text's parts tells of it
(Weiss et al. 2024, "What was your prompt?").

A rank that has died may be replaced by a process that MPI does not know (joining.py). It has a new key pair, a later life of
the rank, and the job's secret, 32 bytes that rank 0 drew. Rank 0 sent them to each of the others sealed by the key of the two,
never in clear; on each host they stand in a file of its user alone. Then

    key between two, one of them in a later life  = HKDF-SHA256(..., ikm = X25519 secret | the job's secret, ...)
    key of the doors, where ranks are joined      = HKDF-SHA256(..., ikm = the job's secret, ...)

so that who changes a public key on its way gets nowhere, and the key of a dead rank opens nothing once its next life is known.
Who has the secret can take the place of a dead rank, and then gets prompts; that is who can read files of the server's user, or
is a rank. He cannot read what other ranks say to each other. What goes through a door is the load of ranks and public keys: who
recorded it and gets hold of the secret later can read that, but no prompt, for which he would need a rank's private key.
"""

from __future__ import annotations

import asyncio
import copy
import secrets
from collections.abc import Sequence

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from ..errors import UserError

RANK, NONCE, LENGTH, TAG = 4, 32, 4, 16  # bytes
STRANGER = (1 << 8 * RANK) - 1  # in the place of a rank's number: one that is to become a rank
PAD = 256  # bytes
LARGEST = 16 << 20  # bytes of a message


class NotSealed(ValueError):
    """What came is not from whom it should be, or not what was sent."""


class Keys:
    """A rank's key pair, and what it shares with each other rank.

    Attributes
    ----------
    rank : int
        This one.
    public : str
        What the other ranks shall have, hexadecimal.
    publics : dict
        rank -> the public key of its newest life, of all whose keys are known.
    secret : bytes
        Of the job; empty where no rank can be replaced.
    """

    def __init__(self, rank: int, secret: bytes = b"") -> None:
        self.rank, self.secret, self._private = rank, secret, X25519PrivateKey.generate()
        self._about = b""
        self.public = self._private.public_key().public_bytes_raw().hex()
        self.publics = {rank: self.public}
        self._shared: dict[int, bytes] = {}

    def agree(self, publics: Sequence[str], common: bytes = b"") -> None:
        """Take in the public keys of all ranks. Raises UserError where one is none.

        common : that all ranks have otherwise than by MPI, so that who changes the keys on their way gets nowhere
        """
        for rank, public in enumerate(publics):
            if rank != self.rank:
                try:
                    self._share(rank, public, common)
                except ValueError:
                    raise UserError(f"rank {rank} sent no public key: start all ranks with the same version of dllm") from None

    def about(self, what: bytes) -> Keys:
        """The same for connections that are about this alone: of one that is about something else they open nothing."""
        keys = copy.copy(self)
        keys._about = what
        return keys

    def renew(self, rank: int, public: str) -> None:
        """Take in the public key of a later life of a rank, or, in such a life, of any rank; where it is none, forget it."""
        try:
            self._share(rank, public, self.secret)
        except ValueError:
            self._shared.pop(rank, None)
            self.publics.pop(rank, None)

    def _share(self, rank: int, public: str, common: bytes) -> None:
        theirs = X25519PublicKey.from_public_bytes(bytes.fromhex(public))
        self._shared[rank] = self._private.exchange(theirs) + common
        self.publics[rank] = public

    def of_connection(self, caller: int, other: int, nonces: bytes) -> tuple[Seal, Seal]:
        """What seals the frames to `other`, and those to `caller`. Raises NotSealed where that is no rank."""
        shared = self._shared.get(caller if other == self.rank else other)
        if shared is None:
            raise NotSealed(f"there is no other rank {caller}")
        return _seals(shared, b"dllm serve %d calls %d, " % (caller, other), nonces + self._about)

    def sealed_secret(self, rank: int) -> str:
        """The job's secret for one other rank, hexadecimal: of one call, for it is always sealed by the same key."""
        return self._of_secret(self.rank, rank).close(self.secret, b"").hex()

    def open_secret(self, rank: int, sealed: str) -> None:
        """Take in the job's secret as `rank` has sealed it for this one. Raises ValueError where it has not."""
        self.secret = self._of_secret(rank, self.rank).open(bytes.fromhex(sealed), b"")

    def _of_secret(self, giver: int, taker: int) -> Seal:
        shared = self._shared[taker if giver == self.rank else giver]
        return _seals(shared, b"dllm serve secret from %d to %d, " % (giver, taker), b"")[0]


class DoorKeys:
    """What opens the door of any rank: the job's secret. As Keys, for `call` and `welcome`.

    Parameters
    ----------
    rank : int
        This one, or STRANGER.
    secret : bytes
    """

    def __init__(self, rank: int, secret: bytes) -> None:
        self.rank, self._secret = rank, secret

    def of_connection(self, caller: int, other: int, nonces: bytes) -> tuple[Seal, Seal]:
        """What seals the frames to `other`, and those to `caller`."""
        return _seals(self._secret, b"dllm serve door, %d calls %d, " % (caller, other), nonces)


def _seals(key: bytes, ends: bytes, nonces: bytes) -> tuple[Seal, Seal]:
    directions = ends + b"question", ends + b"answer"
    question, answer = (Seal(HKDF(SHA256(), length=32, salt=nonces, info=info).derive(key)) for info in directions)
    return question, answer


class Seal:
    """One direction of a connection: a key, and a count of what was sealed or opened by it."""

    def __init__(self, key: bytes) -> None:
        self._cipher, self._count = ChaCha20Poly1305(key), 0

    def _nonce(self) -> bytes:
        self._count += 1
        return self._count.to_bytes(12, "little")

    def close(self, data: bytes, beside: bytes) -> bytes:
        """`data` encrypted, TAG bytes longer; `beside` is not encrypted, and whoever opens must have the same."""
        return self._cipher.encrypt(self._nonce(), data, beside)

    def open(self, data: bytes, beside: bytes) -> bytes:
        """What was closed. Raises NotSealed where it was not closed by this key, as the next thing, as it is now."""
        try:
            return self._cipher.decrypt(self._nonce(), data, beside)
        except InvalidTag:
            raise NotSealed("a frame that the other rank has not sent") from None


class Channel:
    """Messages of bytes over a connection whose two ends have proved themselves.

    Parameters
    ----------
    reader : asyncio.StreamReader
    writer : asyncio.StreamWriter
    closing : Seal
        Of what is sent.
    opening : Seal
        Of what comes.
    """

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, closing: Seal, opening: Seal) -> None:
        self.reader, self.writer, self._closing, self._opening = reader, writer, closing, opening

    async def send(self, message: bytes) -> None:
        """Send a message. Raises OSError, or ValueError where it is longer than LARGEST."""
        frame = self._frame(message)
        self.writer.write(frame)
        await self.writer.drain()

    def _frame(self, message: bytes) -> bytes:
        if len(message) > LARGEST:
            raise ValueError(f"a message of {len(message)} bytes")
        size = LENGTH + len(message)
        padded = (len(message).to_bytes(LENGTH) + message).ljust(-(-size // PAD) * PAD, b"\0")
        length = (len(padded) + TAG).to_bytes(LENGTH)
        return length + self._closing.close(padded, length)

    async def receive(self, most: int = LARGEST) -> bytes:
        """The next message. Raises OSError, EOFError, or NotSealed. Who gives up in the midst of one must close the channel.

        most : bytes of it
        """
        length = await self.reader.readexactly(LENGTH)
        size = int.from_bytes(length)
        if not PAD + TAG <= size <= most + LENGTH + PAD + TAG:
            raise NotSealed(f"a frame of {size} bytes")
        padded = self._opening.open(await self.reader.readexactly(size), length)
        return padded[LENGTH : LENGTH + int.from_bytes(padded[:LENGTH])]


async def call(
    keys: Keys | DoorKeys, other: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, message: bytes
) -> Channel:
    """Begin to talk with rank `other` by a message that only this rank can read, whoever has answered the call.

    Raises OSError, EOFError, NotSealed.
    """
    nonce = secrets.token_bytes(NONCE)
    theirs = await reader.readexactly(NONCE)
    closing, opening = keys.of_connection(keys.rank, other, nonce + theirs)
    hello = keys.rank.to_bytes(RANK) + nonce
    writer.write(hello + closing.close(b"", hello))
    channel = Channel(reader, writer, closing, opening)
    await channel.send(message)
    return channel


async def welcome(keys: Keys | DoorKeys, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> Channel:
    """A channel with the rank that has called, of which 52 bytes are read before it has proved that it is one.

    Raises OSError, EOFError, NotSealed.
    """
    nonce = secrets.token_bytes(NONCE)
    writer.write(nonce)
    hello = await reader.readexactly(RANK + NONCE)
    opening, closing = keys.of_connection(int.from_bytes(hello[:RANK]), keys.rank, hello[RANK:] + nonce)
    opening.open(await reader.readexactly(TAG), hello)
    return Channel(reader, writer, closing, opening)


class Gate:
    """Where other ranks come in, and strangers do not. Of too many who prove nothing, those go that have had the longest time.

    Parameters
    ----------
    keys : Keys or DoorKeys
    most : int
        Connections at once of those who have not proved to be ranks.
    patience : float
        Seconds that each of them has.
    """

    def __init__(self, keys: Keys | DoorKeys, most: int, patience: float) -> None:
        self.keys, self.most, self.patience = keys, most, patience
        self.strangers: dict[asyncio.StreamWriter, None] = {}  # in the order in which they came

    async def welcome(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> Channel:
        """A channel with whoever proves to be a rank. Raises OSError, EOFError, NotSealed."""
        self.strangers[writer] = None
        if len(self.strangers) > self.most:
            next(iter(self.strangers)).transport.abort()
        try:
            async with asyncio.timeout(self.patience):
                return await welcome(self.keys, reader, writer)
        finally:
            self.strangers.pop(writer, None)
