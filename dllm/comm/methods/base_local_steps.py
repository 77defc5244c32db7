"""Methods in which every rank takes optimiser steps of its own, so that parameters differ between ranks.

The model of the run is then the one that all ranks make up: `average`. It is evaluated, written to checkpoints and generated
from; what a rank alone has, its own model and moments and the method's arrays, is written beside it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import TypeVar

import numpy as np

from ...kernels.gemm import aligned
from ...kernels.types import Array
from ..averaging import Moving, Verdict
from ..control import Control
from ..messages import total
from .base import WholeVector

S = TypeVar("S", bound=Moving)


class LocalSteps(WholeVector):
    """The contract of Averaging where ranks have models of their own. Parameters as in WholeVector."""

    identical = False
    neighbours = weighted = between_nodes = True

    _unsound_rank = 0  # this rank + 1, where its gradient was not finite and the others do not know yet
    _means: list[Array] | None = None  # theta and moments of the model that all ranks make up, made when first needed

    def average(self, out: Array) -> None:
        """out (P,) = the model that all ranks make up, the same bits on all of them. Collective."""
        self.mean(self.x, out)

    def model(self, theta: Array) -> Array:
        self._is_own(theta)
        out = self._buffers(0)[0]
        self.average(out)
        return out

    def consensus(self, state: S) -> S:
        _, *means = self._buffers(len(state.moments))
        for moment, out in zip(state.moments, means, strict=True):
            self.mean(moment, out)
        return replace(state, theta=self.model(state.theta), moments=means)  # type: ignore[type-var]

    def own_arrays(self, state: Moving) -> dict[str, Array]:
        moments = {f"moment.{number}": moment for number, moment in enumerate(state.moments)}
        return {"theta": state.theta, **moments, **self.arrays}

    def disagreement(self, theta: Array, mean: Array, loss: Callable[[Array], float]) -> dict[str, float]:
        """own_loss: of the ranks' own models, on the split; consensus_distance: the root of the mean over ranks of
        |x_i - mean|^2, over |mean|.
        """
        own_loss = loss(theta)
        squares = total(self.comm, np.square(theta - mean, dtype=np.float64).sum(keepdims=True))[0] / self.comm.size
        apart = math.sqrt(squares / np.square(mean, dtype=np.float64).sum())
        return {"own_loss": own_loss, "consensus_distance": apart}

    def begin(self, tokens: Array, control: Control) -> None:
        super().begin(tokens, replace(control, unsound=self._unsound_rank))

    def verdict(self, norm: float, sound: bool) -> Verdict:
        """Others learn with a later step that this rank's gradient was not finite; here it has taken no step then."""
        met = self.control.request is not None
        agreed = self.control.agreed()
        if not math.isfinite(norm):
            self._unsound_rank = self.comm.rank + 1
        elif met:
            self._unsound_rank = 0
        if not met:
            return Verdict(None)
        return Verdict(False, (agreed.unsound - 1,), steps_ago=1) if agreed.unsound else Verdict(True)

    def _buffers(self, moments: int) -> list[Array]:
        if self._means is None:
            self._means = []
        while len(self._means) <= moments:
            self._means.append(aligned(self.x.shape, self.x.dtype))
        return self._means
