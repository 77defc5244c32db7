"""Lanes of pairs: every window of a lane is one pair, from zero states, as generation is; targets alone are predicted.

A pair is never cut and sees nothing of the pair before it (train.carry = window). Of benchmarks/translation.py --spaced a
model of 128 units had 98 % exactly right after 1,100 such steps, 42 % where two pairs in a row shared a window, and 1 % where
states were carried on. A window is as wide as its longest pair. So that little of it is padding, the pairs of a lane are
sorted by length, a group of them at a time, and taken in an order that is the same for all lanes but otherwise random: the
pairs of a window are about equally long.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import UserError
from ..kernels.softmax import IGNORE
from ..kernels.types import Array
from .lanes import NOTHING, Lanes

if TYPE_CHECKING:
    from .corpus import Corpus
    from .placing import ShardFile

GROUP = 512  # pairs that are sorted
ORDER = np.random.default_rng(1).permutation(GROUP)  # of their lengths, in which they come


class PairLanes(Lanes):
    """Lanes as equal parts of a split's pairs; `lengths` counts tokens, each time with the <end> before a pair.

    steps is that of windows of T, though they are narrower.
    """

    @classmethod
    def files(cls, corpus: Corpus, split: str, lanes: range, of: int) -> list[ShardFile]:
        """As those of Lanes: whole shards, since in between it does not stand where a pair begins."""
        pairs = corpus.split(split)["pairs"]
        first, last = (pairs * lane // of for lane in (lanes.start, lanes.stop))
        parts = [part for part, _ in _parts(corpus, split, first, last)]
        return corpus.files(split, parts[0]["start"], parts[-1]["stop"]) if parts else []

    def _cut(self, lanes: range, of: int) -> None:
        entry, T = self.corpus.split(self.split), self.T
        self._where = f"split '{self.split}' of {self.corpus.folder}"
        if entry["pairs"] < of:
            raise UserError(f"{self._where} has {entry['pairs']} pairs: too few for {of} lanes")
        if entry["longest"] > T:
            raise UserError(
                f"{self._where} has a pair of {entry['longest']} tokens and a window must hold it: --set train.window="
                f"{entry['longest']}, or leave long ones out with dllm.prepare --longest"
            )
        cuts = [entry["pairs"] * lane // of for lane in range(lanes.start, lanes.stop + 1)] if lanes else [0]
        places = self._places(cuts[0], cuts[-1])
        self._lanes = [places[:, start - cuts[0] : stop - cuts[0]] for start, stop in itertools.pairwise(cuts)]
        self.starts, self.lengths = [lane[0, 0] for lane in self._lanes], [lane[2, -1] - lane[0, 0] + 1 for lane in self._lanes]
        self.steps = [lane.shape[1] * T for lane in self._lanes]
        self._orders = [_order(lane[2] - lane[0]) for lane in self._lanes]

    def _places(self, first: int, last: int) -> Array:
        """Where in the split are the <end> before, the <sep> in and the <end> behind pairs [first, last): (3,n)."""
        tokenizer = self.corpus.tokenizer
        found: list[Array] = [np.empty((3, 0), np.int64)]
        for part, before in _parts(self.corpus, self.split, first, last):
            start, count = part["start"], part["pairs"]
            text = self.corpus.read(self.split, start, part["stop"])
            seps, ends = (np.flatnonzero(text == token) + start for token in (tokenizer.sep, tokenizer.end))
            ends = np.append(start - 1, ends) if start else ends
            orderly = len(seps) == count == len(ends) - 1 and (ends[:-1] < seps).all() and (seps < ends[1:]).all()
            if not orderly or np.diff(ends).max() > self.T:
                raise UserError(f"{self._where} is not made of pairs: prepare the data anew")
            inside = slice(max(0, first - before), last - before)
            found.append(np.stack([ends[:-1], seps, ends[1:]])[:, inside])
        return np.concatenate(found, axis=1)

    def shapes(self, windows: int) -> tuple[Array, Array]:
        """As those of Lanes; a window is as wide as its longest pair."""
        tokens, widths = np.zeros((2, windows), np.int64)
        for (begin, sep, end), order in zip(self._lanes, self._orders, strict=True):
            tokens[: len(order)] += (end - sep)[order]
            widths[: len(order)] = np.maximum(widths[: len(order)], (end - begin)[order])
        return tokens, widths

    def window(self, number: int, width: int) -> tuple[Array, Array]:
        """As those of Lanes; of each pair only the target's tokens and its end are predicted."""
        tokens = np.zeros((width, len(self.starts)), np.int64)
        targets = np.full_like(tokens, IGNORE)
        for lane, ((begins, seps, ends), order) in enumerate(zip(self._lanes, self._orders, strict=True)):
            if number < len(order):
                begin, sep, end = (int(places[order[number]]) for places in (begins, seps, ends))
                group = order[number] // GROUP * GROUP
                text = self._group(lane, begins[group], ends[group : group + GROUP][-1] + 1)[begin - begins[group] :]
                tokens[: end - begin, lane] = text[: end - begin]
                targets[sep - begin : end - begin, lane] = text[sep + 1 - begin : end + 1 - begin]
        return tokens, targets

    def _group(self, lane: int, start: int, stop: int) -> Array:
        """Tokens [start, stop) of the split: those of a group of pairs, which the lane reads one by one."""
        if self._buffers.get(lane, (-1, NOTHING))[0] != start:
            text = self.corpus.read(self.split, start + 1, stop)  # the <end> may lie in a shard that this rank does not have
            self._buffers[lane] = start, np.concatenate([np.array([self.corpus.tokenizer.end]), text])
        return self._buffers[lane][1]


def _parts(corpus: Corpus, split: str, first: int, last: int) -> Iterator[tuple[dict[str, Any], int]]:
    """The shards with any of the pairs [first, last) as the manifest has them, each with how many pairs lie before it."""
    before = 0
    for part in corpus.split(split)["shards"]:
        if before < last and before + part["pairs"] > max(first, before):
            yield part, before
        before += part["pairs"]


def _order(lengths: Array) -> Array:
    """Numbers of pairs of these lengths (n,), group by group in the order of their windows."""
    parts = []
    for start in range(0, len(lengths), GROUP):
        ranked = np.argsort(lengths[start : start + GROUP], kind="stable")
        parts.append(start + ranked[ORDER[len(ranked) > ORDER]])
    return np.concatenate(parts)


def read_lanes(corpus: Corpus, split: str, lanes: range, of: int, window: int, first: int | None = None) -> Lanes:
    """The Lanes that suit a corpus."""
    return _kind(corpus)(corpus, split, lanes, of, window, first)


def lane_files(corpus: Corpus, split: str, lanes: range, of: int) -> list[ShardFile]:
    """The shards that lanes of a corpus read, which must be sound before (supply.py). Raises UserError."""
    return _kind(corpus).files(corpus, split, lanes, of)


def _kind(corpus: Corpus) -> type[Lanes]:
    return PairLanes if corpus.tokenizer.pairs else Lanes
