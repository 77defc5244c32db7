"""What all ranks together find out about a run while it goes: its metrics, whether they still agree, which of them is slow."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from ..comm.averaging import Averaging
from ..comm.messages import allgather, total
from ..comm.replicas import Domains
from ..errors import UserError
from ..inference.evaluation import perplexity
from ..kernels.types import Array
from ..runs.ownership import Ownership
from ..runs.state import State
from .progress import Reporter

if TYPE_CHECKING:
    from mpi4py import MPI

LINKS = 64  # pairs of neighbours in a line of metrics, the slowest
BEAT = 5.0  # seconds between signs of life in the run's folder
TOLD = tuple[str, tuple[float, float, float], bool | None, dict[int, float], int]  # by each rank, for a line of metrics
SLOW, PATIENCE = 1.5, 20.0  # a rank that takes so many times as long for so many seconds is named


@dataclass
class Clock:
    """What a run has spent, over all the Trainers that it may take."""

    begun: float = field(default_factory=time.monotonic)
    settled_seconds: float = 0.0  # of steps behind the first few, after which speed counts
    settled: Array = field(default_factory=lambda: np.zeros(2))  # in these: tokens or frames read by all ranks, operations
    own: Array = field(default_factory=lambda: np.zeros(2))  # the same of this rank, of which the others do not know yet
    exposed_seconds: float = 0.0
    logged_seconds: float = 0.0


class Metrics:
    """Adds up the steps of an interval, for a line of metrics. Collective: every rank has one.

    Parameters
    ----------
    comm : MPI.Comm
    oversubscribed : bool
        Ranks share cores: then one that is slow says nothing.
    averaging : Averaging
        With its counters.
    clock : Clock
    reporter : Reporter
    ownership : Ownership
    domains : Domains
        Of the run's folder.
    """

    def __init__(
        self,
        comm: MPI.Comm,
        oversubscribed: bool,
        averaging: Averaging,
        clock: Clock,
        reporter: Reporter,
        ownership: Ownership,
        domains: Domains,
    ) -> None:
        self.comm, self.oversubscribed, self.averaging, self.clock = comm, oversubscribed, averaging, clock
        self.reporter, self.ownership, self.domains = reporter, ownership, domains
        # The slowest rank, and since when.
        self.slow: tuple[int | None, float] = None, 0.0
        self.last = 0.0  # seconds of the last step
        self.shown_alive = 0.0  # when the run's folder was told last

    def begin(self) -> None:
        """An interval begins."""
        self.seconds = self.exposed = self.flight = 0.0
        self.read = self.steps = 0

    def start(self) -> None:
        """A step begins. What was sent since the last one, for an evaluation or a checkpoint, does not count."""
        self.averaging.exposed_seconds = self.averaging.flight_seconds = 0.0
        self.started = time.perf_counter()

    def count(self, read: int, flops: int, settled: bool) -> None:
        """A step was taken.

        Parameters
        ----------
        read : int
            Tokens or frames that this rank has read.
        flops : int
            Operations of products that it took.
        settled : bool
            Its speed counts.
        """
        self.last = seconds = time.perf_counter() - self.started
        self.seconds += seconds
        self.exposed += self.averaging.exposed_seconds
        self.flight += self.averaging.flight_seconds
        self.read, self.steps = self.read + read, self.steps + 1
        if settled:
            self.clock.settled_seconds += seconds
            self.clock.own += read, flops
        self.show_alive()

    def show_alive(self) -> None:
        """Show the launcher that the run goes on."""
        now = time.monotonic()
        if self.domains.leads and now - self.shown_alive > BEAT:
            self.ownership.show_alive()
            self.shown_alive = now

    def log(self, state: State, digest: str, progress: float, norm: float, lr: float) -> None:
        """A line of metrics, and an end to the run where the ranks no longer agree. Clears what `state` has added up.

        digest : str
            The hash of this rank's parameters.
        progress : float
            The part of the epoch that is done.

        Raises UserError on all ranks.
        """
        own_times = self.seconds, self.exposed, self.flight
        own = digest, own_times, self._is_held(), self.averaging.round_trips(), state.bytes_sent
        digests, times, holds, trips, sent = zip(*allgather(self.comm, own, TOLD), strict=True)
        own_sums = np.array([state.lane_loss.sum(), self.read])  # of all lanes: that of one says how one text reads
        loss, read = total(self.comm, own_sums).tolist()
        loss = loss / state.tokens if state.tokens else 0.0
        self.settle()
        self._check(state.step, digests, loss)
        self._check_owner(state.step, list(holds))
        seconds, exposed, flight = np.mean(times, axis=0)
        busy = [(one[0] - one[1]) / self.steps for one in times]
        slowest = int(np.argmax(busy))
        self._name_straggler(slowest, busy[slowest] / float(np.median(busy)))
        if state.tokens:  # not where every step was left out
            self.reporter.log(
                {
                    "step": state.step,
                    "epoch": state.epoch + progress,
                    "loss": loss,
                    **({"perplexity": perplexity(loss)} if self.reporter.units.text else {}),
                    "grad_norm": norm,
                    "lr": lr,
                    "skipped": state.skipped,
                    "tokens_per_second": read / seconds,
                    "exposed_comm_fraction": exposed / seconds,
                    "hidden_comm_fraction": max(0.0, 1 - exposed / flight) if flight else 1.0,
                    "busy_seconds": [min(busy), float(np.median(busy)), busy[slowest]],
                    "slowest_rank": slowest,
                    "bytes_sent": sum(sent) // len(sent),
                    "most_bytes_sent": max(sent),
                    **self._links(trips),
                    "parameters": digest,
                }
            )
        self.clock.exposed_seconds += exposed
        self.clock.logged_seconds += seconds
        state.lane_loss[:] = 0
        state.tokens = state.bytes_sent = 0
        self.begin()

    def settle(self) -> None:
        """Let the clock have what all ranks have read and computed. Collective."""
        self.clock.settled += total(self.comm, self.clock.own)
        self.clock.own[:] = 0

    def _links(self, trips: tuple[dict[int, float], ...]) -> dict[str, dict[str, float]]:
        """The pairs of neighbours whose messages took longest: "rank-rank" -> seconds there and back."""
        pairs = [(seconds, f"{rank}-{other}") for rank, found in enumerate(trips) for other, seconds in found.items()]
        return {"neighbour_seconds": {pair: round(s, 6) for s, pair in sorted(pairs, reverse=True)[:LINKS]}} if pairs else {}

    def check_owner(self, step: int) -> None:
        """Raise UserError on all ranks where another job has taken the run's folder. Collective."""
        self._check_owner(step, allgather(self.comm, self._is_held(), bool | None))

    def _is_held(self) -> bool | None:
        """Whether the run's folder is still this job's; None where another rank looks at this disk."""
        return self.ownership.is_held() if self.domains.leads else None

    def _check_owner(self, step: int, everyone: list[bool | None]) -> None:
        if False in everyone:
            raise UserError.of_all(f"another job has taken over {self.ownership.run}: this one ends at step {step}")

    def _check(self, step: int, digests: tuple[str, ...], loss: float) -> None:
        different = [rank for rank, digest in enumerate(digests) if digest != digests[0]]
        if different and self.averaging.identical:
            problem = f"at step {step} rank {different[0]} has other parameters than rank 0: its memory or MPI is at fault"
        elif not math.isfinite(loss):
            problem = f"the loss is not finite at step {step}: try a lower train.lr, or train.clip"
        else:
            return
        raise UserError.of_all(problem)

    def _name_straggler(self, rank: int, times: float) -> None:
        """Say which rank takes `times` as long for its part of a step as the others, once it has for a while."""
        now = time.monotonic()
        if times < SLOW or self.oversubscribed or self.slow[0] != rank:
            self.slow = rank, now
        elif now - self.slow[1] > PATIENCE:
            self.reporter.warn(f"rank {rank} takes {times:.1f} times as long for a step as the others do")
            self.slow = rank, math.inf  # once
