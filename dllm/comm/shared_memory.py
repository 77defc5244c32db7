"""Memory that the ranks of a node share: a vector of each, and counters by which they say how far they are."""

from __future__ import annotations

import mmap
import os
from typing import TYPE_CHECKING

import numpy as np

from ..kernels.types import DType
from .messages import allgather, broadcast

if TYPE_CHECKING:
    from mpi4py import MPI

COUNTERS = 24  # of each rank: three lines of the cache, with what is written at the same time in one
READY, SUMMED, READ = 0, 8, 16  # places: stages of the gradient that the rank has ready, has added up, has read
SQUARES = SUMMED + 1  # place of a float64: the sum of squares of what it has added up
ALIVE = READ + 1  # place: grows as long as the rank lives (heartbeat.py)
PAGE = 4096


class SharedMemory:
    """Vectors (n,P or a little more) of a node's ranks, and their counters (n,COUNTERS), zero at first. Collective over `node`.

    It has no name, so it is gone with the last of its ranks, however that ended. What a rank reads of others counts in its
    resident memory, too; the node has it once.

    Raises OSError on all ranks where one of them cannot have it.
    """

    def __init__(self, node: MPI.Comm, size: int, dtype: DType) -> None:
        rows = -(-size * np.dtype(dtype).itemsize // PAGE) * PAGE
        head = -(-node.size * COUNTERS * 8 // PAGE) * PAGE
        memory = _map(node, head + node.size * rows)
        self.counters = np.frombuffer(memory, np.int64, node.size * COUNTERS).reshape(node.size, COUNTERS)
        self.numbers = self.counters.view(np.float64)
        self.vectors = np.frombuffer(memory, dtype, offset=head).reshape(node.size, -1)
        self.mine = self.vectors[node.rank, :size]


def _map(node: MPI.Comm, length: int) -> mmap.mmap:
    """The same `length` bytes of memory on all ranks of a node, zeros at first. Collective; raises OSError on all ranks."""
    handle = problem = None
    try:
        if node.rank == 0:
            handle = os.memfd_create("dllm")
            os.ftruncate(handle, length)
    except (OSError, AttributeError) as error:
        problem = str(error)
    pid, number, problem = broadcast(node, (os.getpid(), handle, problem), tuple[int, int | None, str | None])
    memory = None
    if problem is None:
        try:
            own = handle if handle is not None else os.open(f"/proc/{pid}/fd/{number}", os.O_RDWR)
            try:
                memory = mmap.mmap(own, length)  # it stays when the file is closed
            finally:
                if handle is None:
                    os.close(own)
        except (OSError, ValueError, OverflowError) as error:
            problem = str(error)
    problem = next((text for text in allgather(node, problem, str | None) if text), None)
    if handle is not None:
        os.close(handle)
    if problem or memory is None:
        raise OSError(problem)
    return memory


def share(comm: MPI.Comm, node: MPI.Comm, size: int, dtype: DType) -> SharedMemory | None:
    """SharedMemory of a rank's node; None on all ranks where not all nodes have it, or not the same number of ranks.

    Collective over `comm`.
    """
    memory = None
    if node.size > 1:
        try:
            memory = SharedMemory(node, size, dtype)
        except OSError:
            memory = None
    everyone = allgather(comm, node.size if memory is not None else 0, int)
    return memory if len(set(everyone)) == 1 else None
