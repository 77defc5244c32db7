"""Which line of its files each pair of a corpus was: pairs are shuffled, and what is said of them belongs to those lines."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ..errors import UserError
from ..kernels.types import Array

MOST_LINES = 1 << 28  # of files whose order is told
LEAST_SHARE = 1e-6  # of the pairs of files that a split can be
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
        if not (whole and lists and _plausible(order, entry["pairs"])):
            raise damaged
        found = _lines(order)
    except (KeyError, TypeError, IndexError, ValueError):
        raise damaged from None
    if _check(found) != order["check"]:  # also where another NumPy draws otherwise
        raise damaged
    return found


def _plausible(order: Mapping[str, Any], pairs: int) -> bool:
    """Whether an order is of so many pairs, and of no more lines than they can be a share of: drawing takes memory."""
    empty, long = set(order["empty"]), set(order["long"])
    lines, start, stop = (int(order[name]) for name in ("lines", "start", "stop"))
    part, whole = stop - start, lines - len(empty)
    return (
        lines <= MOST_LINES
        and max(empty, default=-1) < lines
        and 0 <= start <= stop <= whole
        and max(long, default=-1) < part
        and part - len(long) == pairs
        and whole * LEAST_SHARE <= part + 2  # both ends are rounded
    )


def _lines(order: Mapping[str, Any]) -> Array:
    empty = np.unique(np.array(order["empty"], np.int64))
    part = drawn(order["seed"], order["lines"] - len(empty))[order["start"] : order["stop"]]
    part = np.delete(part, order["long"])
    found: Array = part + np.searchsorted(empty - np.arange(len(empty)), part, side="right")  # as many lines on as are empty
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
