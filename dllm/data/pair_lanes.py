"""Lanes of pairs for a language model: source and target are one text, from zero states; targets alone are predicted.

A pair begins as generation does (train.carry = window). Of benchmarks/translation.py --spaced a model of 128 units had 98 %
exactly right after 1,100 such steps, 42 % where two pairs in a row shared a window, and 1 % where states were carried on.
"""

from __future__ import annotations

import numpy as np

from ..errors import UserError
from ..kernels.softmax import IGNORE
from ..kernels.types import Array
from ..model.batch import Batch
from .record_lanes import NOISE, RecordLanes


class PairLanes(RecordLanes):
    """Lanes of pairs. Places of a pair are those of the <end> before it, of its <sep>, and behind its <end>."""

    unit = "pairs"

    def _places(self, first: int, last: int) -> Array:
        tokenizer, longest = self.corpus.tokenizer, self.corpus.split(self.split)["longest"]
        found: list[Array] = [np.empty((3, 0), np.int64)]
        for part, before in self._parts(self.corpus, self.split, first, last):
            start, count = part["start"], part["pairs"]
            text = self.corpus.read(self.split, start, part["stop"])
            seps, ends = (np.flatnonzero(text == token) + start for token in (tokenizer.sep, tokenizer.end))
            ends = np.append(start - 1, ends) if start else ends
            orderly = len(seps) == count == len(ends) - 1 and (ends[:-1] < seps).all() and (seps < ends[1:]).all()
            if not orderly or np.diff(ends).max() > longest:
                raise UserError(f"{self._where} is not made of pairs: prepare the data anew")
            inside = slice(max(0, first - before), last - before)
            found.append(np.stack([ends[:-1], seps, ends[1:] + 1])[:, inside])
        return np.concatenate(found, axis=1)

    def _check(self, places: Array) -> None:
        longest = self.corpus.split(self.split)["longest"]  # the same on all ranks
        if longest > self.T:
            raise self._too_long(f"pair of {longest} tokens", longest)

    def _sizes(self, places: Array) -> tuple[Array, Array]:
        begin, sep, stop = places
        return stop - 1 - sep, stop - 1 - begin

    def _order(self, places: Array, rng: np.random.Generator) -> Array:
        lengths: Array = (places[2] - places[0]) * (1 + NOISE * rng.random(places.shape[1]))
        return lengths

    def window(self, place: int, width: int) -> Batch:
        """As those of Lanes; of each pair only the target's tokens and its end are predicted."""
        tokens = np.zeros((width, len(self.starts)), np.int64)
        targets = np.full_like(tokens, IGNORE)
        for lane, _, (begin, sep, _), text in self._records(place):
            steps = len(text) - 1
            tokens[:steps, lane] = text[:-1]
            targets[sep - begin : steps, lane] = text[sep - begin + 1 :]
        return Batch(tokens, targets)

    def _text(self, start: int, stop: int) -> Array:
        text = self.corpus.read(self.split, start + 1, stop)  # the <end> may lie in a shard that this rank does not have
        return np.concatenate([np.array([self.corpus.tokenizer.end]), text]).astype(self.corpus.dtype)
