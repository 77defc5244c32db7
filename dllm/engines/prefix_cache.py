"""States behind prefixes of earlier texts, so that what continues one need not read it again."""

import bisect
import hashlib
from collections import Counter, OrderedDict

from ..kernels.types import Array

OVERHEAD = 300  # bytes of an entry beside its state


class PrefixCache:
    """Tokens -> state, the least recently used leave first.

    Entries are found by BLAKE2b of their tokens (Aumasson et al. 2013), which nobody can make collide: a text never gets
    the state of another. Its key is the salt, so what was kept with one salt is not there for whoever has another.

    Parameters
    ----------
    limit : int
        Bytes; 0: nothing is kept.

    Attributes
    ----------
    bytes : int
        That it holds.
    hits : int
        How often `find` has found a prefix.
    """

    def __init__(self, limit: int) -> None:
        self.limit, self.bytes, self.hits = limit, 0, 0
        self._entries: OrderedDict[bytes, tuple[int, Array]] = OrderedDict()  # digest -> (length, state)
        self._count: Counter[int] = Counter()  # how many entries have a length
        self._lengths: list[int] = []  # those there are, sorted

    def find(self, salt: bytes, tokens: Array, beyond: int = 0) -> tuple[int, Array | None]:
        """The longest prefix of tokens (n,) int64 that is known with this salt: its length and its state, not to be written to.

        (0, None) where none is longer than `beyond`.
        """
        found, hasher, at = [], hashlib.blake2b(digest_size=20, key=salt), 0
        first, stop = (bisect.bisect_right(self._lengths, length) for length in (beyond, len(tokens)))
        for length in self._lengths[first:stop]:
            hasher.update(tokens[at:length].tobytes())
            at = length
            digest = hasher.digest()
            if digest in self._entries:
                found.append(digest)
        if not found:
            return 0, None
        self.hits += 1
        self._entries.move_to_end(found[-1])
        return self._entries[found[-1]]

    def put(self, salt: bytes, tokens: Array, state: Array) -> None:
        """Keep a copy of the state behind tokens (n,) int64, for those who have this salt, of at most 64 bytes."""
        size = state.nbytes + OVERHEAD
        if size > self.limit or len(tokens) == 0:
            return
        digest = hashlib.blake2b(tokens.tobytes(), digest_size=20, key=salt).digest()
        if digest in self._entries:
            self._entries.move_to_end(digest)
            return
        length = len(tokens)
        self._entries[digest] = length, state.copy()
        self._count[length] += 1
        if self._count[length] == 1:
            bisect.insort(self._lengths, length)
        self.bytes += size
        while self.bytes > self.limit:
            _, (length, state) = self._entries.popitem(last=False)
            self.bytes -= state.nbytes + OVERHEAD
            self._count[length] -= 1
            if not self._count[length]:
                del self._count[length]
                self._lengths.remove(length)
