"""The base of methods that see the whole gradient of this rank before anything of it is sent: graphs, means, exchanges.

x_i are the parameters of rank i, g_i the gradient of its own share of the loss, scaled so that the mean of all g_i is the
gradient of the whole loss. The optimiser's step is written x - lr g; with momentum or Adam read its direction for g.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from ...config import AveragingConfig, TrainConfig
from ...errors import UserError
from ...kernels.optim import sum_of_squares
from ...kernels.types import Array, DType
from .. import topology
from ..averaging import Averaging, Gradient, Table, Tensors
from ..control import Control
from ..neighbours import Mixing, Neighbours, mean
from ..runtime import agree, wait_for

if TYPE_CHECKING:
    from mpi4py import MPI

FEW = 512  # ranks: of more the spectral gap would take minutes


class OneTensor:
    """A vector (P,) as one tensor."""

    def __init__(self, length: int) -> None:
        self.shapes: list[tuple[int, ...]] = [(length,)]

    def pack(self, vector: Array) -> Array:
        """A copy (P,)."""
        return vector.copy()

    def unpack(self, standard: Array, vector: Array) -> None:
        """Put `standard` (P,) into `vector` (P,)."""
        vector[:] = standard


class WholeVector(Averaging):
    """A method overrides some of these, which a step calls in this order:

        depart()         the step begins: what can travel while the gradient is computed, starts
        direction(g)     the gradient g (P,) is there: returns what the optimiser gets; may change x
        arrive(lr)       the optimiser has moved x at the rate lr

    and `prepare()`, which makes what it needs, or refuses what it cannot do.

    Parameters
    ----------
    comm : MPI.Comm
        Duplicated.
    x : (P,) array
        The parameters, the same on all ranks at first; changed in place.
    gradient : (P,) array
        This rank's own.
    table : object with start, shape; or None
        The embedding at the end of the vector, as in Allreduce.
    config : AveragingConfig
    optimizer : TrainConfig
    oversubscribed : bool
    tensors : Tensors, optional
        How compression sees vectors. None: each is one tensor.
    """

    default_topology: ClassVar[str] = "exponential"

    def __init__(
        self, comm: MPI.Comm, x: Array, gradient: Array, table: Table | None, config: AveragingConfig, optimizer: TrainConfig,
        oversubscribed: bool = False, tensors: Tensors | None = None,
    ) -> None:  # fmt: skip
        super().__init__(comm, gradient, oversubscribed)
        self.x, self.config, self.optimizer, self.table = x, config, optimizer, table
        self.seed, self.scale = optimizer.seed, comm.size  # the loss is scaled so that gradients have a mean
        self.tensors: Tensors = tensors or OneTensor(x.size)
        self.bucket_bytes = int(config.bucket_mb * 2**20)
        self.mixings: list[Mixing] = []
        self.neighbourhood: Neighbours | None = None
        self.gap: float | None = None  # of the topology
        self.used: Array | slice = slice(None)  # rows of the table to make zero again
        self.prepare()

    def prepare(self) -> None:
        """Refuse what the method cannot do, with a UserError on all ranks, and make what it needs."""

    def depart(self) -> None:
        """The step begins."""

    def direction(self, g: Array) -> Array:
        """What the optimiser gets, of this rank's gradient g (P,)."""
        return g

    def arrive(self, lr: float) -> None:
        """The optimiser has moved x."""

    # What a method is made of.

    def array(self, name: str, length: int | None = None, dtype: DType | None = None) -> Array:
        """A vector of zeros that a checkpoint must hold."""
        self.arrays[name] = np.zeros(self.x.size if length is None else length, dtype or self.x.dtype)
        return self.arrays[name]

    def graph(self, kind: str) -> Neighbours:
        """The configured topology, or the method's own. kind: "column", or which matrices it takes: "symmetric", "doubly"."""
        name = self.config.topology or self.default_topology
        graph = agree(self.comm, topology.make_topology, name, self.comm.size, self.config.degree, self.seed)
        if kind == "column":
            return self._neighbours(graph, agree(self.comm, topology.weights, graph, "column"))
        if kind == "symmetric" and (graph.directed or len(graph.phases) > 1):
            raise UserError.of_all(
                f"averaging.method = {self.config.method} needs neighbours that hear each other in every step; "
                f"averaging.topology = {name} is directed or changes: take ring, torus, hypercube or complete"
            )
        kind_of_weights = self.config.weights or ("uniform" if graph.directed else "metropolis")
        matrices = agree(self.comm, topology.weights, graph, kind_of_weights)
        if not all(topology.is_doubly_stochastic(W) for W in matrices):
            raise UserError.of_all(
                f"averaging.method = {self.config.method} needs weights whose rows and columns add up to 1, which {name} does "
                "not have: take averaging.weights = metropolis where it is undirected, or averaging.method = sgp"
            )
        if kind == "symmetric" and not all(np.array_equal(W, W.T) for W in matrices):
            raise UserError.of_all(f"averaging.method = {self.config.method} needs averaging.weights = metropolis here")
        return self._neighbours(graph, matrices)

    def _neighbours(self, graph: topology.Topology, matrices: list[Array]) -> Neighbours:
        self.neighbourhood = Neighbours(self.comm, graph, matrices)
        self.gap = topology.spectral_gap(matrices) if self.comm.size <= FEW else None
        return self.neighbourhood

    def mixing(self, neighbours: Neighbours, length: int | None = None, **named: Any) -> Mixing:
        """A Mixing of vectors (length,), like x where None."""
        length = self.x.size if length is None else length
        made = Mixing(neighbours, length, self.x.dtype, self.bucket_bytes, self, self.oversubscribed, **named)
        self.mixings.append(made)
        return made

    def meeting(self) -> bool:
        """Whether ranks meet at the end of this step."""
        return not self.periodic or (self.step + 1) % self.config.period == 0

    def mean(self, x: Array, out: Array, comm: MPI.Comm | None = None) -> None:
        """out (P,) = the mean of all ranks' x (P,), or of those in `comm`."""
        with self.exposed():
            self.bytes_sent += mean(comm or self.comm, x, out, self.bucket_bytes)

    def exchange(self, graph: MPI.Topocomm, outgoing: Array, incoming: Array) -> None:
        """Row j of outgoing (d,n) goes to neighbour j, what comes back becomes row j of incoming (d,n)."""
        if outgoing.size:
            self.wait(graph.Ineighbor_alltoall(outgoing, incoming))
            self.bytes_sent += outgoing.nbytes

    def wait(self, request: MPI.Request) -> None:
        """Wait for a request while nothing is computed."""
        with self.exposed():
            wait_for(request, self.oversubscribed)

    @contextlib.contextmanager
    def exposed(self) -> Iterator[None]:
        """Around communication during which nothing is computed."""
        begin = time.perf_counter()
        yield
        seconds = time.perf_counter() - begin
        self.exposed_seconds += seconds
        self.flight_seconds += seconds

    # The contract of Averaging.

    def begin(self, tokens: Array, control: Control) -> None:
        if self.table is not None:
            self.used = np.unique(tokens)
        self.final = 0
        if self.meeting():
            self.bytes_sent += self.control.begin(self.comm, control)
        else:
            self.control.pass_over()
        self.depart()

    def agreed(self) -> Control:
        with self.exposed():
            return super().agreed()

    def ready(self, part: slice) -> None:
        self.advance(part)
        self.progress()

    def progress(self) -> None:
        for mixing in self.mixings:
            mixing.progress()

    def gradient(self) -> Gradient:
        if self.optimizer.clip and self.optimizer.clip_by == "own":
            norm = math.sqrt(sum_of_squares(self.vector))
            if norm > self.optimizer.clip:
                self.vector *= self.optimizer.clip / norm
        return Gradient([(0, self.direction(self.vector))])

    def clear(self) -> None:
        if self.table is not None:
            self.vector[self.table.start :].reshape(self.table.shape)[self.used] = 0

    def mix(self, theta: Array, lr: float) -> None:
        self._is_own(theta)
        self.arrive(lr)
        self.step += 1

    def _is_own(self, theta: Array) -> None:
        if theta is not self.x:
            raise ValueError("theta must be the vector that the method was made with")

    def round_trips(self) -> dict[int, float]:
        return self.neighbourhood.round_trips(self.comm, self.oversubscribed) if self.neighbourhood else {}

    def describe(self) -> str:
        config, words = self.config, [self.config.method]
        if self.neighbourhood:
            gap = "" if self.gap is None else f" (spectral gap {self.gap:.2g})"
            words.append(f"on {config.topology or self.default_topology}{gap}")
        if self.periodic:
            words.append(f"every {config.period} steps" if config.period > 1 else "every step")
        if config.compression != "none":
            words.append(f"of {config.compression} messages")
        return " ".join(words)

    def under_way(self) -> tuple[list[MPI.Comm], list[MPI.Request]]:
        communicators, requests = super().under_way()
        for mixing in self.mixings:
            more = mixing.under_way()
            communicators, requests = [*communicators, *more[0]], [*requests, *more[1]]
        return communicators, requests
