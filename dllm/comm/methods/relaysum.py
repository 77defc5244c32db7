"""RelaySum: sums that are passed on through a tree, so that every rank's update reaches all others unweakened."""

import numpy as np

from ...errors import UserError
from .base_local_steps import LocalSteps


class RelaySum(LocalSteps):
    """RelaySGD (Vogels et al. 2021, "RelaySum for decentralized deep learning on heterogeneous data", algorithm 1).

        x'_i    <- x_i - lr g_i(x_i)
        m_i->j   = x'_i + sum of m_k->i of the step before, over neighbours k other than j
        c_i->j   = 1 + sum of c_k->i of the step before, likewise: how many models that is the sum of
        x_i     <- (x'_i + sum_j m_j->i) / (1 + sum_j c_j->i)

    So x_i is the mean of all ranks' newest models that had the time to come here. The topology is a tree.
    """

    default_topology = "tree"

    def prepare(self) -> None:
        name = self.config.topology or self.default_topology
        around = self.graph("symmetric")
        if not around.topology.is_tree:
            raise UserError.of_all(
                f"averaging.method = relaysum needs a tree, which {name} is not: take averaging.topology = tree or star"
            )
        self.tree, P = around.duplicate().phases[0][0], self.x.size
        degree = len(around.senders[0])
        self.m = self.array("relayed", degree * P).reshape(degree, P)
        self.counts = self.array("relayed_counts", degree)
        self.outgoing, self.outgoing_counts = np.empty_like(self.m), np.empty_like(self.counts)

    def arrive(self, lr: float) -> None:
        x, degree = self.x, len(self.m)
        for j in range(degree):
            others = [k for k in range(degree) if k != j]
            self.outgoing[j] = x
            for k in others:
                self.outgoing[j] += self.m[k]
            self.outgoing_counts[j] = 1 + self.counts[others].sum()
        self.exchange(self.tree, self.outgoing, self.m)
        self.exchange(self.tree, self.outgoing_counts, self.counts)
        for m in self.m:
            x += m
        x /= 1 + self.counts.sum()
