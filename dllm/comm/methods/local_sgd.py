"""Local updates: ranks meet every H steps only."""

import numpy as np

from .base_local_steps import LocalSteps


class LocalSGD(LocalSteps):
    """Local SGD (Stich 2019, "Local SGD converges fast and communicates little").

    Every rank takes H = averaging.period steps alone; then x_i <- mean of all x_j. The optimiser's moments stay at home.
    """

    neighbours = weighted = False
    periodic = True

    def arrive(self, lr: float) -> None:
        if self.meeting():
            self.mean(self.x, self.x)


class DiLoCo(LocalSteps):
    """DiLoCo (Douillard et al. 2023, "DiLoCo: distributed low-communication training of language models").

    Every H = averaging.period steps the way that the ranks went on average is a gradient to an outer optimiser, SGD with
    Nesterov's momentum mu = averaging.momentum and the rate averaging.outer_lr:

        delta <- outer x - mean of all x_j
        v     <- mu v + delta
        outer x <- outer x - outer_lr (delta + mu v),     and all x_i become that
    """

    neighbours = weighted = False
    periodic = True

    def prepare(self) -> None:
        self.outer, self.v = self.array("outer"), self.array("outer_momentum")
        self.outer[:] = self.x
        self.delta = np.empty_like(self.x)

    def arrive(self, lr: float) -> None:
        if self.meeting():
            mu = self.config.momentum
            self.mean(self.x, self.delta)
            np.subtract(self.outer, self.delta, out=self.delta)
            self.v *= mu
            self.v += self.delta
            self.outer -= self.config.outer_lr * (self.delta + mu * self.v)
            self.x[:] = self.outer
