"""Allreduce where ranks of a node read each other's gradient instead of sending it: copies are what messages cost there.

The gradients of a node's n ranks lie in one piece of memory, (n,P). Of each bucket every rank owns one n-th, its shard:

    all ranks have the bucket ready        ->  each adds up its shard, in the order of the ranks
    (several nodes: the shards' owners add theirs up by nonblocking Allreduce, and each sends 1/n of the bucket)
    all shards are complete                ->  the optimiser reads each where it lies

Three counters of each rank, in the same memory, say how far it is. Nobody waits for a bucket before the backward is over.
"""

from __future__ import annotations

import math
import time
from typing import TYPE_CHECKING

import numpy as np

from ..kernels.reduce import copy, fence, sum_ranks, sum_ranks_of_rows
from ..kernels.rows import copy_rows, scatter_rows, squares_of_rows
from .allreduce import Allreduce
from .averaging import Gradient, Table
from .control import Control
from .runtime import NAP
from .shared_memory import READ, READY, SQUARES, SUMMED, SharedMemory
from .survivors import Watch
from .traffic import sent_by_allreduce

if TYPE_CHECKING:
    from mpi4py import MPI

    from ..kernels.types import Array


class NodeAllreduce(Allreduce):
    """`Allreduce`, to the same effect, with a SharedMemory whose row of this rank is the model's gradient.

    Parameters
    ----------
    node : MPI.Comm
        The ranks of this node; every node has as many.
    memory : SharedMemory
    others
        As in Allreduce.
    """

    def __init__(
        self, comm: MPI.Comm, node: MPI.Comm, memory: SharedMemory, table: Table | None, tokens: int, bucket_bytes: int,
        oversubscribed: bool = False,
    ) -> None:  # fmt: skip
        self.node, self.memory = node, memory
        super().__init__(comm, memory.mine, table, tokens, bucket_bytes, oversubscribed)
        self.peers = self.comm.Split(node.rank, comm.rank)  # the owners of the same shard on all nodes
        self.watch = Watch(self.comm)
        self.request: MPI.Request | None = None
        self.start = self.vector.size - self.table.size  # of the table
        self.stages = len(self.buckets) + self.sparse
        self.before = 0  # stages of earlier steps
        shards = [(rank, self._shard(bucket, rank)) for bucket in range(len(self.buckets)) for rank in range(node.size)]
        embedding = self.parts[-1:] if self.sparse else []
        self.parts = [(shard.start, memory.vectors[rank, shard]) for rank, shard in shards] + embedding
        self.buffer = np.empty(-(-self.longest // node.size) if self.peers.size > 1 else 0, self.vector.dtype)

    def begin(self, tokens: Array, control: Control) -> None:
        super().begin(tokens, control)
        self.summed, self.own_squares, self.request = 0, 0.0, None

    def ready(self, part: slice) -> None:
        self.advance(part)
        whole = self.final == len(self.vector)
        self.departed = self.departed or time.perf_counter()
        count = self.stages if whole else sum(bucket.stop <= self.final for bucket in self.buckets)
        self._say(READY, self.before + count)
        self.progress()

    def progress(self) -> None:
        begin = time.perf_counter()
        while self._advance():
            pass
        self.exposed_seconds += time.perf_counter() - begin

    def gradient(self) -> Gradient:
        begin = time.perf_counter()
        while not self._all(SUMMED, self.before + len(self.buckets)):
            if not self._advance():
                self._rest()
        self.squares = self.memory.numbers[:, SQUARES].sum()
        if not math.isfinite(self.squares):
            others = [rank for rank in range(self.node.size) if rank != self.node.rank]
            for shard in (self._shard(bucket, rank) for bucket in range(len(self.buckets)) for rank in others):
                self._suspect(self.squares, self.vector[shard])
        if self.sparse:
            self._sum_rows()
        self.before += self.stages
        now = time.perf_counter()
        self.exposed_seconds += now - begin
        self.flight_seconds += now - (self.departed or now)
        return Gradient(self.parts, self.rows if self.sparse else None, self.squares)

    def clear(self) -> None:
        begin = time.perf_counter()
        self._say(READ, self.before)
        while not self._all(READ, self.before):
            self._rest()
        self.exposed_seconds += time.perf_counter() - begin
        super().clear()

    def _advance(self) -> bool:
        """Add up what has become possible, at most a bucket. Returns whether anything was."""
        if self.request is not None:
            if not self.request.Test():
                return False
            shard, self.request = self._shard(self.summed, self.node.rank), None
            self._shard_is_complete(copy(self.vector[shard], self.buffer[: shard.stop - shard.start]))
            return True
        if self.summed < len(self.buckets) and self._all(READY, self.before + self.summed + 1):
            shard = self._shard(self.summed, self.node.rank)
            squares = sum_ranks(self.memory.vectors, self.node.rank, shard.start, shard.stop)
            if not math.isfinite(squares):  # this rank's own part is overwritten, the others' are not
                others = (row[shard] for rank, row in enumerate(self.memory.vectors) if rank != self.node.rank)
                self.unsound = self.unsound or all(np.isfinite(other).all() for other in others)
            if self.peers.size > 1:
                self.request = self.peers.Iallreduce(self.vector[shard], self.buffer[: shard.stop - shard.start])
            else:
                self._shard_is_complete(squares)
            return True
        return False

    def _shard_is_complete(self, squares: float) -> None:
        shard = self._shard(self.summed, self.node.rank)
        self.own_squares += squares
        self.memory.numbers[self.node.rank, SQUARES] = self.own_squares
        self.summed += 1
        self._count(shard.stop - shard.start)
        self._say(SUMMED, self.before + self.summed)

    def _count(self, elements: int) -> None:
        """Bytes that others read of this rank, its parts of their shards and its own shard, or that it sends to nodes."""
        nbytes = elements * self.vector.itemsize
        self.bytes_sent += 2 * (self.node.size - 1) * nbytes + sent_by_allreduce(nbytes, self.peers.size)

    def _shard(self, bucket: int, rank: int) -> slice:
        """Which part of a bucket a rank of this node adds up."""
        start, stop = self.buckets[bucket].start, self.buckets[bucket].stop
        first, last = (start + (stop - start) * part // self.node.size for part in (rank, rank + 1))
        return slice(first, last)

    def _sum_rows(self) -> None:
        """The same for the rows of the table that any rank uses: one stage more, in which a shard is some of the rows."""
        self._list_rows()
        shards = np.array_split(self.rows, self.node.size)
        while not self._all(READY, self.before + self.stages):
            self._rest()
        mine = shards[self.node.rank]
        total = np.empty((len(mine), self.table.shape[1]), self.vector.dtype)
        sum_ranks_of_rows(total, self.memory.vectors, self.start, mine)
        if self.peers.size > 1:
            part, total = total, np.empty_like(total)
            self._wait(self.peers.Iallreduce(part, total))
        if not np.isfinite(total).all():
            self._suspect(total, self.table[mine])
        scatter_rows(self.table, mine, total)
        self._count(total.size)
        self._say(SUMMED, self.before + self.stages)
        while not self._all(SUMMED, self.before + self.stages):
            self._rest()
        for rank, rows in enumerate(shards):
            if rank != self.node.rank:
                theirs = self.memory.vectors[rank][self.start : self.vector.size].reshape(self.table.shape)
                squares = squares_of_rows(theirs, rows)
                if not math.isfinite(squares):
                    self._suspect(squares, self.table[rows])
                copy_rows(self.table, theirs, rows)

    def _say(self, what: int, count: int) -> None:
        fence()
        self.memory.counters[self.node.rank, what] = count

    def _all(self, what: int, count: int) -> bool:
        """Whether every rank of this node has said so."""
        if self.memory.counters[:, what].min() < count:
            return False
        fence()
        return True

    def end(self) -> None:
        self.watch.end()

    def under_way(self) -> tuple[list[MPI.Comm], list[MPI.Request]]:
        communicators, requests = super().under_way()
        requests += [request for request in (self.request, self.watch.request) if request is not None]
        return [*communicators, self.peers], requests

    def _rest(self) -> None:
        """Nothing to do for the moment, but to notice that a rank is gone."""
        if self.control.request is not None:
            self.control.request.Test()
        self.watch.look()
        if self.oversubscribed:
            time.sleep(NAP)
