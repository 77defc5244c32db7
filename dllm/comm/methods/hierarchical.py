"""Two levels: Allreduce between the ranks of a node, a method of averaging between nodes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from ...errors import UserError
from ...kernels.types import Array
from ..messages import allgather, broadcast
from ..traffic import sent_by_allgather
from .base_local_steps import LocalSteps

if TYPE_CHECKING:
    from mpi4py import MPI


class Hierarchical(LocalSteps):
    """Any method that treats each element of the vector like every other, with a node in the place of a rank.

        g    = mean of the gradients of a node's ranks, all of which have the same x
        rank k of a node has part k of the node's vector in its care: for this part the method runs between the ranks k
        of all nodes, each with its own neighbours, and the node's ranks then tell each other what came of it

    So what travels between nodes is one vector for each node, however many ranks that has.

    Parameters
    ----------
    node : MPI.Comm
        The ranks of this node; every node has as many.
    kind : class
        The method between nodes.
    others : as LocalSteps
    """

    def __init__(self, kind: type[LocalSteps], node: MPI.Comm, comm: MPI.Comm, *others: Any, **named: Any) -> None:
        self.kind, self.node = kind, node.Dup()
        super().__init__(comm, *others, **named)

    def prepare(self) -> None:
        k, n = self.node.rank, self.node.size
        everyone = allgather(self.comm, (n, broadcast(self.node, self.comm.rank, int)), tuple[int, int])
        if len({size for size, _ in everyone}) > 1:
            raise UserError.of_all("averaging.hierarchical needs as many ranks on every node: start with mpirun --map-by ppr")
        edges = [self.x.size * part // n for part in range(n + 1)]
        self.part, self.counts = slice(edges[k], edges[k + 1]), np.diff(edges)
        self.nodes = self.comm.Split(k, everyone[self.comm.rank][1])
        self.ranks = allgather(self.nodes, self.comm.rank, int)
        self.between = self.kind(
            self.nodes, self.x[self.part], self.vector[self.part], None, self.config, self.optimizer, self.oversubscribed
        )
        self.arrays, self.mixings = self.between.arrays, self.between.mixings

    def meeting(self) -> bool:
        return not self.kind.periodic or (self.step + 1) % self.config.period == 0

    def depart(self) -> None:
        self.between.step = self.step
        self.between.depart()

    def direction(self, g: Array) -> Array:
        self.mean(g, g, self.node)
        mine = self.between.direction(g[self.part])
        if self.optimizer.weight_decay:
            self._tell(self.x)  # the optimiser looks at it
        g[self.part] = mine
        self._tell(g)
        self.used = slice(None)  # the rows of all ranks of the node are in it now
        return g

    def arrive(self, lr: float) -> None:
        self.between.arrive(lr)
        self._tell(self.x)
        self._take_over_counters()

    def average(self, out: Array) -> None:
        self.between.average(out[self.part])
        self._tell(out)
        self._take_over_counters()

    def round_trips(self) -> dict[int, float]:
        return {self.ranks[number]: seconds for number, seconds in self.between.round_trips().items()}

    def describe(self) -> str:
        return f"{self.between.describe()}; between {self.nodes.size} nodes, allreduce among the {self.node.size} ranks of each"

    def end(self) -> None:
        self.between.end()

    def _take_over_counters(self) -> None:
        for counter in ("bytes_sent", "exposed_seconds", "flight_seconds"):
            setattr(self, counter, getattr(self, counter) + getattr(self.between, counter))
            setattr(self.between, counter, 0)

    def _tell(self, vector: Array) -> None:
        """Every rank of this node gets the parts that the others have in their care."""
        if self.node.size > 1:
            self.wait(self.node.Iallgatherv(vector[self.part].copy(), [vector, self.counts]))
            self.bytes_sent += sent_by_allgather(vector[self.part].nbytes, self.node.size)
