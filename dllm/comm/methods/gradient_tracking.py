"""Gradient tracking: every rank follows the mean of all gradients."""

import math

from ...kernels.optim import sum_of_squares
from ...kernels.types import Array
from .base_local_steps import LocalSteps


class GradientTracking(LocalSteps):
    """DIGing (Nedic, Olshevsky, Shi 2017; Di Lorenzo, Scutari 2016; for SGD: Pu, Nedic 2021).

        y_i <- sum_j W_ij y_j + g_i(x_i) - g_i of the step before
        x_i <- sum_j W_ij x_j - lr y_i

    Exact however much the ranks' data differ. Two vectors travel, both while the gradient is computed.
    """

    needs_sgd = True

    def prepare(self) -> None:
        neighbours = self.graph("doubly")
        self.of_x, self.of_y = self.mixing(neighbours), self.mixing(neighbours)
        self.y, self.before = self.array("tracked_gradient"), self.array("gradient_before")
        self.mixed = self.x.copy()

    def depart(self) -> None:
        self.of_x.start(self.x, self.mixed, self.step)
        self.of_y.start(self.y, self.y, self.step)

    def direction(self, g: Array) -> Array:
        self.of_y.finish()
        self.of_x.finish()
        self.x[:] = self.mixed
        if not math.isfinite(sum_of_squares(g)):
            return g  # no step; y goes on without it
        self.y += g
        self.y -= self.before
        self.before[:] = g
        return self.y
