"""The factors that products take of the weights of a model's layers, kept up with the flat vector that they are made of."""

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
        blocks = {name: layout.blocks[name] for name in layout.factors}
        arrays = layout.arrays(theta)
        self.weights: Mapping[str, Weight] = {name: Weight(operands, arrays[name]) for name in blocks}
        self._spans: list[tuple[int, Weight]] = []  # the first element of a weight and the weight, ascending
        for name, block in blocks.items() if self.kept else ():
            self._spans.append((block.start, self.weights[name]))
        edges = [start + np.arange(0, weight.panels.size + 1, weight.size_of_pair) for start, weight in self._spans]
        ends = [np.array([start + weight.panels.size]) for start, weight in self._spans]
        self.edges = np.unique(np.concatenate([np.zeros(0, np.int64), *edges, *ends]))
        self._taken = np.zeros(len(self.edges), bool)  # the pair that begins at each edge
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
        first, last = np.searchsorted(self.edges, start), np.searchsorted(self.edges, stop, side="right") - 1
        if first < last:
            self._taken[first:last] = True
            self._make(int(self.edges[first]), int(self.edges[last]))

    def finish(self) -> None:
        """All elements are final."""
        for number in np.flatnonzero(~self._taken[:-1]):
            self._make(int(self.edges[number]), int(self.edges[number + 1]))
        self._made = True

    def _make(self, start: int, stop: int) -> None:
        """The factors of whole pairs of panels."""
        for begin, weight in self._spans:
            first, last = max(start, begin) - begin, min(stop, begin + weight.panels.size) - begin
            if first < last:
                size = weight.size_of_pair
                weight.take(first // size * 2, min(-(-last // size) * 2, len(weight.panels)))

    def ready(self) -> None:
        """The factors are about to be used. Only what was written and bound since the last use is not made anew."""
        if self.kept and not self._fresh:
            for weight in self.weights.values():
                weight.take_all()
        self._made = self._fresh = False
