"""Lanes of recordings: every window of a lane is one, as frames, with its class or with what is said in it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np

from ..kernels.softmax import IGNORE
from ..kernels.types import Array
from ..model.batch import Batch
from .labelled_lanes import ClassLanes, TagLanes

GROUP = 64  # recordings that are sorted: a lane has the frames of so many in memory, a minute each at most in good company


class FrameClassLanes(ClassLanes):
    """Lanes of recordings that have a class; in the middle of their places it stands. Of a long one the end is heard."""

    group: ClassVar[int] = GROUP

    def window(self, place: int, width: int) -> Batch:
        """Frames (S,B,F) and classes (1,B) at `place`, as long as the longest of this rank. width : no matter"""
        found = list(self._records(place))
        classes = np.full((1, len(self.starts)), IGNORE)
        for lane, _, (_, number, _), _ in found:
            classes[0, lane] = number
        frames = [(lane, rows[:, -self.T :]) for lane, _, _, rows in found]
        inputs, lengths = _together(frames, len(self.starts), self.corpus.features)
        return Batch(inputs, classes, lengths)

    def _text(self, start: int, stop: int) -> Array:
        return self.corpus.read_frames(self.split, start, stop).T


class TranscriptLanes(TagLanes):
    """Lanes of recordings and what is said in them; in the middle of their places stands how many letters that has."""

    group: ClassVar[int] = GROUP
    unit_in_words: ClassVar[str] = "recording"

    def _sizes(self, places: Array) -> tuple[Array, Array]:
        letters, frames = super()._sizes(places)
        return np.maximum(letters, 1), frames  # to say nothing is something to learn

    def window(self, place: int, width: int) -> Batch:
        """Frames (S,B,F) and letters (U,B) at `place`, as long as the longest of this rank. width : no matter"""
        found = list(self._records(place))
        U = max((int(letters) for _, _, (_, letters, _), _ in found), default=0)
        targets = np.full((max(1, U), len(self.starts)), IGNORE)
        for lane, _, (_, letters, _), rows in found:
            targets[:letters, lane] = rows[-1, :letters]
        inputs, lengths = _together([(lane, rows[:-1]) for lane, _, _, rows in found], len(self.starts), self.corpus.features)
        return Batch(inputs, targets, lengths)

    def _text(self, start: int, stop: int) -> Array:
        frames = self.corpus.read_frames(self.split, start, stop)
        letters = self.corpus.read_tags(self.split, start, stop)  # at most 32,768: float32 has them exactly
        return np.concatenate([frames, letters[:, None].astype(np.float32)], axis=1).T


def _together(frames: Sequence[tuple[Any, Array]], lanes: int, bands: int) -> tuple[Array, Array]:
    """Inputs (S,B,F) float32 and lengths (B,) of frames (F,n) of some lanes."""
    lengths = np.zeros(lanes, np.int64)
    inputs = np.zeros((max((rows.shape[1] for _, rows in frames), default=1), lanes, bands), np.float32)
    for lane, rows in frames:
        lengths[lane] = rows.shape[1]
        inputs[: lengths[lane], lane] = rows.T
    return inputs, lengths
