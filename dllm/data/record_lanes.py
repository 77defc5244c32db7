"""Lanes of records, such as pairs: every window of a lane is one record, which is never cut and sees nothing of the one before.

A window is as long as its longest record. So that little of it is padding, the records of a lane are sorted by length, a group
of them at a time, and taken in an order that is the same for all lanes but otherwise random: the records of a window are about
equally long, and ranks have equal work. Each epoch has an order of its own, by (seed, epoch), and other records meet: groups
begin elsewhere, and lengths have noise while they are sorted.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from ..errors import UserError
from ..kernels.types import Array
from .lanes import NOTHING, Lanes

if TYPE_CHECKING:
    from .corpus import Corpus
    from .placing import ShardFile

NOISE = 0.1  # of a length, and a token: so much longer a record may count when it is sorted


class RecordLanes(Lanes):
    """Lanes as equal parts of a split's records; a place is a record, and `lengths` counts tokens.

    A kind of records says where its records are, how long each counts when they are sorted, and what it predicts.
    """

    group: ClassVar[int] = 512  # records that are sorted
    unit: ClassVar[str] = "records"  # what the manifest calls them

    @classmethod
    def most(cls, corpus: Corpus, split: str) -> int:
        """As that of Lanes: a lane has a record at least."""
        count: int = corpus.split(split)[cls.unit]
        return count

    @classmethod
    def files(cls, corpus: Corpus, split: str, lanes: range, of: int) -> list[ShardFile]:
        """As those of Lanes: whole shards, since in between it does not stand where a record begins."""
        records = cls.most(corpus, split)
        first, last = (records * lane // of for lane in (lanes.start, lanes.stop))
        parts = [part for part, _ in cls._parts(corpus, split, first, last)]
        return corpus.files(split, parts[0]["start"], parts[-1]["stop"]) if parts else []

    @classmethod
    def _parts(cls, corpus: Corpus, split: str, first: int, last: int) -> Iterator[tuple[dict[str, Any], int]]:
        """The shards with any of the records [first, last) as the manifest has them, each with how many lie before it."""
        before = 0
        for part in corpus.split(split)["shards"]:
            if before < last and before + part[cls.unit] > max(first, before):
                yield part, before
            before += part[cls.unit]

    def _cut(self, lanes: range, of: int) -> None:
        records, self.stride = self.most(self.corpus, self.split), 1
        self._where = f"split '{self.split}' of {self.corpus.folder}"
        if records < of:
            raise UserError(f"{self._where} has {records} {self.unit}: too few for {of} lanes")
        cuts = [records * lane // of for lane in range(lanes.start, lanes.stop + 1)] if lanes else [0]
        places = self._places(cuts[0], cuts[-1])
        self._check(places)
        self._lanes = [places[:, start - cuts[0] : stop - cuts[0]] for start, stop in itertools.pairwise(cuts)]
        self.starts, self.lengths = [lane[0, 0] for lane in self._lanes], [lane[-1, -1] - lane[0, 0] for lane in self._lanes]
        self.steps = [lane.shape[1] for lane in self._lanes]
        self._common = records // of  # records that every lane has

    def _places(self, first: int, last: int) -> Array:
        """Of records [first, last) where in the split each begins, in row 0, and ends, in the last row: (k,n) int64."""
        raise NotImplementedError

    def _check(self, places: Array) -> None:
        """Raise UserError where a record is longer than a window can be. places : of this rank's lanes"""

    def _too_long(self, what: str, longest: int) -> UserError:
        """Of a record, or a part of one, that no window holds. what : it, with its length"""
        return UserError(
            f"{self._where} has a {what} and a window must hold it: --set train.window={longest}, "
            "or leave long ones out with dllm.prepare --longest"
        )

    def _sizes(self, places: Array) -> tuple[Array, Array]:
        """Of each of the records at `places` (k,n) the tokens that it predicts and its T: (n,) int64 each."""
        raise NotImplementedError

    def _order(self, places: Array, rng: np.random.Generator) -> Array:
        """How long each of the records at `places` (k,n) counts when they are sorted: (n,) float64."""
        raise NotImplementedError

    def arrange(self, seed: int, epoch: int) -> bool:
        """As that of Lanes: the order of a lane depends on its number, whatever rank has it."""
        shared, group = np.random.default_rng([seed, epoch]), self.group
        first = int(shared.integers(group)) if self._common > group else 0
        cuts = [0, *range(first or group, self._common, group), self._common]
        shuffles = [shared.permutation(stop - start) for start, stop in itertools.pairwise(cuts)]
        self._orders = []
        for number, lane in zip(self.numbers, self._lanes, strict=True):
            lengths = self._order(lane, np.random.default_rng([seed, epoch, int(number)]))
            groups = zip(cuts[:-1], shuffles, strict=True)
            parts = [start + np.argsort(lengths[start : start + len(shuffle)])[shuffle] for start, shuffle in groups]
            rest = np.arange(self._common, lane.shape[1])  # one record at most, in a window of its own
            self._orders.append(np.concatenate([*parts, rest]))
        self._cuts = np.array(cuts[:-1])
        return True

    def shapes(self, places: Array) -> tuple[Array, Array]:
        """As those of Lanes; a window is as wide as its longest record."""
        tokens, widths = np.zeros((2, len(places)), np.int64)
        for lane, order in zip(self._lanes, self._orders, strict=True):
            there = places < len(order)
            predicted, steps = self._sizes(lane[:, order[places[there]]])
            tokens[there] += predicted
            widths[there] = np.maximum(widths[there], steps)
        return tokens, widths

    def _records(self, place: int) -> Iterator[tuple[int, int, Array, Array]]:
        """Of each lane with a record at `place`: the lane's number here, which record, its places (k,), what is read of it."""
        for lane, (places, order) in enumerate(zip(self._lanes, self._orders, strict=True)):
            if place < len(order):
                record = int(order[place])
                group = int(np.searchsorted(self._cuts, record, "right")) - 1
                first, last = (*self._cuts, len(order))[group : group + 2]
                start = int(places[0, first])
                text = self._group(lane, start, int(places[-1, last - 1]))
                yield lane, record, places[:, record], text[..., places[0, record] - start : places[-1, record] - start]

    def _group(self, lane: int, start: int, stop: int) -> Array:
        """What is read of places [start, stop) of the split: of a group of records, which the lane takes one by one."""
        at, buffer = self._buffers.get(lane, (-1, NOTHING))
        if (at, at + buffer.shape[-1]) != (start, stop):
            self._buffers[lane] = start, self._text(start, stop)
        return self._buffers[lane][1]

    def _text(self, start: int, stop: int) -> Array:
        """(..., stop - start) of the split."""
        raise NotImplementedError
