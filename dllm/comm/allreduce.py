"""The sum of gradients over all ranks, while the backward still computes them."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import numpy as np

from ..kernels.optim import sum_of_squares
from ..kernels.rows import clear_rows
from ..kernels.types import Array
from .averaging import Averaging, Gradient, Table
from .control import Control
from .runtime import wait_for
from .traffic import IN_FLIGHT, sent_by_allreduce

if TYPE_CHECKING:
    from mpi4py import MPI


class Allreduce(Averaging):
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

    def __init__(
        self,
        comm: MPI.Comm,
        gradient: Array,
        table: Table | None,
        tokens: int,
        bucket_bytes: int,
        oversubscribed: bool = False,
    ) -> None:
        super().__init__(comm, gradient, oversubscribed)
        start, shape = (gradient.size, (0, 1)) if table is None else (table.start, table.shape)
        self.table = gradient[start:].reshape(shape)
        # Summing rows costs an extra message and two copies: it pays where few of the rows can be in use. Which ones are is
        # said by a bit for each, combined over ranks: that tells no more than the sum does, whose other rows are zero.
        self.sparse = tokens * self.comm.size < shape[0] // 2
        dense = start if self.sparse else gradient.size
        step = max(1, bucket_bytes // gradient.itemsize)
        self.parts = [(0, gradient[:dense])] + [(dense, gradient[dense:])] * self.sparse
        self.buckets = [slice(at, min(at + step, dense)) for at in range(0, dense, step)] if comm.size > 1 else []
        self.longest = max((bucket.stop - bucket.start for bucket in self.buckets), default=0)
        self.free: list[Array] = []
        self.in_use = np.zeros(shape[0] if self.sparse else 0, bool)  # by this rank
        self.mask, self.union = np.zeros((2, -(-self.in_use.size // 8)), np.uint8)  # the same in bits; of all ranks
        self.flight: list[tuple[MPI.Request, slice, Array]] = []
        self.rows_request: MPI.Request | None = None
        self.rows = np.zeros(0, np.int64)  # of the table, in use by any rank
        self.squares: float | None = None
        self.next = 0  # bucket to be sent
        self.departed: float | None = None  # when the first message of this step left

    def begin(self, tokens: Array, control: Control) -> None:
        self.final, self.next, self.flight, self.departed = 0, 0, [], None
        self.unsound = False
        self.squares = 0.0 if self.buckets else None
        self.bytes_sent += self.control.begin(self.comm, control)
        if self.sparse:
            self._say_rows(tokens)

    def ready(self, part: slice) -> None:
        self.advance(part)
        begin = time.perf_counter()
        self._post()
        self.exposed_seconds += time.perf_counter() - begin

    def progress(self) -> None:
        """Move messages on, take in what has arrived, send what waited for a free buffer."""
        begin = time.perf_counter()
        while self.flight and self.flight[0][0].Test():
            self._arrived()
        self._post()
        self.exposed_seconds += time.perf_counter() - begin

    def gradient(self) -> Gradient:
        """Wait for everything; the sum over ranks, in parts that lie one behind the other."""
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
        return Gradient(self.parts, self.rows if self.sparse else None, self.squares)

    def clear(self) -> None:
        if self.sparse:
            clear_rows(self.table, self.rows)
        else:
            self.table[:] = 0

    def describe(self) -> str:
        return f"allreduce in {len(self.buckets)} buckets while backward runs"

    def under_way(self) -> tuple[list[MPI.Comm], list[MPI.Request]]:
        communicators, requests = super().under_way()
        if self.rows_request is not None:
            requests.append(self.rows_request)
        return communicators, requests + [entry[0] for entry in self.flight]

    def _post(self) -> None:
        if not self.free and not self.flight:
            self.free = [np.empty(self.longest, self.vector.dtype) for _ in range(min(IN_FLIGHT, len(self.buckets)))]
        while self.next < len(self.buckets) and self.buckets[self.next].stop <= self.final and self.free:
            bucket, buffer = self.buckets[self.next], self.free.pop()
            send, receive = self.vector[bucket], buffer[: bucket.stop - bucket.start]
            self.departed = self.departed or time.perf_counter()
            self.flight.append((self.comm.Iallreduce(send, receive), bucket, buffer))
            self.bytes_sent += sent_by_allreduce(send.nbytes, self.comm.size)
            self.next += 1

    def _arrived(self) -> None:
        _, bucket, buffer = self.flight.pop(0)
        total = buffer[: bucket.stop - bucket.start]
        squares = sum_of_squares(total)
        self._suspect(squares, self.vector[bucket])
        self.squares = (self.squares or 0.0) + squares
        self.vector[bucket] = total
        self.free.append(buffer)

    def _suspect(self, total: Array | float, own: Array) -> None:
        """Where a sum, or its sum of squares, is not finite: is this rank's own part of it to blame?"""
        if not np.isfinite(total).all():
            self.unsound = self.unsound or not np.isfinite(own).all()

    def _say_rows(self, tokens: Array) -> None:
        """Begin to combine which rows of the table the ranks use; neither how often nor in which order is said."""
        from mpi4py import MPI

        self.in_use[:] = False
        self.in_use[tokens] = True
        self.mask[:] = np.packbits(self.in_use)
        self.rows_request = self.comm.Iallreduce(self.mask, self.union, MPI.BOR)
        self.bytes_sent += sent_by_allreduce(self.mask.nbytes, self.comm.size)

    def _list_rows(self) -> None:
        """The rows that any rank uses, the same on all ranks."""
        if self.rows_request is not None:
            self._wait(self.rows_request)
        self.rows = np.flatnonzero(np.unpackbits(self.union, count=self.in_use.size))

    def _sum_rows(self) -> None:
        """Sum only the rows in use."""
        self._list_rows()
        if self.comm.size > 1:
            send = self.table[self.rows]  # zero where only other ranks use the row
            receive = np.empty_like(send)
            self._wait(self.comm.Iallreduce(send, receive))
            self._suspect(receive, send)
            self.table[self.rows] = receive
            self.bytes_sent += sent_by_allreduce(send.nbytes, self.comm.size)

    def _wait(self, request: MPI.Request) -> None:
        wait_for(request, self.oversubscribed)
