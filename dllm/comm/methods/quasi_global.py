"""Quasi-global momentum: momentum of how the mixed model moved, not of the local gradient."""

from ...kernels.types import Array
from .base_local_steps import LocalSteps


class QuasiGlobalMomentum(LocalSteps):
    """QG-DSGDm (Lin et al. 2021, "Quasi-global momentum: accelerating decentralized deep learning on heterogeneous data").

        x' <- x_i - lr (g_i(x_i) + mu m_i)
        x_i of the next step = sum_j W_ij x'_j
        m_i <- mu m_i + (1 - mu) (x_i - x_i of the next step) / lr

    mu : averaging.momentum
    """

    needs_sgd = needs_no_momentum = True

    def prepare(self) -> None:
        self.of_x, self.m = self.mixing(self.graph("doubly")), self.array("quasi_global_momentum")
        self.before, self.ahead = self.x.copy(), self.x.copy()

    def direction(self, g: Array) -> Array:
        self.before[:] = self.x
        self.ahead[:] = g
        self.ahead += self.config.momentum * self.m
        return self.ahead

    def arrive(self, lr: float) -> None:
        self.of_x.start(self.x, self.x, self.step)
        self.of_x.finish()
        mu = self.config.momentum
        self.before -= self.x
        self.m *= mu
        self.m += (1 - mu) / lr * self.before
