"""The tokens by which clients are known: where they come from, and who has which."""

from __future__ import annotations

import hashlib
import hmac
import os
import stat
from collections.abc import Sequence

from ..errors import UserError, reason

VARIABLE = "DLLM_TOKEN"
MIN_TOKEN = 16  # characters
LARGEST_FILE = 1 << 16  # bytes
SALT = 32  # bytes of what is drawn from a client's token


def read_tokens(path: str | None) -> tuple[str, ...]:
    """The tokens in a file, one a line, each of a client of its own, or the one in DLLM_TOKEN; empty where there are none.

    Lines that begin with # are left out. Raises UserError where the file is not this user's alone, or a token is too short.
    """
    if path:
        tokens = tuple(dict.fromkeys(line.strip() for line in _read(path).splitlines() if line.strip()[:1] not in ("", "#")))
        if not tokens:
            raise UserError(f"--token-file {path} has no token: write a long random word into it, one a line")
    else:
        tokens = (os.environ[VARIABLE],) if os.environ.get(VARIABLE) else ()
    for number, token in enumerate(tokens, 1):
        if len(token) < MIN_TOKEN or not token.isascii() or not token.isprintable() or " " in token:
            which = f"token {number} of {len(tokens)}" if len(tokens) > 1 else "the token"
            raise UserError(f"{which} must be at least {MIN_TOKEN} printable ASCII characters without spaces")
    return tokens


def _read(path: str) -> str:
    """The text of a file that nobody else can read. Raises UserError."""
    try:
        with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY), "rb") as file:
            found = os.fstat(file.fileno())
            if not stat.S_ISREG(found.st_mode):
                raise UserError(f"--token-file {path} is no regular file")
            if found.st_uid not in (os.geteuid(), 0):
                raise UserError(f"--token-file {path} belongs to another user, who knows the tokens: make a file of your own")
            # Kubernetes mounts secrets of root's for a group, that of this process.
            for_us = os.geteuid() != 0 == found.st_uid and found.st_gid in (os.getegid(), *os.getgroups())
            if found.st_mode & (0o037 if for_us else 0o077):
                raise UserError(f"--token-file {path} can be read or written by others: chmod 600 {path}")
            data = file.read(LARGEST_FILE + 1)
        if len(data) > LARGEST_FILE:
            raise UserError(f"--token-file {path} has more than {LARGEST_FILE} bytes")
        return data.decode()
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read --token-file {path}: {reason(error)}") from None


class Clients:
    """Who may ask: whoever has one of some tokens, or everybody where there are none.

    Parameters
    ----------
    tokens : sequence of str
    """

    def __init__(self, tokens: Sequence[str] = ()) -> None:
        self._digests = [hashlib.sha256(token.encode()).digest() for token in tokens]

    @property
    def needed(self) -> bool:
        """Whether clients need a token."""
        return bool(self._digests)

    def salt_of(self, authorization: bytes) -> bytes | None:
        """What sets this client apart from others, of its header Authorization; None: it has no token that is known.

        It takes as long for any token, whether and wherever it is among those known.
        """
        if not self._digests:
            return b""
        kind, _, given = authorization.partition(b" ")
        digest, found = hashlib.sha256(given.strip()).digest(), b""
        for known in self._digests:
            if hmac.compare_digest(digest, known):
                found = known
        if kind.lower() != b"bearer" or not found:
            return None
        return hashlib.blake2b(found, digest_size=SALT, person=b"dllm client").digest()


def mixed(salt: bytes, text: str) -> bytes:
    """The salt of a client's requests that say "cache_salt": text. Without, it is that of the client."""
    return hashlib.blake2b(text.encode(), digest_size=SALT, key=salt, person=b"dllm salt").digest() if text else salt
