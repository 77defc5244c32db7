"""Exact diffusion: adapt, correct, combine."""

from .own_steps import OwnSteps


class ExactDiffusion(OwnSteps):
    """Exact diffusion (Yuan, Ying, Zhao, Sayed 2019), the same as D2 (Tang et al. 2018) with (I + W) / 2 for W.

        psi_i <- x_i - lr g_i(x_i)
        phi_i  = psi_i + x_i - psi_i of the step before
        x_i   <- sum_j (I + W)_ij / 2 phi_j

    Exact however much the ranks' data differ, for one vector a step. W must be symmetric.
    """

    default_topology = "ring"

    def prepare(self):
        self.needs_sgd()
        neighbours = self.graph("symmetric")
        neighbours.phases = [(graph, (1 + own) / 2, others / 2) for graph, own, others in neighbours.phases]
        self.of_phi, self.phi = self.mixing(neighbours), self.x.copy()
        self.correction = self.array("correction")  # x - psi of the step before

    def arrive(self, lr):
        psi, phi, x = self.x, self.phi, self.x
        phi[:] = psi
        phi += self.correction
        self.of_phi.start(phi, phi, self.step)
        self.of_phi.finish()
        self.correction[:] = phi
        self.correction -= psi
        x[:] = phi
