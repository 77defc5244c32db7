"""Text into pre-tokens, as GPT-2 splits it, each distinct one numbered, so that what is made of one is made once.

A text is points (n,) uint32, its characters' code points. In each block of lines the first of these alternatives that fits is
taken, from left to right, as the regular expression of byte-level BPE has it (Radford et al. 2019):

    's|'t|'re|'ve|'m|'ll|'d| ?\\p{L}+| ?\\p{N}+| ?[^\\s\\p{L}\\p{N}]+|\\s+(?!\\S)|\\s+

A table of pre-tokens holds their points one behind the other; a pre-token's number is its place. Slots point to them by hash,
and what a slot points to is compared, so equal hashes do no harm.
"""

import numpy as np

from .compile import kernel
from .types import Array

LETTER, NUMBER, OTHER, SPACE, UNKNOWN = range(5)  # kinds of characters; UNKNOWN: not looked up yet
_QUOTE, _BLANK, _NEWLINE = 39, 32, 10
_PRIME, _MIX = 0x100000001B3, 0x9E3779B97F4A7C15


@kernel
def split(stops: Array, points: Array, kinds: Array, block: int) -> int:
    """How many pre-tokens a text has; stops (n,) int64: where each ends.

    kinds (0x110000,) uint8 : of each code point of the text
    block : a block ends behind the first newline that has at least so many characters of the block before it
    """
    found, begin, n = 0, 0, points.size
    while begin < n:
        end = begin + block
        while end < n and points[end] != _NEWLINE:
            end += 1
        end = min(end + 1, n)
        at = begin
        while at < end:
            at = _stop(points, kinds, at, end)
            stops[found] = at
            found += 1
        begin = end
    return found


@kernel
def _stop(points: Array, kinds: Array, at: int, end: int) -> int:
    """Where the pre-token ends that begins at `at`."""
    first, kind, stop = points[at], kinds[points[at]], at + 1
    if first == _QUOTE and stop < end:
        one = points[stop]
        if one == 115 or one == 116 or one == 109 or one == 100:  # s t m d
            return stop + 1
        if stop + 1 < end:
            two = points[stop + 1]
            if (one == 114 and two == 101) or (one == 118 and two == 101) or (one == 108 and two == 108):  # re ve ll
                return stop + 2
    if first == _BLANK and stop < end and kinds[points[stop]] != SPACE:
        kind = kinds[points[stop]]
        stop += 1
    while stop < end and kinds[points[stop]] == kind:
        stop += 1
    if kind == SPACE and stop < end and stop - at > 1:
        stop -= 1  # the last blank belongs to what follows, or stands alone
    return stop


@kernel
def number(
    numbers: Array, points: Array, stops: Array, slots: Array, hashes: Array, begins: Array, arena: Array, known: int
) -> int:
    """Give pre-tokens their numbers (m,) int32; new ones are added. Returns how many the table holds then.

    stops (m,) int64 : of `split`
    slots (a power of 2,) int32 : -1 where empty; more than half stay so
    hashes (entries,) uint64, begins (entries + 1,) int64, arena (all points,) uint32 : the table; with room for all
    known : pre-tokens that it holds
    """
    mask, begin = np.uint64(slots.size - 1), 0
    for token in range(stops.size):
        stop = stops[token]
        value = np.uint64(_MIX)
        for at in range(begin, stop):
            value = (value ^ np.uint64(points[at])) * np.uint64(_PRIME)
        value = (value ^ (value >> np.uint64(29))) * np.uint64(_MIX)
        value ^= value >> np.uint64(32)
        slot = value & mask
        while True:
            entry = slots[slot]
            if entry < 0:
                break
            if hashes[entry] == value and begins[entry + 1] - begins[entry] == stop - begin:
                start, same = begins[entry], True
                for at in range(stop - begin):
                    if arena[start + at] != points[begin + at]:
                        same = False
                        break
                if same:
                    break
            slot = (slot + np.uint64(1)) & mask
        if entry < 0:
            entry = known
            known += 1
            slots[slot], hashes[entry] = entry, value
            start = begins[entry]
            for at in range(stop - begin):
                arena[start + at] = points[begin + at]
            begins[entry + 1] = start + stop - begin
        numbers[token] = entry
        begin = stop
    return known


@kernel
def expand(out: Array, numbers: Array, begins: Array, values: Array) -> int:
    """Write values[begins[k]:begins[k + 1]] of each number k one behind the other; returns how many there are."""
    found = 0
    for n in range(numbers.size):
        for at in range(begins[numbers[n]], begins[numbers[n] + 1]):
            out[found] = values[at]
            found += 1
    return found
