"""Stochastic gradient push: over directed graphs, balanced or not."""

from ...kernels.types import Array
from .base_local_steps import LocalSteps


class PushSum(LocalSteps):
    """What travels is x = w z and w, the weight of how much of the whole has come together here; kept is z, the model.

    Kempe, Dobra, Gehrke 2003, "Gossip-based computation of aggregate information".
    """

    weighted = False  # each rank hands out all that it has, in equal parts

    def prepare(self) -> None:
        self.w, self.before = self.array("push_sum_weight", 1), self.x.copy()
        self.w[:] = 1

    def direction(self, g: Array) -> Array:
        self.before[:] = self.x
        return g

    def weigh(self) -> Array:
        """Make the parameters, z - lr g of the optimiser, w z - lr g."""
        self.x += (self.w - 1) * self.before
        return self.x


class StochasticGradientPush(PushSum):
    """SGP (Assran et al. 2019, "Stochastic gradient push for distributed deep learning").

    x_i <- sum_j P_ij (x_j - lr g_j(z_j))      P column-stochastic: each rank hands out all that it has, in equal parts
    w_i <- sum_j P_ij w_j                      how much of the whole has come together at rank i
    z_i  = x_i / w_i                           the model; gradients are taken there
    """

    def prepare(self) -> None:
        super().prepare()
        neighbours = self.graph("column")
        self.of_x, self.of_w = self.mixing(neighbours), self.mixing(neighbours, 1)

    def arrive(self, lr: float) -> None:
        z, w = self.weigh(), self.w
        self.of_x.start(z, z, self.step)
        self.of_w.start(w, w, self.step)
        self.of_w.finish()
        self.of_x.finish()
        z /= w

    def average(self, out: Array) -> None:
        self.before[:] = self.x * self.w
        self.mean(self.before, out)  # the weights always add up to the number of ranks
