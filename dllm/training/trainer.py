"""The training run: what one rank does from the first step to the last, the same on every rank."""

from __future__ import annotations

import resource
import time
from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np

from ..comm.control import Control
from ..comm.messages import allgather
from ..comm.runtime import mpi_library
from ..config import as_dict
from ..errors import UserError
from ..inference.evaluation import perplexity
from ..model import blocks
from ..runs.gathering import spread_checkpoints
from ..runs.state import parameters_hash
from . import optim
from .setup import Rank

SETTLED = 10  # steps before speed counts
BREATH = 1.0  # seconds between two signs of life
LAST_NAPS = (1.0, 2.0, 4.0, 8.0, 15.0, 15.0, 15.0)  # seconds before each further try to write the last checkpoint


class Trainer:
    """A run on this rank. Collective: every rank makes one and calls the same methods.

    Parameters
    ----------
    rank : setup.Rank
        All that it is made of.

    Attributes
    ----------
    before_step : list of callable
        Of the class: each is called with the Trainer before every step, on every rank. It changes no parameters: factors may
        have been made of them.
    state : State
        What changes from step to step.
    finished : State
        At the beginning of the step under way: what the run goes back to if a rank dies.
    total_steps : int
        Of the whole run.
    taken : int
        Steps since this start.
    deaths : int
        Of ranks, since the start.
    """

    before_step: ClassVar[list[Callable[[Trainer], None]]] = []

    def __init__(self, rank: Rank) -> None:
        self.rank, self.comm, self.config, self.corpus = rank, rank.comm, rank.config, rank.corpus
        self.state, self.spare, self.finished = rank.state, rank.spare, rank.state
        self.model, self.averaging, self.schedule = rank.model, rank.averaging, rank.schedule
        self._h, self._c = np.zeros_like(self.state.h), np.zeros_like(self.state.c)
        train, state = self.config.train, self.state
        epochs = train.epochs - state.epoch
        left = (epochs - 1) * self.schedule.windows + self.schedule.left(state.place) if epochs > 0 else 0
        self.total_steps = state.step + left
        if train.max_steps:
            self.total_steps = min(self.total_steps, train.max_steps)
        self.deaths = self.taken = 0
        self._work = 0, 0  # of the last step: what this rank has read, and operations

    def run(self, max_steps: int = 0, max_seconds: float = 0, stop: Callable[[], bool] = lambda: False) -> bool:
        """Train until the configured end, `max_steps` steps in all, `max_seconds` from now, or until stop() on any rank.

        Returns True where the run came to its end, or to a limit that was asked for; False where it was stopped. Raises
        UserError on all ranks where the run makes no sense any more.
        """
        first, saver, upkeep, metrics = self.state.step, self.rank.saver, self.rank.upkeep, self.rank.metrics
        validation, end = self.rank.validation, min(self.total_steps, max_steps or self.total_steps)
        self.rank.heartbeat.start()
        metrics.begin()
        agreed = Control()
        while not (self.state.step >= end or agreed.stop or agreed.out_of_time or validation.exhausted(self.state)):
            self.finished = self.state
            out_of_time = 0 < max_seconds <= time.monotonic() - metrics.clock.begun
            own = Control(stop(), out_of_time, checkpoint=saver.due(), writing=saver.writing, looking=upkeep.busy)
            metrics.start()
            for hook in self.before_step:
                hook(self)
            norm, lr, tokens, finite = self._step(own)
            self.taken += 1
            agreed = self.averaging.agreed()
            self._leave_out_if_spoilt(norm, tokens, finite)
            metrics.count(*self._work, settled=self.state.step > first + SETTLED)
            self._write_down(agreed, norm, lr)
        metrics.check_owner(self.state.step)
        upkeep.end()
        stopped = agreed.stop and self.state.step < end
        best = not stopped and not validation.due(self.state) and validation.run(self.state, final=True)
        self._save_last(best, lambda: not stopped and stop())
        if not stopped and saver.whole and self.config.storage.copies:
            self._spread_checkpoints()
        return not stopped

    def _save_last(self, best: bool, stop: Callable[[], bool]) -> None:
        """Have the last state on disk. One that is full may have room soon: it gets some time, until stop(). Collective."""
        saver, naps = self.rank.saver, list(LAST_NAPS)
        if saver.step == self.state.step:
            saver.complete()
            best = best if saver.whole else bool(saver.manifest["best"])
        while saver.step != self.state.step or not saver.whole:
            if saver.step == self.state.step:
                if not naps:
                    return
                if len(naps) == len(LAST_NAPS):
                    self.rank.reporter.warn(f"the last checkpoint is tried again for {sum(naps):.0f} s: make room for it")
                if self._nap(naps.pop(0), stop):
                    return
            saver.save(self.averaging.consensus(self.state), best, self.averaging.own_arrays(self.state))

    def _nap(self, seconds: float, stop: Callable[[], bool]) -> bool:
        """Wait, and show that the run is alive. Returns whether any rank has been asked to stop. Collective."""
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            time.sleep(min(left, BREATH))
            self.rank.metrics.show_alive()
        return any(allgather(self.comm, stop(), bool))

    def _spread_checkpoints(self) -> None:
        """Leave a model that every host can use. A disk that has no room for it is a warning: the run is done."""
        reporter = self.rank.reporter
        try:
            spread_checkpoints(self.comm, self.rank.domains, self.rank.ownership.run, reporter.warn)
        except UserError as error:
            if not error.shared:
                raise
            reporter.warn(f"not every disk has the whole model: {error}")

    def _step(self, control: Control) -> tuple[float, float, int, bool]:
        """One step of every rank.

        Returns the gradient's norm, the learning rate, the tokens of all ranks, and whether this rank's losses are finite.
        """
        state, new, model, averaging, train = self.state, self.spare, self.model, self.averaging, self.config.train
        lanes, copies = self.rank.lanes, self.rank.copies
        width, tokens = self.schedule.width(state.place), self.schedule.tokens(state.place)
        batch = lanes.window(state.place, width)
        self._work = batch.read, model.flops(batch)
        scale = averaging.scale * (width if train.loss_norm == "window" else 1) / max(1, tokens)
        mask = (train.seed, state.step, lanes.numbers)
        lr = optim.learning_rate(train, state.step, state.epoch, state.lr_factor, self.total_steps)

        sent = averaging.bytes_sent
        averaging.begin(batch.tokens, control)
        self._h[:], self._c[:] = state.h, state.c
        losses = model.forward(batch, self._h, self._c, scale, mask, averaging.progress)
        lane_loss = state.lane_loss + losses.sum(axis=0, dtype=np.float64)
        copies.send(state.step + 1, self._h, self._c, lane_loss)
        model.backward(averaging.ready, averaging.progress)
        gradient = averaging.gradient()
        sent -= copies.complete()

        # All ranks have come so far: nobody will ask for what `new` held.
        factors = model.factors if averaging.identical else None  # else `mix` changes what the optimiser has written
        norm = self.rank.optimizer.step(state, gradient, lr, new, factors)
        averaging.clear()
        averaging.mix(new.theta, lr)
        if np.isfinite(norm):
            new.h[:], new.c[:], new.lane_loss[:] = self._h, self._c, lane_loss
        elif new is not state:
            new.h[:], new.c[:], new.lane_loss[:] = state.h, state.c, state.lane_loss
        new.set_scalars(state.scalars())
        new.tokens += tokens
        new.seen += tokens
        new.bytes_sent += averaging.bytes_sent - sent
        finite = bool(np.isfinite(losses).all())
        new.move_on(self.schedule.after(state.place), train.carry)
        self.state, self.spare = new, state
        model.bind(new.theta, written=True)
        if new.place == 0:
            self.schedule.begin_epoch(new.order, new.epoch)
        return norm, lr, tokens, finite

    def _leave_out_if_spoilt(self, norm: float, tokens: int, finite: bool) -> None:
        """A step whose gradient is not finite changes nothing, on all ranks; its text is passed over. Collective.

        Raises UserError on all ranks where it was one too many.
        """
        verdict, state = self.averaging.verdict(norm, finite), self.state
        if verdict.sound is None:
            return
        state.skipped_in_a_row = 0 if verdict.sound else state.skipped_in_a_row + 1
        if verdict.sound:
            return
        if verdict.steps_ago == 0:
            state.tokens -= tokens
            state.seen -= tokens
            # what was sent before is what the step would have made of them
            self.rank.copies.send(state.step, state.h, state.c, state.lane_loss)
            self.rank.copies.complete()
        state.skipped += 1
        step, ranks = state.step - verdict.steps_ago, ", ".join(map(str, verdict.ranks))
        whose = f"rank{'s' if len(verdict.ranks) > 1 else ''} {ranks}" if ranks else "all ranks together"
        if state.skipped_in_a_row >= self.config.resilience.max_skipped:
            raise UserError.of_all(
                f"the gradient is not finite at step {step}, {state.skipped_in_a_row} times in a row, "
                f"that of {whose}: try a lower train.lr, or train.clip"
            )
        self.rank.reporter.warn(f"step {step} is left out: the gradient of {whose} is not finite")

    def _write_down(self, agreed: Control, norm: float, lr: float) -> None:
        """What is due after a step: a line of metrics, an evaluation, a checkpoint. Collective."""
        state, saver, every = self.state, self.rank.saver, self.config.checkpoint.every_steps
        if state.step % self.config.log.every == 0:
            self.rank.metrics.log(state, parameters_hash(state.theta), self.schedule.progress(state.place), norm, lr)
        for job, busy in ((saver, agreed.writing), (self.rank.upkeep, agreed.looking)):
            job.progress(self.rank.metrics.last)
            if job.under_way and not busy:
                job.settle()
        best = self.rank.validation.due(state) and self.rank.validation.run(state)
        if best or (every and state.step % every == 0) or (agreed.checkpoint and not saver.under_way):
            saver.begin(self.averaging.consensus(state), best, self.averaging.own_arrays(state))

    def close(self) -> None:
        """Nothing is under way any more, and all ranks have the model that they make up. Collective."""
        np.copyto(self.state.theta, self.averaging.model(self.state.theta))
        self.averaging.end()
        self.rank.heartbeat.end()

    def summary(self) -> dict[str, Any]:
        """What summary.json holds. Collective."""
        peaks = allgather(self.comm, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, int)
        clock, saver, best = self.rank.metrics.clock, self.rank.saver, self.rank.validation.best
        self.rank.metrics.settle()
        speed, flops = (clock.settled / clock.settled_seconds).tolist() if clock.settled_seconds else (None, None)
        text = blocks.units(self.config.model).text
        return {
            "ranks": self.comm.size,
            "mpi_library": mpi_library(),
            "parameters": self.rank.layout.parameters,
            "tokens_per_second": speed,
            "gflops": flops and flops / 1e9,
            "exposed_comm_fraction": clock.exposed_seconds / clock.logged_seconds if clock.logged_seconds else None,
            "checkpoints": saver.count,
            "checkpoint_seconds": saver.stalled,
            "peak_rss_bytes": peaks,
            "best_valid_loss": best if np.isfinite(best) else None,
            "best_valid_perplexity": perplexity(best) if text and np.isfinite(best) else None,
            "steps": self.state.step,
            "wall_seconds": time.monotonic() - clock.begun,
            "threads": self.rank.node.threads,
            "config": as_dict(self.config),
        }
