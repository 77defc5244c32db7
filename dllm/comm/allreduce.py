"""Averaging gradients over all ranks while the backward still computes them.

An averaging method is what the training step asks for:

    begin(tokens, control)  a step begins: embedding rows in use, control values to combine
    agreed()                their maximum over the ranks; None where these are alone in this step
    ready(slice)            that slice of the gradient is final on this rank
    progress()              called often from inside the backward: neither MPI moves a message on its own
    gradient()              the gradient that the optimiser gets, in parts, and which embedding rows of it may not be zero
    release(start, stop)    the optimiser has read these elements
    clear()                 it has read all
    mix(theta, lr)          what the parameters become after the optimiser's step
    average(out)            the model that all ranks make up
    round_trips()           neighbour -> seconds that it takes to answer, where ranks have neighbours
    describe()              words for the header of a run
    under_way()             communicators and requests in which ranks may still wait when one has died
    end()                   the run is over

plus `squares`, the gradient's sum of squares without those rows where it is known on the way, else None; `unsound`, whether
this rank's own share of the gradient is known not to be finite; `identical`, whether all ranks keep the same parameters;
`scale`, by which each rank multiplies its loss; `arrays`, name -> vector that a checkpoint must hold for this rank;
`step`, how many were taken, where what is sent depends on it; and counters for the metrics: bytes sent, seconds exposed
(this rank did nothing else meanwhile), seconds in flight.
"""

import time

import numpy as np
from mpi4py import MPI

from ..kernels.optim import sum_of_squares
from .runtime import wait

IN_FLIGHT = 4  # buckets at a time, so the receive buffers stay small however large the model


def sent_by_allreduce(nbytes, ranks):
    """Bytes that a rank sends for an Allreduce of `nbytes`, by the usual algorithms for long messages.

    Thakur, Rabenseifner, Gropp 2005, "Optimization of collective communication operations in MPICH".
    """
    return 2 * (ranks - 1) * nbytes // ranks


def sent_by_allgather(nbytes, ranks):
    """Bytes that a rank sends for an Allgather to which each gives `nbytes`, by any of the usual algorithms."""
    return (ranks - 1) * nbytes


class Allreduce:
    """The sum over ranks by nonblocking Allreduce, bucket by bucket in one fixed order.

    Parameters
    ----------
    comm : MPI.Comm
        Duplicated, so that no other message can come in between.
    gradient : (P,) array
        This rank's gradient; becomes the sum over all ranks.
    table : object with start, shape; or None
        The embedding (V,E) at the end of the vector, from element `start` on. Only rows that tokens use get a gradient,
        added to what is there. None: there is no such table, and all of the vector is overwritten in each step.
    tokens : int
        The most tokens that any rank has in a window.
    bucket_bytes : int
    oversubscribed : bool
        True where ranks outnumber cores: sleep while waiting.
    """

    identical, scale = True, 1

    def __init__(self, comm, gradient, table, tokens, bucket_bytes, oversubscribed=False):
        self.arrays = {}
        self.comm, self.vector, self.oversubscribed = comm.Dup(), gradient, oversubscribed
        self.table = None if table is None else gradient[table.start :].reshape(table.shape)
        # Sending rows costs an extra message and two copies: it pays where few of the rows can be in use.
        self.sparse = table is not None and tokens * comm.size < table.shape[0] // 2
        dense = table.start if self.sparse else gradient.size
        step = max(1, bucket_bytes // gradient.itemsize)
        self.parts = [(0, gradient[:dense])] + [(dense, gradient[dense:])] * self.sparse
        self.buckets = [slice(at, min(at + step, dense)) for at in range(0, dense, step)] if comm.size > 1 else []
        self.longest = max((bucket.stop - bucket.start for bucket in self.buckets), default=0)
        self.free = []
        self.mine = np.full(tokens, -1, np.int32)
        self.everyones = np.full(tokens * comm.size, -1, np.int32)
        self.in_use = np.zeros(table.shape[0] if self.sparse else 0, bool)
        self.control = np.zeros((2, 5))
        self.flight = []
        self.rows = self.squares = None
        self.bytes_sent, self.exposed_seconds, self.flight_seconds = 0, 0.0, 0.0

    def begin(self, tokens, control):
        """Start a step. tokens: (n,) embedding rows this rank uses; control: up to 5 numbers, combined by maximum."""
        self.final, self.next, self.flight, self.departed = 0, 0, [], None
        self.rows, self.unsound = None, False
        self.squares = 0.0 if self.buckets else None
        self.control[0, : len(control)] = control
        self.control_request = self.comm.Iallreduce(self.control[0], self.control[1], MPI.MAX)
        self.bytes_sent += sent_by_allreduce(self.control[0].nbytes, self.comm.size)
        if self.sparse:
            self.mine[: len(tokens)], self.mine[len(tokens) :] = tokens, -1
            self.rows_request = self.comm.Iallgather(self.mine, self.everyones)
            self.bytes_sent += sent_by_allgather(self.mine.nbytes, self.comm.size)

    def agreed(self):
        """The maximum over ranks of the control values given to `begin`."""
        wait(self.control_request)
        return self.control[1]

    def ready(self, part):
        """`part` of the gradient is final; parts come in order and without gaps."""
        assert part.start == self.final
        self.final = part.stop
        begin = time.perf_counter()
        self._post()
        self.exposed_seconds += time.perf_counter() - begin

    def progress(self):
        """Move messages on, take in what has arrived, send what waited for a free buffer."""
        begin = time.perf_counter()
        while self.flight and self.flight[0][0].Test():
            self._arrived()
        self._post()
        self.exposed_seconds += time.perf_counter() - begin

    def gradient(self):
        """Wait for everything. Returns the sum and the embedding rows in use, None for all of them.

        The sum is a list of (first element, array), one behind the other; where rows are in use the table is the last.
        """
        begin = time.perf_counter()
        while self.next < len(self.buckets) or self.flight:
            self._wait(self.flight[0][0])
            self._arrived()
            self._post()
        if self.sparse:
            self._sum_rows()
        now = time.perf_counter()
        self.exposed_seconds += now - begin
        if self.departed is not None:
            self.flight_seconds += now - self.departed
        return self.parts, self.rows

    def release(self, start, stop):
        """Nothing: they are this rank's own."""

    def clear(self):
        """The gradient was read: embedding rows that are added to become zero again."""
        if self.table is not None:
            self.table[slice(None) if self.rows is None else self.rows] = 0

    def mix(self, theta, lr):
        """Nothing: every rank took the same step."""

    def average(self, out):
        """Nothing to do: every rank has it."""

    def round_trips(self):
        """None: there are no neighbours."""
        return {}

    def describe(self):
        """A few words for the header of a run."""
        return f"allreduce in {len(self.buckets)} buckets while backward runs"

    def end(self):
        """The run is over."""

    def under_way(self):
        """Communicators and requests in which this rank, or another, may still wait when a rank has died."""
        begun = [getattr(self, name, None) for name in ("control_request", "rows_request")]
        return [self.comm], [request for request in (*begun, *(entry[0] for entry in self.flight)) if request is not None]

    def _post(self):
        if not self.free and not self.flight:
            self.free = [np.empty(self.longest, self.vector.dtype) for _ in range(min(IN_FLIGHT, len(self.buckets)))]
        while self.next < len(self.buckets) and self.buckets[self.next].stop <= self.final and self.free:
            bucket, buffer = self.buckets[self.next], self.free.pop()
            send, receive = self.vector[bucket], buffer[: bucket.stop - bucket.start]
            self.departed = self.departed or time.perf_counter()
            self.flight.append((self.comm.Iallreduce(send, receive), bucket, buffer))
            self.bytes_sent += sent_by_allreduce(send.nbytes, self.comm.size)
            self.next += 1

    def _arrived(self):
        _, bucket, buffer = self.flight.pop(0)
        total = buffer[: bucket.stop - bucket.start]
        squares = sum_of_squares(total)
        self._suspect(squares, self.vector[bucket])
        self.squares += squares
        self.vector[bucket] = total
        self.free.append(buffer)

    def _suspect(self, total, own):
        """Where a sum, or its sum of squares, is not finite: is this rank's own part of it to blame?"""
        if not np.isfinite(total).all():
            self.unsound = self.unsound or not np.isfinite(own).all()

    def _list_rows(self):
        """The rows that any rank's tokens use, the same list on all ranks."""
        self._wait(self.rows_request)
        self.in_use[:] = False
        self.in_use[self.everyones[self.everyones >= 0]] = True
        self.rows = np.flatnonzero(self.in_use)

    def _sum_rows(self):
        """Sum only the rows in use."""
        self._list_rows()
        if self.comm.size > 1:
            send = self.table[self.rows]  # zero where only other ranks use the row
            receive = np.empty_like(send)
            self._wait(self.comm.Iallreduce(send, receive))
            self._suspect(receive, send)
            self.table[self.rows] = receive
            self.bytes_sent += sent_by_allreduce(send.nbytes, self.comm.size)

    def _wait(self, request):
        if self.oversubscribed:
            wait(request)
        else:
            request.Wait()
