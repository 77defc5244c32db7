"""Exact diffusion: adapt, correct, combine."""

import numpy as np

from ...kernels.reduce import weighted_differences
from .base_local_steps import LocalSteps


class ExactDiffusion(LocalSteps):
    """Exact diffusion (Yuan, Ying, Zhao, Sayed 2019), the same as D2 (Tang et al. 2018) with (I + W) / 2 for W.

        psi_i <- x_i - lr g_i(x_i)
        phi_i  = psi_i + x_i - psi_i of the step before
        x_i   <- sum_j (I + W)_ij / 2 phi_j

    Exact however much the ranks' data differ, for one vector a step. W must be symmetric.

    Here x_i = phi_i + d_i with d_i = sum_j W_ij / 2 (phi_j - phi_i), and x_i - psi_i is what it was before, plus d_i. That is
    the same but for rounding: an error in the mean of x - psi pushes the mean model on in every step from then on, and
    weights add up to 1 in no floating point; differences add up to 0.
    """

    default_topology = "ring"
    needs_sgd = True

    def prepare(self) -> None:
        neighbours = self.graph("symmetric")
        neighbours.phases = [(graph, (1 + own) / 2, others / 2) for graph, own, others in neighbours.phases]
        self.of_phi = self.mixing(neighbours, combine=weighted_differences)
        self.phi, self.d = self.x.copy(), np.zeros_like(self.x)
        self.correction = self.array("correction")  # x - psi of the step before

    def arrive(self, lr: float) -> None:
        psi, phi, x = self.x, self.phi, self.x
        np.add(psi, self.correction, out=phi)
        self.of_phi.start(phi, self.d, self.step)
        self.of_phi.finish()
        self.correction += self.d
        np.add(phi, self.d, out=x)
