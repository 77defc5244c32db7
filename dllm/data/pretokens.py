"""Pre-tokens of byte-pair encoding: split, counted and encoded by kernels, each distinct one once; merges out of their counts.

The results are those of the `tokenizers` library, which is asked for what it makes of a character and of a pre-token, and stays
the measure in the tests.
"""

from __future__ import annotations

import itertools
import threading
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from ..kernels.types import Array

BLOCK = 16384  # characters of text that are split together: up to the end of a line
MOST = 1 << 19  # pre-tokens that are kept
MOST_POINTS = 1 << 23  # characters of these


class Pretokens:
    """The distinct pre-tokens of texts, numbered, and what each is encoded as. Of one thread at a time.

    splitter : the library's pre-tokenizer
    encode : given pre-tokens, the tokens (n,) of each
    """

    def __init__(self, splitter: Any, encode: Callable[[list[str]], Sequence[Sequence[int]]] | None = None) -> None:
        self._kinds, self._encode, self._lock = Kinds(splitter), encode, threading.Lock()
        self._clear(1, 1)

    def _clear(self, entries: int, points: int) -> None:
        self._slots = np.full(max(1 << 12, 4 << entries.bit_length()), -1, np.int32)
        self._hashes, self._begins = np.zeros(entries, np.uint64), np.zeros(entries + 1, np.int64)
        self._arena = np.zeros(points, np.uint32)
        self._texts: list[str] = []
        self._value_begins, self._values = np.zeros(entries + 1, np.int64), np.zeros(points, np.int32)

    def count(self, text: str) -> Counter[str]:
        """How often each pre-token is in a text."""
        with self._lock:
            found = np.bincount(self._numbers(text), minlength=len(self._texts))
            return Counter({self._texts[number]: int(found[number]) for number in np.flatnonzero(found)})

    def encode(self, text: str) -> Array:
        """The tokens (n,) int64 of a text."""
        from ..kernels import pieces

        with self._lock:
            numbers = self._numbers(text)
            out = np.empty(int(np.diff(self._value_begins)[numbers].sum()), np.int64)
            pieces.expand(out, numbers, self._value_begins, self._values)
            return out

    def _numbers(self, text: str) -> Array:
        """The numbers (m,) int32 of a text's pre-tokens, in order."""
        from ..kernels import pieces

        points = np.frombuffer(text.encode("utf-32-le"), np.uint32)
        stops = np.empty(len(points), np.int64)
        stops = stops[: pieces.split(stops, points, self._kinds.of(points), BLOCK)]
        self._make_room(len(stops), len(points))
        numbers, known = np.empty(len(stops), np.int32), len(self._texts)
        now = pieces.number(numbers, points, stops, self._slots, self._hashes, self._begins, self._arena, known)
        self._learn(known, now)
        return numbers

    def _make_room(self, entries: int, points: int) -> None:
        known = len(self._texts)
        if known + entries < len(self._hashes) and self._begins[known] + points <= len(self._arena):
            return
        if known > MOST or self._begins[known] > MOST_POINTS:
            self._clear(MOST + entries, MOST_POINTS + points)
            return
        old = self._slots, self._hashes, self._begins, self._arena, self._texts, self._value_begins, self._values
        self._clear(min(2 * known, MOST) + entries + 1, min(2 * int(old[2][known]), MOST_POINTS) + points)
        from ..kernels import pieces

        self._texts = old[4]
        stops, numbers = old[2][1 : known + 1], np.empty(known, np.int32)
        pieces.number(numbers, old[3], stops, self._slots, self._hashes, self._begins, self._arena, 0)
        self._value_begins[: known + 1] = old[5][: known + 1]
        self._values = old[6]

    def _learn(self, known: int, now: int) -> None:
        """Take in what the table has new."""
        if now == known:
            return
        first = self._begins[known]
        whole = self._arena[first : self._begins[now]].tobytes().decode("utf-32-le")
        places = (self._begins[known : now + 1] - first).tolist()
        new = [whole[start:stop] for start, stop in itertools.pairwise(places)]
        self._texts += new
        if self._encode is None:
            return
        values = self._encode(new)
        lengths = np.fromiter(map(len, values), np.int64, len(values))
        start = self._value_begins[known]
        self._value_begins[known + 1 : now + 1] = start + np.cumsum(lengths)
        stop = self._value_begins[now]
        if stop > len(self._values):
            self._values = np.concatenate([self._values, np.zeros(stop, np.int32)])
        self._values[start:stop] = np.fromiter((one for part in values for one in part), np.int32, stop - start)


class Kinds:
    """What kind each character is for the library: letter, number, blank or other. It is asked once for each that comes."""

    def __init__(self, splitter: Any) -> None:
        from ..kernels import pieces

        self._splitter, self._table = splitter, np.full(0x110000, pieces.UNKNOWN, np.uint8)
        self._examples = (("a", pieces.LETTER), ("1", pieces.NUMBER), ("!", pieces.OTHER), ("", pieces.SPACE))

    def of(self, points: Array) -> Array:
        """The table (0x110000,) uint8 of kinds, right for all characters of a text, its points (n,)."""
        from ..kernels import pieces

        unknown = points[self._table[points] == pieces.UNKNOWN]
        for point in np.unique(unknown).tolist():
            self._table[point] = self._kind(chr(point))
        return self._table

    def _kind(self, letter: str) -> int:
        split = self._splitter.pre_tokenize_str
        return next(kind for example, kind in self._examples if len(split(example + letter)) == 1)


def letters() -> dict[str, int]:
    """GPT-2's letters for the 256 bytes: printable ones stand for themselves, the others for U+0100 onwards."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + place): byte for place, byte in enumerate(others)}


def find_merges(counts: Mapping[str, int], size: int, longest: int) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """(vocabulary {token: number}, merges [(left, right)]) of pre-tokens and how often each is there, in letters for bytes.

    size : tokens at most, 256 or more
    longest : letters of a token
    """
    from ..kernels import merges

    alphabet = sorted(letters().items())  # their numbers are their places here
    byte_of = np.array([byte for _, byte in alphabet], np.uint8)
    words = [word for word, count in counts.items() if count > 0]
    coded = [word.encode() for word in words]
    symbols = np.argsort(byte_of).astype(np.int32)[np.frombuffer(b"".join(coded), np.uint8)]
    begins = np.cumsum([0, *map(len, coded)], dtype=np.int64)
    weights = np.fromiter(map(counts.__getitem__, words), np.int64, len(words))
    merged, starts = np.empty((2 * size, 3), np.int64), np.zeros(size + 1, np.int64)
    starts[:257] = np.arange(257)
    done, texts = merges.find_merges(merged, byte_of, starts, symbols, begins, weights, size, longest)
    letter = {byte: one for one, byte in alphabet}
    tokens = int(merged[:done, 2].max(initial=255)) + 1
    names = ["".join(letter[byte] for byte in texts[starts[k] : starts[k + 1]].tolist()) for k in range(tokens)]
    return {name: number for number, name in enumerate(names)}, [(names[a], names[b]) for a, b, _ in merged[:done].tolist()]
