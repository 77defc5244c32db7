"""The factors that products take of a model's weights, kept up with the flat vector that they are made of."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from ..kernels.operands import Operands, Weight
from ..kernels.types import Array
from .layout import Layout


class Factors:
    """The Weights of a model, by name, and which vector their factors are of.

    In float32 and float64 the panels are the factors, and nothing is kept. In bfloat16 a factor is a copy. Whoever writes
    parameters can have it made while they are still in the cache: `begin`, `take` for each part that is final, `finish`.
    Without that, `ready` makes all of them.

    Parameters
    ----------
    layout : Layout
    operands : Operands
    theta : (size,) array
        The parameters.

    Attributes
    ----------
    edges : (n,) int64 array
        Elements of the flat vector where pairs of panels begin or end, ascending: `take` makes the factors of whole pairs.
    """

    def __init__(self, layout: Layout, operands: Operands, theta: Array) -> None:
        self.layout, self.kept = layout, operands.bf16
        blocks = {name: block for name, block in layout.blocks.items() if len(block.shape) == 3 and not name.endswith(".b")}
        arrays = layout.arrays(theta)
        self.weights: Mapping[str, Weight] = {name: Weight(operands, arrays[name], name == "output") for name in blocks}
        self._pairs: list[tuple[Weight, int]] = []  # and the first panel of each
        starts: list[int] = []
        for name, block in blocks.items() if self.kept else ():
            panels, size = block.shape[0], block.shape[1] * block.shape[2]
            self._pairs += [(self.weights[name], first) for first in range(0, panels, 2)]
            starts += [block.start + first * size for first in range(0, panels, 2)]
        self._starts = np.array(starts, np.int64)
        sizes = [weight.size_of(first) for weight, first in self._pairs]
        self._stops = self._starts + np.array(sizes, np.int64)
        self.edges = np.union1d(self._starts, self._stops).astype(np.int64)
        self._taken = np.zeros(len(starts), bool)
        self._made = self._fresh = False  # of the vector last written, and bound

    def bind(self, theta: Array, written: bool = False) -> None:
        """The parameters are those of theta (size,) from now on. written: as `finish` has left them."""
        self._fresh = written and self._made
        arrays = self.layout.arrays(theta)
        for name, weight in self.weights.items():
            weight.bind(arrays[name])

    def begin(self, theta: Array) -> None:
        """Someone is about to write theta (size,)."""
        self.bind(theta)
        self._taken[:], self._made = False, False

    def take(self, start: int, stop: int) -> None:
        """Elements [start, stop) are final. From any thread, of parts that do not overlap."""
        first, last = np.searchsorted(self._starts, start), np.searchsorted(self._stops, stop, side="right")
        self._taken[first:last] = True
        for weight, panel in self._pairs[first:last]:
            weight.take(panel, min(panel + 2, len(weight.panels)))

    def finish(self) -> None:
        """All elements are final."""
        for number in np.flatnonzero(~self._taken):
            weight, panel = self._pairs[number]
            weight.take(panel, min(panel + 2, len(weight.panels)))
        self._made = True

    def ready(self) -> None:
        """The factors are about to be used. Only what was written and bound since the last use is not made anew."""
        if self.kept and not self._fresh:
            for weight in self.weights.values():
                weight.take_all()
        self._made = self._fresh = False
