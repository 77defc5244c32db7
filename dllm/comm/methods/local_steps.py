"""What all methods share in which every rank takes optimiser steps of its own, so that parameters differ between ranks.

x_i are the parameters of rank i, g_i the gradient of its own share of the loss, scaled so that the mean of all g_i is the
gradient of the whole loss. The optimiser's step is written x - lr g; with momentum or Adam read its direction for g.
"""

import contextlib
import math
import time

import numpy as np
from mpi4py import MPI

from ...errors import UserError
from ...kernels.optim import sum_of_squares
from .. import topology
from ..allreduce import sent_by_allreduce
from ..neighbours import Mixing, Neighbours, mean
from ..runtime import agree, wait

FEW = 512  # ranks: of more the spectral gap would take minutes


class OwnSteps:
    """The contract at the top of comm/averaging.py, with a local gradient. Collective: every rank has one.

    A method overrides some of these, which a step calls in this order:

        depart()         the step begins: what can travel while the gradient is computed, starts
        direction(g)     the gradient g (P,) is there: returns what the optimiser gets; may change x
        arrive(lr)       the optimiser has moved x

    Parameters
    ----------
    comm : MPI.Comm
        Duplicated.
    x : (P,) array
        The parameters, the same on all ranks at first; changed in place.
    gradient : (P,) array
        This rank's own.
    table : object with start, shape; or None
        The embedding at the end of the vector, as in averaging.Allreduce.
    config : AveragingConfig
    optimizer : TrainConfig
    oversubscribed : bool
        True where ranks outnumber cores: sleep while waiting.
    tensors : object with shapes, pack(vector) and unpack(standard, vector), optional
        How compression sees vectors: as these tensors, one after the other in a standard vector. None: each is one tensor.
    """

    identical = False  # parameters differ between ranks
    unsound = False
    meets = False  # ranks are alone but for every averaging.period-th step
    default_topology = "exponential"
    buckets = ()

    def __init__(self, comm, x, gradient, table, config, optimizer, oversubscribed=False, tensors=None):
        self.comm, self.x, self.vector, self.oversubscribed = comm.Dup(), x, gradient, oversubscribed
        self.config, self.optimizer, self.table, self.seed = config, optimizer, table, optimizer.seed
        self.tensors, self.scale = tensors or OneTensor(x.size), comm.size  # the loss is scaled so that gradients have a mean
        self.bucket_bytes = int(config.bucket_mb * 2**20)
        self.control, self.step = np.zeros((2, 5)), 0
        self.arrays, self.mixings, self.neighbours = {}, [], None
        self.squares = self.rows = None
        self.bytes_sent, self.exposed_seconds, self.flight_seconds = 0, 0.0, 0.0
        self.prepare()

    def prepare(self):
        """Refuse what the method cannot do, with a UserError, and make what it needs."""

    def depart(self):
        pass

    def direction(self, g):
        return g

    def arrive(self, lr):
        pass

    def average(self, out):
        """out (P,) = the model that all ranks make up, the same bits on all of them. Collective."""
        self.mean(self.x, out)

    # What a method is made of.

    def array(self, name, length=None, dtype=None):
        """A vector of zeros that a checkpoint must hold."""
        self.arrays[name] = np.zeros(self.x.size if length is None else length, dtype or self.x.dtype)
        return self.arrays[name]

    def graph(self, kind):
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

    def _neighbours(self, graph, matrices):
        self.neighbours = Neighbours(self.comm, graph, matrices)
        self.gap = topology.spectral_gap(matrices) if self.comm.size <= FEW else None
        return self.neighbours

    def mixing(self, neighbours, length=None, **named):
        """A Mixing of vectors like x."""
        length = self.x.size if length is None else length
        made = Mixing(neighbours, length, self.x.dtype, self.bucket_bytes, self, self.oversubscribed, **named)
        self.mixings.append(made)
        return made

    def describe(self):
        """A few words for the header of a run."""
        config, words = self.config, [self.config.method]
        if self.neighbours:
            gap = "" if self.gap is None else f" (spectral gap {self.gap:.2g})"
            words.append(f"on {config.topology or self.default_topology}{gap}")
        if self.meets:
            words.append(f"every {config.period} steps" if config.period > 1 else "every step")
        if config.compression != "none":
            words.append(f"of {config.compression} messages")
        return " ".join(words)

    def meeting(self):
        """Whether ranks meet at the end of this step."""
        return (self.step + 1) % self.config.period == 0

    def mean(self, x, out, comm=None):
        """out (P,) = the mean of all ranks' x (P,), or of those in `comm`."""
        with self.exposed():
            self.bytes_sent += mean(comm or self.comm, x, out, self.bucket_bytes)

    def exchange(self, graph, outgoing, incoming):
        """Row j of outgoing (d,n) goes to neighbour j, what comes back becomes row j of incoming (d,n)."""
        if outgoing.size:
            self.wait(graph.Ineighbor_alltoall(outgoing, incoming))
            self.bytes_sent += outgoing.nbytes

    def wait(self, request):
        with self.exposed():
            if self.oversubscribed:
                wait(request)
            else:
                request.Wait()

    @contextlib.contextmanager
    def exposed(self):
        """Around communication during which nothing is computed."""
        begin = time.perf_counter()
        yield
        seconds = time.perf_counter() - begin
        self.exposed_seconds += seconds
        self.flight_seconds += seconds

    def needs_sgd(self, momentum=True):
        """Refuse optimisers with which the method is not what its name says."""
        if self.optimizer.optimizer != "sgd" or (not momentum and self.optimizer.momentum):
            extra = "" if momentum else " and train.momentum = 0: it has a momentum of its own"
            raise UserError.of_all(f"averaging.method = {self.config.method} needs train.optimizer = sgd{extra}")

    # The contract of averaging.

    def begin(self, tokens, control):
        if self.table is not None:
            self.used = np.unique(tokens)
        self.final = 0
        self.control[0, : len(control)] = control
        self.control_request = None
        if not self.meets or self.meeting():
            self.control_request = self.comm.Iallreduce(self.control[0], self.control[1], MPI.MAX)
            self.bytes_sent += sent_by_allreduce(self.control[0].nbytes, self.comm.size)
        self.depart()

    def agreed(self):
        """As in averaging.Allreduce; None where ranks are alone in this step."""
        if self.control_request is None:
            return None
        with self.exposed():
            wait(self.control_request)
        return self.control[1]

    def ready(self, part):
        assert part.start == self.final
        self.final = part.stop
        self.progress()

    def progress(self):
        for mixing in self.mixings:
            mixing.progress()

    def gradient(self):
        if self.optimizer.clip and self.optimizer.clip_by == "own":
            norm = math.sqrt(sum_of_squares(self.vector))
            if norm > self.optimizer.clip:
                self.vector *= self.optimizer.clip / norm
        return [(0, self.direction(self.vector))], None

    def release(self, start, stop):
        pass

    def clear(self):
        if self.table is not None:
            self.vector[self.table.start :].reshape(self.table.shape)[self.used] = 0

    def mix(self, theta, lr):
        assert theta is self.x
        self.arrive(lr)
        self.step += 1

    def end(self):
        pass

    def round_trips(self):
        """Receiver -> seconds until it has answered a short message with another. Collective."""
        return self.neighbours.round_trips(self.comm, self.oversubscribed) if self.neighbours else {}

    def under_way(self):
        communicators, requests = [self.comm], []
        for mixing in self.mixings:
            more = mixing.under_way()
            communicators, requests = communicators + more[0], requests + more[1]
        return communicators, requests + ([self.control_request] if self.control_request is not None else [])


class OneTensor:
    """A vector (P,) as one tensor."""

    def __init__(self, length):
        self.shapes = [(length,)]

    def pack(self, vector):
        return vector.copy()

    def unpack(self, standard, vector):
        vector[:] = standard
