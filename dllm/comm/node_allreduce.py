"""Allreduce where ranks of a node read each other's gradient instead of sending it: copies are what messages cost there.

The gradients of a node's n ranks lie in one piece of memory, (n,P). Of each bucket every rank owns one n-th, its shard:

    all ranks have the bucket ready        ->  each adds up its shard, in the order of the ranks
    (several nodes: the shards' owners add theirs up by nonblocking Allreduce, and each sends 1/n of the bucket)
    all shards are complete                ->  the optimiser reads each where it lies

Three counters of each rank, in the same memory, say how far it is. Nobody waits for a bucket before the backward is over.
"""

import math
import mmap
import os
import time

import numpy as np

from ..kernels.reduce import copy, fence, sum_ranks, sum_ranks_of_rows
from .allreduce import Allreduce, sent_by_allreduce
from .recovery import Watch
from .runtime import NAP, allgather

READY, SUMMED, READ = 0, 8, 16  # places of the counters: a line of the cache each
SQUARES = SUMMED + 1  # place of a float64: the sum of squares of the rank's shards
PULSE = READ + 1  # place of a counter that grows as long as the rank lives
PAGE = 4096
LARGE = 100 * 2**20  # bytes


class SharedMemory:
    """Vectors (n,P or a little more) of the ranks of a node, and their counters (n,24), zero at first. Collective over `node`.

    It has no name, so it is gone with the last of its ranks, however that ended.

    Raises OSError on all ranks where one of them cannot have it.
    """

    def __init__(self, node, size, dtype):
        rows = -(-size * np.dtype(dtype).itemsize // PAGE) * PAGE
        head = -(-node.size * 24 * 8 // PAGE) * PAGE
        length, handle, problem = head + node.size * rows, None, None
        try:
            if node.rank == 0:
                handle = os.memfd_create("dllm")
                os.ftruncate(handle, length)
        except (OSError, AttributeError) as error:
            problem = str(error)
        place = allgather(node, (os.getpid(), handle, problem))[0]
        try:
            if place[2] is None:
                own = handle if node.rank == 0 else os.open(f"/proc/{place[0]}/fd/{place[1]}", os.O_RDWR)
                memory = mmap.mmap(own, length)
        except OSError as error:
            problem = str(error)
        problem = next((text for text in allgather(node, problem) if text), None)
        if node.rank == 0 and handle is not None and problem:
            os.close(handle)
        if problem:
            raise OSError(problem)
        os.close(own)  # the mapping stays
        self.counters = np.frombuffer(memory, np.int64, node.size * 24).reshape(node.size, 24)
        self.numbers = self.counters.view(np.float64)
        self.vectors = np.frombuffer(memory, dtype, offset=head).reshape(node.size, -1)
        self.mine = self.vectors[node.rank, :size]
        self._memory, self._starts = memory, [head + rank * rows for rank in range(node.size) if rank != node.rank]
        self._large = rows > LARGE

    def forget(self, start, stop):
        """Drop this rank's view of the others' elements [start, stop), which count as memory of every rank that reads them.

        Where vectors are small the view stays: to get it back costs some microseconds a page.
        """
        if self._large:
            for row in self._starts:
                first = -(-(row + start * self.mine.itemsize) // PAGE) * PAGE
                last = (row + stop * self.mine.itemsize) // PAGE * PAGE
                if first < last:
                    self._memory.madvise(mmap.MADV_DONTNEED, first, last - first)


def share(comm, node, size, dtype):
    """SharedMemory of a rank's node; None on all ranks where not all nodes have it, or not the same number of ranks.

    Collective over `comm`.
    """
    memory = None
    if node.size > 1:
        try:
            memory = SharedMemory(node, size, dtype)
        except OSError:
            memory = None
    everyone = allgather(comm, node.size if memory is not None else 0)
    return memory if len(set(everyone)) == 1 else None


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

    def __init__(self, comm, node, memory, table, tokens, bucket_bytes, oversubscribed=False):
        self.node, self.memory = node, memory
        super().__init__(comm, memory.mine, table, tokens, bucket_bytes, oversubscribed)
        self.peers = self.comm.Split(node.rank, comm.rank)  # the owners of the same shard on all nodes
        self.watch, self.request = Watch(self.comm), None
        self.start = 0 if table is None else table.start
        self.stages = len(self.buckets) + self.sparse
        self.before = 0  # stages of earlier steps
        shards = [(rank, self._shard(bucket, rank)) for bucket in range(len(self.buckets)) for rank in range(node.size)]
        table = self.parts[-1:] if self.sparse else []
        self.parts = [(shard.start, memory.vectors[rank, shard]) for rank, shard in shards] + table
        self.buffer = np.empty(-(-self.longest // node.size) if self.peers.size > 1 else 0, self.vector.dtype)

    def begin(self, tokens, control):
        super().begin(tokens, control)
        self.summed, self.own_squares, self.request = 0, 0.0, None

    def ready(self, part):
        assert part.start == self.final
        self.final = part.stop
        whole = self.final == len(self.vector)
        self.departed = self.departed or time.perf_counter()
        count = self.stages if whole else sum(bucket.stop <= self.final for bucket in self.buckets)
        self._say(READY, self.before + count)
        self.progress()

    def progress(self):
        begin = time.perf_counter()
        while self._advance():
            pass
        self.exposed_seconds += time.perf_counter() - begin

    def gradient(self):
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
        self.flight_seconds += now - self.departed
        return self.parts, self.rows

    def release(self, start, stop):
        self.memory.forget(start, stop)

    def clear(self):
        begin = time.perf_counter()
        self._say(READ, self.before)
        self.memory.forget(0, len(self.vector))  # what was left between the parts, and the table
        while not self._all(READ, self.before):
            self._rest()
        self.exposed_seconds += time.perf_counter() - begin
        super().clear()

    def _advance(self):
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
            self.memory.forget(shard.start, shard.stop)
            if self.peers.size > 1:
                self.request = self.peers.Iallreduce(self.vector[shard], self.buffer[: shard.stop - shard.start])
            else:
                self._shard_is_complete(squares)
            return True
        return False

    def _shard_is_complete(self, squares):
        shard = self._shard(self.summed, self.node.rank)
        self.own_squares += squares
        self.memory.numbers[self.node.rank, SQUARES] = self.own_squares
        self.summed += 1
        self._count(shard.stop - shard.start)
        self._say(SUMMED, self.before + self.summed)

    def _count(self, elements):
        """Bytes that others read of this rank, its parts of their shards and its own shard, or that it sends to nodes."""
        nbytes = elements * self.vector.itemsize
        self.bytes_sent += 2 * (self.node.size - 1) * nbytes + sent_by_allreduce(nbytes, self.peers.size)

    def _shard(self, bucket, rank):
        """Which part of a bucket a rank of this node adds up."""
        start, stop = self.buckets[bucket].start, self.buckets[bucket].stop
        edge = lambda part: start + (stop - start) * part // self.node.size
        return slice(edge(rank), edge(rank + 1))

    def _sum_rows(self):
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
        self._suspect(total, self.table[mine])
        self.table[mine] = total
        self._count(total.size)
        self._say(SUMMED, self.before + self.stages)
        while not self._all(SUMMED, self.before + self.stages):
            self._rest()
        for rank, rows in enumerate(shards):
            if rank != self.node.rank:
                theirs = self.memory.vectors[rank, self.start : self.start + self.table.size].reshape(self.table.shape)[rows]
                self._suspect(theirs, self.table[rows])
                self.table[rows] = theirs

    def _say(self, what, count):
        fence()
        self.memory.counters[self.node.rank, what] = count

    def _all(self, what, count):
        """Whether every rank of this node has said so."""
        if self.memory.counters[:, what].min() < count:
            return False
        fence()
        return True

    def end(self):
        self.watch.end()

    def under_way(self):
        communicators, requests = super().under_way()
        requests += [request for request in (self.request, self.watch.request) if request is not None]
        return [*communicators, self.peers], requests

    def _rest(self):
        """Nothing to do for the moment, but to notice that a rank is gone."""
        self.control_request.Test()
        self.watch.look()
        if self.oversubscribed:
            time.sleep(NAP)


def averaging(comm, node, memory, gradient, *arguments):
    """The Allreduce that suits the machine. Arguments as in Allreduce from `table` on."""
    if memory is None:
        return Allreduce(comm, gradient, *arguments)
    return NodeAllreduce(comm, node, memory, *arguments)
