"""What survives the death of ranks, and how those that are left find each other.

Open MPI 5 tells survivors of a death by an exception (user-level failure mitigation, Bland et al. 2013), where mpirun was
started with `--with-ft ulfm`. Completion is not uniform: some ranks may have finished the step that failed on others. But a
step's Allreduce needs every rank, so survivors are at most one step apart: each keeps the two newest versions of its state,
and all go back to the older one of those at which they stand.

A lane's LSTM state is on one rank only, so in each step every rank sends its lanes' states to the next one, its buddy.

What a run makes of a death is decided in training/recovery.py.
"""

import contextlib
import os
import signal
import threading
import time
from collections.abc import Collection, Iterable, Iterator, Sequence

import numpy as np
from mpi4py import MPI

from ..kernels.types import Array
from .messages import allgather
from .runtime import kill_self, survivable

PAUSE = 0.15  # seconds before Shrink: a second death within the first milliseconds of it has crashed survivors
PATIENCE = 20.0  # seconds that survivors may take to find each other
WATCH, COPY = 101, 102  # tags


Failure: type[Exception] = MPI.Exception  # what survivors of a death get from any communication


class GiveUp(Exception):
    """The survivors cannot go on in memory. The text says why."""


class Watch:
    """Learns of a death anywhere in a communicator without communicating: a receive that nobody answers.

    Where deaths cannot be survived it does nothing.
    """

    def __init__(self, comm: MPI.Comm) -> None:
        self.buffer = np.zeros(1, np.int8)
        self.request: MPI.Request | None = None
        if survivable(comm):
            self.request = comm.Irecv(self.buffer, MPI.ANY_SOURCE, WATCH)

    def look(self) -> None:
        """Raises MPI.Exception where a rank is gone."""
        if self.request is not None:
            self.request.Test()

    def end(self) -> None:
        """Nothing is awaited any more."""
        if self.request is not None:
            self.request.Cancel()
            self.request.Wait()
            self.request = None


class Buddies:
    """Each rank's small state, kept by the next rank for the two newest steps while the third comes in.

    Parameters
    ----------
    comm : MPI.Comm
        Duplicated.
    sizes : sequence of int
        Bytes of each rank's state.
    """

    def __init__(self, comm: MPI.Comm, sizes: Sequence[int]) -> None:
        self.comm = comm.Dup()
        self.next, self.previous = (comm.rank + 1) % comm.size, (comm.rank - 1) % comm.size
        self.outgoing = [np.zeros(sizes[comm.rank], np.uint8) for _ in range(3)]
        self.incoming = [np.zeros(sizes[self.previous], np.uint8) for _ in range(3)]
        self.steps: list[int | None] = [None] * 3
        self.requests: list[MPI.Request] = []
        self.coming = 0

    def send(self, step: int, state: Array) -> None:
        """Begin to send state (n,) uint8, which is that after `step` steps, and to take in the previous rank's."""
        turn = step % 3
        self.outgoing[turn][:] = state
        self.steps[turn], self.coming = None, step
        self.requests = [
            self.comm.Isend(self.outgoing[turn], self.next, COPY),
            self.comm.Irecv(self.incoming[turn], self.previous, COPY),
        ]

    def complete(self) -> int:
        """Wait for both. Returns the bytes sent."""
        MPI.Request.Waitall(self.requests)
        self.steps[self.coming % 3], self.requests = self.coming, []
        return self.outgoing[0].size

    def kept(self, step: int) -> Array | None:
        """The previous rank's state (n,) uint8 after `step` steps, None where it is not here."""
        return self.incoming[step % 3] if self.steps[step % 3] == step else None


_retired: list[MPI.Request] = []  # requests that failed, and with them the memory that MPI may still write to


def shrink(
    comm: MPI.Comm, others: list[MPI.Comm], step: int, requests: list[MPI.Request], pids: dict[int, int]
) -> tuple[MPI.Comm, int, tuple[int, ...]]:
    """The survivors' communicator, the step that all of them have finished, and their ranks in `comm`.

    Parameters
    ----------
    comm : MPI.Comm
        In which somebody died.
    others : list of MPI.Comm
        Derived ones, in which somebody may still wait.
    step : int
        That this rank has finished; it still has the state of the one before.
    requests : list of MPI.Request
        That are under way.
    pids : dict
        rank -> process, of this machine.

    Raises GiveUp on all survivors where their steps do not fit, or where others may go on without them.
    """
    _retired.extend(requests)
    rank, size = comm.rank, comm.size
    with watchdog():
        while True:
            for one in (comm, *others):
                with contextlib.suppress(MPI.Exception):
                    one.Revoke()
            _let_end(requests, PAUSE)
            new = comm.Shrink()
            everyone: list[tuple[int, int, list[int]]] = []
            with contextlib.suppress(MPI.Exception):
                everyone = allgather(new, (rank, step, list(pids)), tuple[int, int, list[int]])
            if all_agree(new, bool(everyone)):
                ranks, steps, known = zip(*everyone, strict=True)
                _fence(pid for mate, pid in pids.items() if mate not in ranks)
                if not quorum(size, ranks, set().union(*known)):
                    raise GiveUp(f"rank {', '.join(map(str, ranks))} of {size} lost sight of the others, who may go on")
                if max(steps) - min(steps) > 1:
                    raise GiveUp(f"the survivors are at steps {sorted(set(steps))}")
                return new, min(steps), ranks
            comm, others, requests = new, [], []


def quorum(size: int, alive: Collection[int], known: set[int]) -> bool:
    """Whether the ranks `alive` of `size` may go on: no others can, behind a cut link say.

    known : set of int
        Ranks on machines where somebody is alive: of these the others are dead for certain. From elsewhere half of the rest
        may be alive and think the same of us, so it takes more than half, or half with the lowest.
    """
    voters = set(range(size)) - (known - set(alive))
    return 2 * len(alive) > len(voters) or (2 * len(alive) == len(voters) and min(voters) in alive)


def _fence(pids: Iterable[int]) -> None:
    """End processes of this machine that were thought dead and may only have been silent."""
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


@contextlib.contextmanager
def watchdog() -> Iterator[None]:
    """Ends this process where the block takes longer than PATIENCE: a supervisor can start anew, nobody can wait for ever."""
    timer = threading.Timer(PATIENCE, kill_self)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _let_end(requests: list[MPI.Request], seconds: float) -> None:
    """Give operations of revoked communicators the time to end, one way or the other."""
    end, left = time.monotonic() + seconds, requests
    while time.monotonic() < end:
        still = []
        for request in left:
            with contextlib.suppress(MPI.Exception):
                if not request.Test():
                    still.append(request)
        left = still
        time.sleep(0.005)


def all_agree(comm: MPI.Comm, flag: bool) -> bool:
    """Whether all that are alive say yes. The operation may fail and its result hold all the same."""
    value = np.array([flag], np.int32)
    with contextlib.suppress(MPI.Exception):
        comm.Iagree(value).Wait()
    return bool(value[0])
