"""What lanes give to a model in a step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from ..kernels.softmax import IGNORE
from ..kernels.types import Array


class Batch(NamedTuple):
    """Steps of B lanes: what a model reads, and what it is to predict. A target of -1 is none.

    Attributes
    ----------
    inputs : (S,B) int64 or (S,B,F) float32
        Tokens, or frames of sound.
    targets : (T,B) int64
        Tokens or labels. T is S where each step predicts one, and 1 where a lane has one label.
    lengths : (B,) int64, optional
        Steps of the inputs that count, of a lane that has nothing 0; none: all.
    before : (T,B) int64, optional
        What a decoder reads to predict the targets.
    """

    inputs: Array
    targets: Array
    lengths: Array | None = None
    before: Array | None = None

    @classmethod
    def of_pairs(cls, pairs: Sequence[tuple[Array, Array] | None]) -> Batch:
        """Pairs side by side: the tokens (n,) of a source, and (m,) of a target with what stands before and behind it. None: a
        lane that has nothing.
        """
        there = [(lane, *pair) for lane, pair in enumerate(pairs) if pair is not None]
        lengths: Array = np.zeros(len(pairs), np.int64)
        S = max((len(source) for _, source, _ in there), default=0)
        T = max((len(target) - 1 for _, _, target in there), default=0)
        inputs, before = (np.zeros((max(1, steps), len(pairs)), np.int64) for steps in (S, T))
        targets = np.full_like(before, IGNORE)
        for lane, source, target in there:
            lengths[lane], steps = len(source), len(target) - 1
            inputs[: len(source), lane] = source
            before[:steps, lane], targets[:steps, lane] = target[:-1], target[1:]
        return cls(inputs, targets, lengths, before)

    @property
    def steps(self) -> int:
        """Steps of the inputs that count, of all lanes together."""
        if self.lengths is not None:
            return int(self.lengths.sum())
        there = self.targets != IGNORE  # of text nothing is read behind a lane's last target
        return int((there.any(axis=0) * (len(there) - there[::-1].argmax(axis=0))).sum())

    @property
    def predicted(self) -> int:
        """Targets that there are."""
        return int(np.count_nonzero(self.targets != IGNORE))

    @property
    def read(self) -> int:
        """Tokens or frames that are read, padding left out: of pairs those of source and target."""
        return self.steps + (0 if self.before is None else self.predicted)

    @property
    def tokens(self) -> Array:
        """All tokens (n,) that are looked up in the embedding."""
        parts = [part.reshape(-1) for part in (self.inputs, self.before) if part is not None and part.dtype.kind == "i"]
        return np.concatenate(parts) if parts else np.empty(0, np.int64)
