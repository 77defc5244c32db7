"""Lanes of running text that are read both ways: from their beginning, and from their end backwards."""

from __future__ import annotations

from ..kernels.types import Array
from ..model.batch import Batch
from .lanes import AHEAD, NOTHING, Lanes


class BothWaysLanes(Lanes):
    """As Lanes; columns 0 to B - 1 of a window are lanes, columns B to 2 B - 1 the same lanes backwards.

    Each token is predicted from those before it and from those behind it, but in windows far from each other (Peters et al.
    2018, "Deep contextualized word representations").
    """

    def shapes(self, places: Array) -> tuple[Array, Array]:
        """As those of Lanes; both directions predict."""
        tokens, widths = super().shapes(places)
        return 2 * tokens, widths

    def _read(self, lane: int, begin: int, end: int) -> Array:
        """Tokens [begin, end) of a column: of a lane, or of one read backwards, which has the number of the lane and B more."""
        B = len(self.starts)
        if lane < B:
            return super()._read(lane, begin, end)
        at, buffer = self._buffers.get(lane, (0, NOTHING))
        if not (at <= begin and end <= at + len(buffer)):
            last = self.starts[lane - B] + self.lengths[lane - B]
            stop = min(self.lengths[lane - B], max(end, begin + AHEAD))
            at, buffer = begin, self.corpus.read(self.split, last - stop, last - begin)[::-1]
            self._buffers[lane] = at, buffer
        return buffer[begin - at : end - at]

    def window(self, place: int, width: int) -> Batch:
        """As that of Lanes, (width,2B)."""
        return self._window(place, width, [*self.steps, *self.steps])
