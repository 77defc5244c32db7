"""What lanes give to a model in a step."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

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

    @property
    def tokens(self) -> Array:
        """All tokens (n,) that are looked up in the embedding."""
        parts = [part.reshape(-1) for part in (self.inputs, self.before) if part is not None and part.dtype.kind == "i"]
        return np.concatenate(parts) if parts else np.empty(0, np.int64)
