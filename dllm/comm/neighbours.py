"""Exchange with the neighbours in a topology by MPI's neighbourhood collectives, none of which blocks."""

from __future__ import annotations

import copy
import itertools
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Protocol, TypeAlias

import numpy as np

from ..kernels.reduce import weighted_sum
from ..kernels.types import Array, DType
from .runtime import NAP, wait_for
from .topology import Topology
from .traffic import IN_FLIGHT, sent_by_allreduce

if TYPE_CHECKING:
    from mpi4py import MPI

Place: TypeAlias = "tuple[MPI.Distgraphcomm, float, Array]"  # communicator, own weight, weights of the senders (d,)
Combine: TypeAlias = Callable[[Array, float, Array, Array, Array], None]  # of kernels/reduce.py
PROBE, ASK, ANSWER = 1 << 13, 1, 2  # bytes of a probe of a link; tags


class Neighbours:
    """This rank's place in a Topology: a communicator for each of its phases, with the weights of what comes in.

    Parameters
    ----------
    comm : MPI.Comm
    topology : Topology
    matrices : list of (n,n) float64
        W of each phase; W[i,j] is the weight that rank i gives to what comes from rank j.

    Attributes
    ----------
    phases : list of (communicator, own weight, weights of the senders (d,))
    senders, receivers : list of tuple of int
        Of each phase.
    """

    def __init__(self, comm: MPI.Comm, topology: Topology, matrices: Sequence[Array]) -> None:
        self.topology = topology
        rank, numbers = comm.rank, range(len(topology.phases))
        self.senders = [topology.senders(number, rank) for number in numbers]
        self.receivers = [topology.receivers(number, rank) for number in numbers]
        self.phases: list[Place] = []
        for senders, receivers, W in zip(self.senders, self.receivers, matrices, strict=True):
            graph = comm.Create_dist_graph_adjacent(list(senders), list(receivers))  # type: ignore[attr-defined]
            self.phases.append((graph, W[rank, rank], W[rank, list(senders)]))

    def at(self, step: int) -> Place:
        """(communicator, own weight, weights of the senders) of a step."""
        return self.phases[self.topology.phase(step)]

    def degree(self, step: int) -> int:
        """How many ranks this one sends to in a step."""
        return len(self.receivers[self.topology.phase(step)])

    def round_trips(self, comm: MPI.Comm, oversubscribed: bool) -> dict[int, float]:
        """Receiver -> seconds until it has answered PROBE bytes with as many. Collective over `comm`, all pairs at once."""
        mine = np.zeros(PROBE, np.uint8)
        asked: dict[int, tuple[MPI.Request, Array]] = {}
        answers: dict[int, tuple[MPI.Request, Array]] = {}
        answering: list[MPI.Request] = []
        begun: dict[int, float] = {}
        found: dict[int, float] = {}
        for rank in set(itertools.chain(*self.senders)):
            buffer = np.empty_like(mine)
            asked[rank] = comm.Irecv(buffer, rank, ASK), buffer
        for rank in set(itertools.chain(*self.receivers)):
            buffer = np.empty_like(mine)
            answers[rank] = comm.Irecv(buffer, rank, ANSWER), buffer
        for rank in answers:
            begun[rank] = time.perf_counter()
            answering.append(comm.Isend(mine, rank, ASK))
        while asked or answers:
            for rank in [rank for rank, (request, _) in asked.items() if request.Test()]:
                answering.append(comm.Isend(asked.pop(rank)[1], rank, ANSWER))
            for rank in [rank for rank, (request, _) in answers.items() if request.Test()]:
                found[rank] = time.perf_counter() - begun[rank]
                del answers[rank]
            if oversubscribed:
                time.sleep(NAP)
        for request in answering:
            request.Wait()
        return found

    def duplicate(self) -> Neighbours:
        """The same neighbours, with communicators of their own: messages of two exchanges must not be taken for each other."""
        other = copy.copy(self)
        other.phases = [(graph.Dup(), own, others) for graph, own, others in self.phases]
        return other

    def communicators(self) -> list[MPI.Distgraphcomm]:
        """Of all phases."""
        return [graph for graph, _, _ in self.phases]


class Counters(Protocol):
    """What an exchange costs, added up."""

    bytes_sent: int
    exposed_seconds: float
    flight_seconds: float


class Mixing:
    """out_i = sum_j W_ij x_j over this rank and its neighbours, bucket by bucket while something else is computed.

    With combine = weighted_differences: sum_j W_ij (x_j - x_i).

    Parameters
    ----------
    neighbours : Neighbours
        Its communicators are duplicated.
    length : int
        Of the vectors.
    dtype : numpy dtype
    bucket_bytes : int
    counters : Counters
        Are added to: what MPI is given to send, once for each neighbour that it goes to; seconds in which this rank waits; and
        in which something is under way.
    oversubscribed : bool
        True where ranks outnumber cores: sleep while waiting.
    combine : kernel
        Of kernels/reduce.py.
    """

    def __init__(
        self,
        neighbours: Neighbours,
        length: int,
        dtype: DType,
        bucket_bytes: int,
        counters: Counters,
        oversubscribed: bool = False,
        combine: Combine = weighted_sum,
    ) -> None:
        self.combine, self.counters, self.oversubscribed = combine, counters, oversubscribed
        self.neighbours = neighbours.duplicate()
        step = max(1, bucket_bytes // np.dtype(dtype).itemsize)
        self.buckets = [slice(at, min(at + step, length)) for at in range(0, length, step)]
        degree = max(len(senders) for senders in neighbours.senders)
        self.free = [np.empty((degree, min(step, length)), dtype) for _ in range(min(IN_FLIGHT, len(self.buckets)))]
        self.flight: list[tuple[MPI.Request, slice, Array, Array]] = []  # request, bucket, what comes, its buffer
        self.next = len(self.buckets)  # bucket to be sent

    def start(self, x: Array, out: Array, step: int) -> None:
        """Begin. x, out: (length,); both are left alone until `finish` returns. For a sum they may be the same array."""
        if self.flight:
            raise RuntimeError("an exchange with the neighbours begins before the last one has ended")
        self.x, self.out = x, out
        self.next, self.begun = 0, time.perf_counter()
        self.graph, self.own, self.others = self.neighbours.at(step)
        self.degree = self.neighbours.degree(step)
        self._post()

    def progress(self) -> None:
        """Take in what has arrived."""
        while self.flight and self.flight[0][0].Test():
            self._arrived()

    def finish(self) -> None:
        """Wait until `out` is complete."""
        begin = time.perf_counter()
        while self.flight:
            wait_for(self.flight[0][0], self.oversubscribed)
            self._arrived()
        now = time.perf_counter()
        self.counters.exposed_seconds += now - begin
        self.counters.flight_seconds += now - self.begun

    def under_way(self) -> tuple[list[MPI.Distgraphcomm], list[MPI.Request]]:
        """The communicators in use and the requests that have not ended, for whoever must end them after a death."""
        return self.neighbours.communicators(), [request for request, *_ in self.flight]

    def _post(self) -> None:
        while self.next < len(self.buckets) and self.free:
            bucket, buffer = self.buckets[self.next], self.free.pop()
            send = self.x[bucket]
            receive = buffer.reshape(-1)[: len(self.others) * len(send)].reshape(len(self.others), len(send))
            self.flight.append((self.graph.Ineighbor_allgather(send, receive), bucket, receive, buffer))
            self.counters.bytes_sent += send.nbytes * self.degree
            self.next += 1

    def _arrived(self) -> None:
        _, bucket, received, buffer = self.flight.pop(0)
        self.combine(self.out[bucket], self.own, self.x[bucket], self.others, received)
        self.free.append(buffer)
        self._post()


def mean(comm: MPI.Comm, x: Array, out: Array, bucket_bytes: int = 1 << 22) -> int:
    """out (P,) = the mean over ranks of x (P,), the same bits on all of them. Collective. Returns the bytes sent."""

    step, sent = max(1, bucket_bytes // x.itemsize), 0
    for start in range(0, len(x), step):
        part = slice(start, start + step)
        send = x[part].copy()  # a name of its own: mpi4py does not hold what a reduction sends
        comm.Iallreduce(send, out[part]).Wait()  # op: MPI.SUM, by default
        out[part] /= comm.size
        sent += sent_by_allreduce(send.nbytes, comm.size)
    return sent
