"""Lanes of texts with labels: every window of a lane is a sentence whose words have tags, or a text that has a class."""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from ..kernels.softmax import IGNORE
from ..kernels.types import Array
from ..model.batch import Batch
from .record_lanes import NOISE, RecordLanes


class LabelledLanes(RecordLanes):
    """Lanes of records. Places of one are where it begins, something of its labels, and where it ends."""

    group: ClassVar[int] = 4096

    def _places(self, first: int, last: int) -> Array:
        found: list[Array] = [np.empty((3, 0), np.int64)]
        for part, before in self._parts(self.corpus, self.split, first, last):
            places, classes = self.corpus.read_records(self.split, part)
            begins, ends = places
            middle = self._middle(part["start"], begins, ends, classes)
            found.append(np.stack([begins, middle, ends])[:, max(0, first - before) : last - before])
        return np.concatenate(found, axis=1)

    def _middle(self, start: int, begins: Array, ends: Array, classes: Array) -> Array:
        """Of each record of a shard what is to be known of its labels, (n,) int64. start : of the shard"""
        raise NotImplementedError

    def _order(self, places: Array, rng: np.random.Generator) -> Array:
        lengths: Array = (places[2] - places[0]) * (1 + NOISE * rng.random(places.shape[1]))
        return lengths


class TagLanes(LabelledLanes):
    """Lanes of sentences; in the middle of their places stands how many words have tags."""

    unit_in_words: ClassVar[str] = "sentence"

    def _middle(self, start: int, begins: Array, ends: Array, classes: Array) -> Array:
        stop = int(ends[-1]) if len(ends) else start
        there = np.cumsum(self.corpus.read_tags(self.split, start, stop) != IGNORE)
        counts: Array = np.diff(there[ends - start - 1], prepend=0)
        return counts

    def _check(self, places: Array) -> None:
        longest = self.corpus.split(self.split)["longest"]  # the same on all ranks
        if longest > self.T:
            raise self._too_long(f"{self.unit_in_words} of {longest} steps", longest)

    def _sizes(self, places: Array) -> tuple[Array, Array]:
        begin, tagged, end = places
        return tagged, end - begin

    def window(self, place: int, width: int) -> Batch:
        """Tokens and tags (T,B) of the window at `place`, as long as the longest sentence of this rank. width : no matter"""
        found, lengths = list(self._records(place)), np.zeros(len(self.starts), np.int64)
        T = max((both.shape[1] for _, _, _, both in found), default=1)
        tokens = np.zeros((T, len(self.starts)), np.int64)
        tags = np.full_like(tokens, IGNORE)
        for lane, _, _, both in found:
            length = lengths[lane] = both.shape[1]
            tokens[:length, lane], tags[:length, lane] = both
        return Batch(tokens, tags, lengths)

    def _text(self, start: int, stop: int) -> Array:
        return np.stack([self.corpus.read(self.split, start, stop), self.corpus.read_tags(self.split, start, stop)])


class ClassLanes(LabelledLanes):
    """Lanes of texts; in the middle of their places stands the class. Of one that is longer than a window its end is read."""

    shortens: ClassVar[bool] = True

    def _middle(self, start: int, begins: Array, ends: Array, classes: Array) -> Array:
        return classes

    def _sizes(self, places: Array) -> tuple[Array, Array]:
        ones = np.ones(places.shape[1], np.int64)
        return ones, ones

    def window(self, place: int, width: int) -> Batch:
        """Tokens (S,B) and classes (1,B) at `place`, as long as the longest text of this rank. width : no matter"""
        found, lengths = list(self._records(place)), np.zeros(len(self.starts), np.int64)
        S = max((len(text) for _, _, _, text in found), default=1)
        tokens = np.zeros((min(S, self.T), len(self.starts)), np.int64)
        classes = np.full((1, len(self.starts)), IGNORE)
        for lane, _, (_, number, _), text in found:
            length = lengths[lane] = min(len(text), self.T)
            tokens[:length, lane], classes[0, lane] = text[-length:], number
        return Batch(tokens, classes, lengths)

    def _text(self, start: int, stop: int) -> Array:
        return self.corpus.read(self.split, start, stop).astype(self.corpus.dtype)
