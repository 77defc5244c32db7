"""CHOCO-SGD: gossip of compressed differences."""

import numpy as np

from .. import compression
from ..runtime import agree
from .base_local_steps import LocalSteps


class Choco(LocalSteps):
    """CHOCO-SGD (Koloskova, Stich, Jaggi 2019; Koloskova et al. 2020, "Decentralized deep learning with arbitrary
    communication compression", algorithm 3, the form with three vectors whatever the degree).

        x'_i  <- x_i - lr g_i(x_i)
        q_i    = Q(x'_i - xhat_i)                  what travels
        xhat_i <- xhat_i + q_i                     what the neighbours know of x_i
        s_i    <- s_i + sum_j W_ij q_j             = sum_j W_ij xhat_j
        x_i   <- x'_i + gamma (s_i - xhat_i)

    Q : averaging.compression
    gamma : averaging.consensus, the step towards the neighbours: 1 without compression, smaller the coarser Q is
    """

    default_topology = "ring"
    between_nodes = False  # compression sees the tensors of the whole vector
    compressions = compression.LOSSY

    def prepare(self) -> None:
        config, P = self.config, sum(int(np.prod(shape)) for shape in self.tensors.shapes)
        self.Q = agree(
            self.comm,
            compression.make_compressor,
            config.compression,
            self.tensors.shapes,
            self.x.dtype,
            config.fraction,
            self.seed,
            True,
        )
        self.around = self.graph("symmetric")
        self.known, self.s = self.array("known", P), self.array("neighbours_known", P)  # xhat_i, s_i
        start = self.tensors.pack(self.x)  # all begin from the same model, and know it
        self.known[:], self.s[:] = start, start
        self.payload = np.zeros(self.Q.size, np.uint8)
        self.incoming = np.zeros((len(self.around.senders[0]), self.Q.size), np.uint8)

    def arrive(self, lr: float) -> None:
        graph, own, others = self.around.at(0)
        x = self.tensors.pack(self.x)
        self.Q.encode(x - self.known, self.payload, self.step, self.comm.rank)
        if len(others):
            self.wait(graph.Ineighbor_allgather(self.payload, self.incoming))
            self.bytes_sent += self.payload.nbytes * len(others)
        self.Q.add(self.payload, self.known)
        self.Q.add(self.payload, self.s, own)
        for weight, payload in zip(others, self.incoming, strict=True):
            self.Q.add(payload, self.s, weight)
        x += self.config.consensus * (self.s - self.known)
        self.tensors.unpack(x, self.x)
