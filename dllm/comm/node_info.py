"""Where a rank is: which ranks share its machine's memory, how many cores and threads it has."""

from __future__ import annotations

import contextlib
import os
import pathlib
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .messages import allgather
from .runtime import wait

if TYPE_CHECKING:
    from mpi4py import MPI


@dataclass(frozen=True)
class NodeInfo:
    """This rank's place on its node."""

    comm: MPI.Comm  # of the ranks that share memory
    cores: int  # that these may use together
    threads: int  # of each rank
    pids: dict[int, int]  # rank in the whole job -> process, of all ranks of this node, in the order of `comm`
    oversubscribed: bool  # more ranks than cores on this machine, be it because several nodes are containers on it

    @property
    def rank(self) -> int:
        """In `comm`."""
        return self.comm.rank

    @property
    def ranks(self) -> int:
        """How many share the node."""
        return self.comm.size


def find_node(comm: MPI.Comm, threads: int = 0) -> NodeInfo:
    """This rank's place on its machine. Collective. threads : of each rank; 0: its share of the cores."""
    from mpi4py import MPI

    local = comm.Split_type(MPI.COMM_TYPE_SHARED)
    cores, machines = _cores(local), allgather(comm, _machine(), str)
    return NodeInfo(
        comm=local,
        cores=cores,
        threads=threads or max(1, cores // local.size),
        pids=dict(allgather(local, (comm.rank, os.getpid()), tuple[int, int])),
        oversubscribed=local.size > cores or machines.count(_machine()) > (os.cpu_count() or 1),
    )


def _cores(local: MPI.Comm) -> int:
    """Cores that the ranks of this node may use together, however MPI has bound them."""
    mine = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
    return len(set().union(*allgather(local, sorted(mine), list[int])))


def _machine() -> str:
    """What ranks on one machine have in common, in whatever containers they are."""
    try:
        return pathlib.Path("/proc/sys/kernel/random/boot_id").read_text()
    except OSError:
        return socket.gethostname()


@contextlib.contextmanager
def leader_first(node: NodeInfo, most: int = 1) -> Iterator[bool]:
    """A block that one rank of a node runs first, or `most` of them at a time where there are so many cores.

    The others wait and leave them the cores. Yields whether this rank is one of the first.
    """
    leads = node.rank < min(most, node.cores)
    if not leads:
        wait(node.comm.Ibarrier(), nap=0.01)
    try:
        yield leads
    finally:
        if leads:
            wait(node.comm.Ibarrier(), nap=0.001)
