"""Decentralised parallel SGD: a step, and the weighted mean of what the neighbours have."""

from ...kernels.types import Array
from .base_local_steps import LocalSteps


class DPSGD(LocalSteps):
    """D-PSGD, combine then adapt (Lian et al. 2017, "Can decentralized algorithms outperform centralized algorithms?").

        x_i <- sum_j W_ij x_j - lr g_i(x_i)

    The mean travels while the gradient is computed, so a slow network costs little.
    """

    def prepare(self) -> None:
        self.mixed = self.x.copy()
        self.of_x = self.mixing(self.graph("doubly"))

    def depart(self) -> None:
        self.of_x.start(self.x, self.mixed, self.step)

    def direction(self, g: Array) -> Array:
        self.of_x.finish()
        self.x[:] = self.mixed
        return g


class DPSGDAdaptThenCombine(LocalSteps):
    """D-PSGD, adapt then combine (Chen, Sayed 2012, "Diffusion adaptation strategies").

        x_i <- sum_j W_ij (x_j - lr g_j(x_j))

    On the complete graph with uniform weights it is Allreduce. Nothing is computed while the mean travels.
    """

    def prepare(self) -> None:
        self.of_x = self.mixing(self.graph("doubly"))

    def arrive(self, lr: float) -> None:
        self.of_x.start(self.x, self.x, self.step)
        self.of_x.finish()
