"""Stochastic gradient push: over directed graphs, balanced or not."""

from ...kernels.types import Array
from .local_steps import LocalSteps


class StochasticGradientPush(LocalSteps):
    """SGP (Assran et al. 2019, "Stochastic gradient push for distributed deep learning"; push-sum: Kempe et al. 2003).

        x_i <- sum_j P_ij (x_j - lr g_j(z_j))      P column-stochastic: each rank hands out all that it has, in equal parts
        w_i <- sum_j P_ij w_j                      how much of the whole has come together at rank i
        z_i  = x_i / w_i                           the model; gradients are taken there

    Kept is z, the parameters; x is w z.
    """

    weighted = False  # P is column-stochastic

    def prepare(self) -> None:
        neighbours = self.graph("column")
        self.of_x, self.of_w = self.mixing(neighbours), self.mixing(neighbours, 1)
        self.w, self.before = self.array("push_sum_weight", 1), self.x.copy()
        self.w[:] = 1

    def direction(self, g: Array) -> Array:
        self.before[:] = self.x
        return g

    def arrive(self, lr: float) -> None:
        z, w = self.x, self.w
        z += (w - 1) * self.before  # w z - lr g, of the z before
        self.of_x.start(z, z, self.step)
        self.of_w.start(w, w, self.step)
        self.of_w.finish()
        self.of_x.finish()
        z /= w

    def average(self, out: Array) -> None:
        self.before[:] = self.x * self.w
        self.mean(self.before, out)  # the weights always add up to the number of ranks
