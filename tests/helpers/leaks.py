"""Finds pieces of private texts in what was sent: bytes, and tokens in the forms in which numbers travel.

    detector = Detector({"site 0": b"the text"}, {"site 0": windows})
    assert detector.find(data) == []

A piece is 12 consecutive bytes of a text, or 6 consecutive tokens (12 where a token is one byte) as u1, u2, u4, i8, f4, f8, or
as decimal numbers of JSON. Tokens may stand in the order of the text, in that of a window's rows (time, lanes), sorted and
each once, or each once as they first occur. What stands in base64, as bytes do in JSON, is looked through too. Pieces that
anything could hold are left out: bytes with fewer than 5 different ones, tokens with fewer than 4.
"""

import base64
import binascii
import re

import numpy as np

FORMS = "u1", "u2", "u4", "i8", "f4", "f8"
BYTES, TOKENS = 12, 6  # the length of a piece
DIFFERENT = {"bytes": 5, "tokens": 4}  # at least
LENGTHS = 12, 24, 48  # bytes of a piece, in whatever form
CHUNK = 1 << 16  # offsets that are looked at together
BITS = 22  # of a hash that are looked up at once
SHIFTS = 42, 32, 22  # where they stand: few hashes get to the search
MULTIPLIERS = np.random.default_rng(1).integers(1 << 62, 1 << 63, 7, np.uint64) | np.uint64(1)
DECIMALS = re.compile(rb"\d{1,10}(?:\s*,\s*\d{1,10}){%d,}" % (TOKENS - 1))
BASE64 = re.compile(rb"[A-Za-z0-9+/]{16,}={0,2}")


class Detector:
    """Knows texts, and finds them.

    Parameters
    ----------
    texts : dict of str to bytes, or sequence of bytes
        name -> a private text.
    windows : dict of str to sequence of arrays, or sequence of arrays
        name -> its windows, each (time, lanes) of tokens as `Lanes.window` gives them, or (time,) of one lane, such as a prompt
        or a whole lane. Columns are in the order of the text.
        Where ranks join what they send, give the ranks' windows of a step side by side too, as one array.
    """

    def __init__(self, texts=(), windows=()):
        self.names, parts = [], {length: [] for length in LENGTHS}  # length -> (hashes, number of the name)

        def learn(pieces, name):
            if len(pieces):
                length = pieces.shape[1]
                parts[length].append((_hashes(_words(pieces.ravel()), length)[::length], len(self.names)))
                self.names.append(name)

        for name, text in texts.items() if isinstance(texts, dict) else ((f"text {n}", text) for n, text in enumerate(texts)):
            learn(_pieces(np.frombuffer(text, np.uint8), BYTES, DIFFERENT["bytes"]), f"bytes of {name}")
        for name, arrays in (windows if isinstance(windows, dict) else {"windows": windows}).items():
            for order, sequences in _orders(arrays).items():
                for form in FORMS:
                    length = max(TOKENS, BYTES // np.dtype(form).itemsize)
                    found = [_pieces(tokens, length, DIFFERENT["tokens"]) for tokens in sequences]
                    tokens = np.concatenate(found) if found else np.empty((0, length), np.int64)
                    if tokens.size and tokens.max() < (256 if form == "u1" else 1 << 16 if form == "u2" else 1 << 24):
                        learn(
                            np.ascontiguousarray(tokens.astype(f"<{form}")).view(np.uint8),
                            f"tokens of {name}, {order}, as {form}",
                        )
        self._known = {length: _Table(found) for length, found in parts.items() if found}

    def find(self, data):
        """What pieces of the texts stand in `data`, bytes: a line for each stretch of them, none where there are none."""
        found = self._search(data)
        for run in DECIMALS.finditer(data):
            numbers = np.array([int(word) for word in run[0].split(b",")], "<i8")
            found += [f"{line}, in decimals at byte {run.start()}" for line in self._search(numbers.tobytes())]
        for run in BASE64.finditer(data):
            try:
                inside = base64.b64decode(run[0][: len(run[0]) // 4 * 4])
            except binascii.Error:
                continue
            found += [f"{line}, in base64 at byte {run.start()}" for line in self._search(inside)]
        return found

    def _search(self, data):
        """The lines for what stands in `data` as it is."""
        data, hits = np.frombuffer(data, np.uint8), []  # offset, number of the name, length
        for begin in range(0, len(data), CHUNK):
            words = _words(data[begin : begin + CHUNK + max(LENGTHS) - 1])
            for length, table in self._known.items():
                where, which = table.look(_hashes(words, length)[:CHUNK])
                hits += [(begin + at, number, length) for at, number in zip(where.tolist(), which.tolist(), strict=True)]
        last, lines = {}, []  # number of the name -> first and last offset of the stretch
        for offset, which, length in hits:
            begin, end = last.get(which, (offset, offset))
            if offset > end:
                lines.append(self._line(data, which, begin, end))
                begin = offset
            last[which] = begin, offset + length
        return lines + [self._line(data, which, begin, end) for which, (begin, end) in last.items()]

    def _line(self, data, which, begin, end):
        return f"{self.names[which]}: bytes {begin} to {end}, {bytes(data[begin : min(end, begin + 48)])!r}"


class _Table:
    """Hashes that are known, looked up many at a time."""

    def __init__(self, parts):
        hashes = np.concatenate([part for part, _ in parts])
        names = np.concatenate([np.full(len(part), name) for part, name in parts])
        self.hashes, first = np.unique(hashes, return_index=True)
        self.names = names[first]
        self.there = {shift: np.zeros(1 << BITS, bool) for shift in SHIFTS}
        for shift, there in self.there.items():
            there[_bits(self.hashes, shift)] = True

    def look(self, hashes):
        """Where in `hashes` known ones are, and the numbers of their names."""
        where = np.flatnonzero(self.there[SHIFTS[0]][_bits(hashes, SHIFTS[0])])
        for shift in SHIFTS[1:]:
            where = where[self.there[shift][_bits(hashes[where], shift)]]
        place = np.minimum(np.searchsorted(self.hashes, hashes[where]), len(self.hashes) - 1)
        well = self.hashes[place] == hashes[where]
        return where[well], self.names[place[well]]


def _bits(hashes, shift):
    """BITS of every hash."""
    return (hashes >> np.uint64(shift) & np.uint64((1 << BITS) - 1)).view(np.int64)


def _pieces(sequence, length, different):
    """(pieces, length) of a sequence's stretches with at least so many different values."""
    if len(sequence) < length:
        return np.empty((0, length), sequence.dtype)
    pieces = np.lib.stride_tricks.sliding_window_view(sequence, length)
    ordered = np.sort(pieces, axis=1)
    return pieces[(np.diff(ordered, axis=1) != 0).sum(axis=1) >= different - 1]


def _orders(arrays):
    """order -> sequences of tokens, int64, in which windows may be sent."""
    grids = [np.asarray(array, np.int64).reshape(len(array), -1) for array in arrays]
    grids = [grid for grid in grids if grid.size]
    lanes = {}  # lanes -> windows of so many; those that follow each other are one text
    for grid in grids:
        lanes.setdefault(grid.shape[1], []).append(grid)
    firsts = [np.unique(grid.ravel(), return_index=True) for grid in grids]
    return {
        "in the text's order": [lane for same in lanes.values() for lane in np.concatenate(same).T],
        "in a window's order": [grid.ravel() for grid in grids if grid.shape[1] > 1],
        "sorted, each once": [values for values, _ in firsts],
        "each once as they come": [values[np.argsort(first)] for values, first in firsts],
    }


def _hashes(words, length):
    """(n,) uint64 of every stretch of `length` bytes, which is 12, 24 or 48, of `_words`."""
    count = max(len(words) - length + 8, 0)
    total = words[:count] * MULTIPLIERS[0]
    for number, at in enumerate([4] if length == 12 else range(8, length, 8), 1):
        total += words[at : at + count] * MULTIPLIERS[number]
    return total * MULTIPLIERS[-1]


def _words(data):
    """(len - 7,) uint64 that begin at every byte, mixed."""
    words = np.empty(max(len(data) - 7, 0), "<u8")
    for offset in range(min(8, len(words))):
        words[offset::8] = np.ndarray((len(data) - offset) // 8, "<u8", data, offset)
    return words ^ words >> np.uint64(32)  # of doubles the upper bits alone say something, and products carry upwards
