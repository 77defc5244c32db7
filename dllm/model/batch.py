"""What lanes give and models take: a window of every lane of a rank."""

from __future__ import annotations

from typing import NamedTuple

from ..kernels.types import Array


class Batch(NamedTuple):
    """A window of B lanes, time-major. What lies behind a lane's length counts for nothing.

    Attributes
    ----------
    inputs : (S,B) int64 tokens, or (S,B,F) float32 frames
    targets : (T,B) int64 tokens or labels
        -1 (IGNORE) where nothing is predicted. lm and tagger: T = S; classifier: T = 1; ctc: the most labels of a transcript.
    lengths : (B,) int64, optional
        Steps of inputs that count. None: all, as of running text. 0: the lane has nothing in this window.
    before : (T,B) int64, optional
        Of seq2seq, what the decoder reads: <sep> and the target; targets are the target and <end>.
    """

    inputs: Array
    targets: Array
    lengths: Array | None = None
    before: Array | None = None
