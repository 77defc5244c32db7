"""Which line of its files each pair of a corpus was: pairs are shuffled, and what is said of them belongs to those lines."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ..errors import UserError
from ..kernels.types import Array

MOST_LINES = 1 << 28  # of files whose order is told
MOST_LEFT_OUT = 100_000  # pairs
NUMBERS = ("seed", "lines", "start", "stop", "check")


def drawn(seed: int, pairs: int) -> Array:
    """The order (pairs,) int64 in which pairs of files come."""
    return np.random.default_rng(seed).permutation(pairs)


def described(seed: int, lines: int, empty: Sequence[int], part: tuple[int, int], long: Sequence[int]) -> dict[str, Any]:
    """What the manifest says of a split's order; nothing where it would be too long.

    lines : of all files together
    empty : lines of which a side is empty, which are no pairs
    part : from where to where the split takes the drawn order
    long : places in that part of pairs that are left out
    """
    if lines > MOST_LINES or len(empty) + len(long) > MOST_LEFT_OUT:
        return {}
    start, stop = part
    entry = {"seed": seed, "lines": lines, "start": start, "stop": stop, "empty": [*empty], "long": [*long]}
    return {"order": entry | {"check": _check(_lines(entry))}}


def lines_of(entry: Mapping[str, Any], place: str) -> Array | None:
    """For each pair of a split's entry in a manifest its line, (pairs,) int64, from 0. Raises UserError.

    None where the entry does not say.
    """
    order = entry.get("order")
    if order is None:
        return None
    damaged = UserError(f"the order of pairs in {place} is damaged; prepare the data anew")
    try:
        whole = all(type(order[name]) is int and order[name] >= 0 for name in NUMBERS)
        lists = all(type(one) is int and one >= 0 for name in ("empty", "long") for one in order[name])
        if not (whole and lists and order["start"] <= order["stop"] <= order["lines"] <= MOST_LINES):
            raise damaged
        found = _lines(order)
    except (KeyError, TypeError, IndexError, ValueError):
        raise damaged from None
    if len(found) != entry["pairs"] or _check(found) != order["check"]:  # also where another NumPy draws otherwise
        raise damaged
    return found


def _lines(order: Mapping[str, Any]) -> Array:
    pairs = np.delete(np.arange(order["lines"]), order["empty"])
    part = drawn(order["seed"], len(pairs))[order["start"] : order["stop"]]
    found: Array = pairs[np.delete(part, order["long"])]
    return found


def _check(lines: Array) -> int:
    return zlib.crc32(lines.astype("<i8").tobytes())


def in_order_of_lines(texts: Sequence[str], lines: Array, whole: bool, count: int) -> list[str]:
    """`texts` as their lines stand in the files. whole: all `count` lines of these, "" for pairs that were left out."""
    if not whole:
        return [texts[place] for place in np.argsort(lines)]
    found = [""] * count
    for line, text in zip(lines.tolist(), texts, strict=True):
        found[line] = text
    return found
