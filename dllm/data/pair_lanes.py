"""Lanes of pairs: every window of a lane is one pair, from zero states, as generation is; targets alone are predicted.

A pair is never cut and sees nothing of the pair before it (train.carry = window). Of benchmarks/translation.py --spaced a
model of 128 units had 98 % exactly right after 1,100 such steps, 42 % where two pairs in a row shared a window, and 1 % where
states were carried on. A window is as wide as its longest pair. So that little of it is padding, the pairs of a lane are
sorted by length, a group of them at a time, and taken in an order that is the same for all lanes but otherwise random: the
pairs of a window are about equally long. Each epoch has an order of its own, by (seed, epoch), and other pairs meet: groups
begin elsewhere, and lengths have noise while they are sorted.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import UserError
from ..kernels.softmax import IGNORE
from ..kernels.types import Array
from ..model.batch import Batch
from .lanes import NOTHING, Lanes

if TYPE_CHECKING:
    from .corpus import Corpus
    from .placing import ShardFile

GROUP = 512  # pairs that are sorted
NOISE = 0.1  # of a length, and a token: so much longer a pair may count when it is sorted


class PairLanes(Lanes):
    """Lanes as equal parts of a split's pairs; a place is a pair, and `lengths` counts tokens with the <end> before a pair."""

    @classmethod
    def files(cls, corpus: Corpus, split: str, lanes: range, of: int) -> list[ShardFile]:
        """As those of Lanes: whole shards, since in between it does not stand where a pair begins."""
        pairs = corpus.split(split)["pairs"]
        first, last = (pairs * lane // of for lane in (lanes.start, lanes.stop))
        parts = [part for part, _ in _parts(corpus, split, first, last)]
        return corpus.files(split, parts[0]["start"], parts[-1]["stop"]) if parts else []

    def _cut(self, lanes: range, of: int) -> None:
        entry, T, self.stride = self.corpus.split(self.split), self.T, 1
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
        self.steps = [lane.shape[1] for lane in self._lanes]
        self._common = entry["pairs"] // of  # pairs that every lane has

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

    def arrange(self, seed: int, epoch: int) -> bool:
        """As that of Lanes: the order of a lane depends on its number, whatever rank has it."""
        shared = np.random.default_rng([seed, epoch])
        first = int(shared.integers(GROUP)) if self._common > GROUP else 0
        cuts = [0, *range(first or GROUP, self._common, GROUP), self._common]
        shuffles = [shared.permutation(stop - start) for start, stop in itertools.pairwise(cuts)]
        self._orders = []
        for number, lane in zip(self.numbers, self._lanes, strict=True):
            own = np.random.default_rng([seed, epoch, int(number)])
            lengths = (lane[2] - lane[0] + 1) * (1 + NOISE * own.random(lane.shape[1]))
            groups = zip(cuts[:-1], shuffles, strict=True)
            parts = [start + np.argsort(lengths[start : start + len(shuffle)])[shuffle] for start, shuffle in groups]
            rest = np.arange(self._common, lane.shape[1])  # one pair at most, in a window of its own
            self._orders.append(np.concatenate([*parts, rest]))
        self._cuts = np.array(cuts[:-1])
        return True

    def shapes(self, places: Array) -> tuple[Array, Array]:
        """As those of Lanes; a window is as wide as its longest pair."""
        tokens, widths = np.zeros((2, len(places)), np.int64)
        for (begin, sep, end), order in zip(self._lanes, self._orders, strict=True):
            there = places < len(order)
            pairs = order[places[there]]
            tokens[there] += (end - sep)[pairs]
            widths[there] = np.maximum(widths[there], (end - begin)[pairs])
        return tokens, widths

    def window(self, place: int, width: int) -> Batch:
        """As those of Lanes; of each pair only the target's tokens and its end are predicted."""
        tokens = np.zeros((width, len(self.starts)), np.int64)
        targets = np.full_like(tokens, IGNORE)
        for lane, ((begins, seps, ends), order) in enumerate(zip(self._lanes, self._orders, strict=True)):
            if place < len(order):
                pair = order[place]
                begin, sep, end = (int(places[pair]) for places in (begins, seps, ends))
                group = int(np.searchsorted(self._cuts, pair, "right")) - 1
                first, last = (*self._cuts, len(order))[group : group + 2]
                text = self._group(lane, int(begins[first]), int(ends[last - 1]) + 1)[begin - int(begins[first]) :]
                tokens[: end - begin, lane] = text[: end - begin]
                targets[sep - begin : end - begin, lane] = text[sep + 1 - begin : end + 1 - begin]
        return Batch(tokens, targets)

    def _group(self, lane: int, start: int, stop: int) -> Array:
        """Tokens [start, stop) of the split: those of a group of pairs, which the lane reads one by one."""
        at, buffer = self._buffers.get(lane, (-1, NOTHING))
        if (at, at + len(buffer)) != (start, stop):
            text = self.corpus.read(self.split, start + 1, stop)  # the <end> may lie in a shard that this rank does not have
            buffer = np.concatenate([np.array([self.corpus.tokenizer.end]), text])
            self._buffers[lane] = start, buffer
        return buffer


def _parts(corpus: Corpus, split: str, first: int, last: int) -> Iterator[tuple[dict[str, Any], int]]:
    """The shards with any of the pairs [first, last) as the manifest has them, each with how many pairs lie before it."""
    before = 0
    for part in corpus.split(split)["shards"]:
        if before < last and before + part["pairs"] > max(first, before):
            yield part, before
        before += part["pairs"]


def read_lanes(corpus: Corpus, split: str, lanes: range, of: int, window: int, first: int | None = None) -> Lanes:
    """The Lanes that suit a corpus."""
    return _kind(corpus)(corpus, split, lanes, of, window, first)


def lane_files(corpus: Corpus, split: str, lanes: range, of: int) -> list[ShardFile]:
    """The shards that lanes of a corpus read, which must be sound before (supply.py). Raises UserError."""
    return _kind(corpus).files(corpus, split, lanes, of)


def _kind(corpus: Corpus) -> type[Lanes]:
    return PairLanes if corpus.tokenizer.pairs else Lanes
