"""Asynchronous gossip: nobody waits for a neighbour, half of what one has is put into its memory."""

from typing import Any

import numpy as np

from ...kernels.types import Array
from .push_sum import PushSum


class AsyncGossip(PushSum):
    """Push-sum by one-sided messages (Kempe et al. 2003; asynchronous: Assran, Rabbat 2020, "Asynchronous gradient-push").

        x_i <- x_i - lr g_i(z_i)
        half of (x_i, w_i) is added to the inbox of one neighbour, the next in turn, if w_i is at least 1/2
        (x_i, w_i) <- the other half + what has come into the own inbox until now, which is empty then
        z_i  = x_i / w_i

    The sums of x and of w over all ranks and inboxes change by gradients only: nothing is lost, however uneven ranks are.
    They meet every averaging.period steps, to agree on when to stop; until then each goes at its own speed.
    """

    periodic = True
    between_nodes = False

    def prepare(self) -> None:
        from mpi4py import MPI
        from mpi4py.util.dtlib import from_numpy_dtype

        super().prepare()
        neighbours = self.graph("column")
        self.receivers = [rank for phase in neighbours.receivers for rank in phase]
        self.outgoing = np.empty(self.x.size + 1, self.x.dtype)  # x, and w behind it
        self.window = MPI.Win.Allocate(self.outgoing.nbytes, self.x.itemsize, comm=self.comm)  # type: ignore[arg-type]
        memory: Any = self.window.tomemory()
        self.inbox = np.frombuffer(memory, self.x.dtype)
        self.inbox[:] = 0
        self.kind = from_numpy_dtype(self.x.dtype)
        self.comm.Barrier()

    def arrive(self, lr: float) -> None:
        z, w = self.weigh(), self.w
        if self.receivers:
            if w[0] >= 0.5:  # a rank that nobody has sent to for long would be left with nothing to move
                z /= 2
                w /= 2
                self.outgoing[:-1], self.outgoing[-1] = z, w[0]
                self._push(self.receivers[self.step % len(self.receivers)])
            self._take()
        z /= w

    def progress(self) -> None:
        self.comm.Iprobe()  # others may be waiting for this rank's memory

    def average(self, out: Array) -> None:
        self.comm.Barrier()  # all that was pushed is there
        z, w = self.x, self.w
        z *= w
        self._take()
        self.mean(z, out)
        z /= w

    def end(self) -> None:
        self.window.Free()

    def _push(self, rank: int) -> None:
        from mpi4py import MPI

        self.window.Lock(rank, MPI.LOCK_SHARED)
        self.window.Accumulate([self.outgoing, self.kind], rank, op=MPI.SUM)
        self.window.Unlock(rank)
        self.bytes_sent += self.outgoing.nbytes

    def _take(self) -> None:
        from mpi4py import MPI

        self.window.Lock(self.comm.rank, MPI.LOCK_EXCLUSIVE)
        self.x += self.inbox[:-1]
        self.w += self.inbox[-1]
        self.inbox[:] = 0
        self.window.Unlock(self.comm.rank)
