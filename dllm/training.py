"""The training run: what one rank does from the first step to the last, the same on every rank."""

import dataclasses
import hashlib
import math
import pathlib
import resource
import time

import numpy as np
import xxhash

from . import checkpoint, optim
from .comm import recovery
from .comm.node import averaging, share
from .comm.pulse import Pulse
from .comm.runtime import check_same, mpi_library, survivable, together
from .config import as_dict
from .data.lanes import Lanes, Schedule, deal
from .errors import UserError
from .inference import Evaluation
from .kernels.gemm import aligned
from .kernels.reduce import copy, fence, sum_ranks, sum_ranks_of_rows
from .kernels.team import Team
from .layout import Layout
from .model import DTYPES, LanguageModel
from .state import State
from .survival import Clock, LaneCopies, Survived, take_lanes

STOP, OUT_OF_TIME, CHECKPOINT = range(3)  # places in the control values that ranks combine in each step
SETTLED = 10  # steps before speed counts
SLOW, PATIENCE = 1.5, 20.0  # a rank that takes so many times as long for so many seconds is named


class Trainer:
    """A run on this rank. Collective: every rank makes one and calls the same methods.

    Parameters
    ----------
    comm : MPI.Comm
    place : namespace
        Of comm.runtime.node.
    config : Config
    corpus : Corpus
        This rank's own where config.data.path has {rank}.
    run : path
        The run's folder.
    reporter : Reporter
    resume : Checkpoint, optional
        Where to go on from.
    survived : Survived, optional
        Of the run that goes on, on fewer ranks.
    """

    def __init__(self, comm, place, config, corpus, run, reporter, resume=None, survived=None):
        self.comm, self.place, self.config, self.run_folder, self.reporter = comm, place, config, run, reporter
        self.corpus, self.private = corpus, "{rank}" in config.data.path
        train = config.train
        self._deal_lanes()
        self.dtype = DTYPES[train.precision]
        B, L, H = len(self.mine), config.model.layers, config.model.hidden
        zeros = lambda *shape, dtype=self.dtype: np.zeros(shape, dtype)
        self.layout = Layout(config.model, corpus.vocabulary, self.dtype)
        self.resilient = survivable(comm) and not self.private
        memory = share(comm, place.comm, self.layout.size, self.dtype)
        with together(comm):
            team = Team(place.threads)
            bf16 = train.precision == "bf16"
            gradient = None if memory is None else memory.mine
            shape = config.model, corpus.vocabulary, self.dtype, train.window, B
            self.model = LanguageModel(*shape, bf16=bf16, gradient=gradient, team=team)
            self.optimizer = optim.make(train, self.layout.table, team)
            vector = lambda: aligned((self.layout.size,), self.dtype)
            moments = [vector() for _ in range(self.optimizer.moments)]
            states = zeros(L, B, H), zeros(L, B, H), zeros(B, dtype=np.float64)
            if survived is None:
                self.state = State(vector(), moments, *states)
                self.model.bind(self.state.theta)
            if resume is not None:
                checkpoint.check_fits(resume, self.layout, self.dtype, len(self.state.moments), train.lanes)
                checkpoint.load(resume, self.layout, self.state, self.mine)
            elif survived is None:
                self.model.initialise(train.seed)
        if survived is not None:
            self.state = State(survived.theta, survived.moments, *states, **survived.scalars)
            self.model.bind(self.state.theta)
            take_lanes(comm, survived.lanes, self.state, self.mine, config, reporter.warn)
        # Where a death can be survived, the state before the newest step stays whole until all have taken the next one.
        self.next = self.state.twin() if self.resilient else self.state
        self.h, self.c = zeros(L, B, H), zeros(L, B, H)
        self.copies = None
        if self.resilient:
            self.copies = LaneCopies(comm, config, self.dtype)
            self.copies.send(self.state.step, self.state.h, self.state.c, self.state.lane_loss)
            self.copies.complete()
        self._check_ranks_agree()
        self.averaging = averaging(
            comm, place.comm, memory, self.model.gradient, self.layout.table, train.window * -(-train.lanes // comm.size),
            int(config.averaging.bucket_mb * 2**20), place.ranks > place.cores,
        )  # fmt: skip
        self.pulse = None
        if memory is not None:
            self.pulse = Pulse(comm, place.comm, memory, config.resilience.deadline, reporter.complain)
        self.evaluation = None
        if "valid" in corpus.manifest["splits"]:
            self.evaluation = Evaluation(comm, corpus, "valid", config, self.dtype, self.private, team)
        self.total_steps = train.epochs * self.schedule.windows
        if train.max_steps:
            self.total_steps = min(self.total_steps, train.max_steps)
        self.saved_at, self.saved = (self.state.step, True) if resume else (-1, False)
        self.deaths = 0  # of ranks, since the start
        self.slow = None, 0.0  # the rank that was slowest last, and since when it has been much slower
        self.finished = self.state  # what it goes back to if a rank dies: the state at the beginning of the step
        self.clock = survived.clock if survived else Clock(time.monotonic())
        self.best = math.inf

    def _deal_lanes(self):
        """This rank's lanes, and what every rank knows of all of them."""
        comm, train = self.comm, self.config.train
        if comm.size > train.lanes:
            error = UserError(
                f"{comm.size} ranks share train.lanes = {train.lanes}: start at most {train.lanes} ranks, "
                f"or --set train.lanes={comm.size} or more"
            )
            error.shared = True
            raise error
        self.mine = deal(train.lanes, comm.size, comm.rank)
        B = len(self.mine)
        with together(comm):
            if self.private:
                self.lanes = Lanes(self.corpus, "train", range(B), B, train.window, self.mine.start)
            else:
                self.lanes = Lanes(self.corpus, "train", self.mine, train.lanes, train.window)
        predicted = np.concatenate(comm.allgather([self.lanes.predicted] * B))
        self.schedule = Schedule(predicted, train.window, train.last_window)

    def _check_ranks_agree(self):
        corpus = {"vocabulary": self.corpus.tokenizer_hash, "splits": " ".join(self.corpus.manifest["splits"])}
        if not self.private:
            corpus["corpus"] = self.corpus.hash
        check_same(self.comm, {**corpus, "parameters": self._hash(), "step": self.state.step})

    def _hash(self):
        return xxhash.xxh3_64_hexdigest(self.state.theta)

    def run(self, max_steps=0, max_seconds=0, stop=lambda: False):
        """Train until the configured end, `max_steps` steps in all, `max_seconds` from now, or until stop() on any rank.

        Returns True where the run came to its end, or to a limit that was asked for; False where it was stopped.
        """
        clock, first = self.clock, self.state.step
        if self.pulse is not None:
            self.pulse.start()
        self.end = min(self.total_steps, max_steps or self.total_steps)
        self._reset_interval()
        flags = np.zeros(4)
        while self.state.step < self.end and not flags[STOP] and not flags[OUT_OF_TIME]:
            self.finished, now = self.state, time.monotonic()
            minutes = self.config.checkpoint.every_minutes
            control = (
                stop(),
                0 < max_seconds <= now - clock.begun,
                0 < minutes <= (now - clock.saved) / 60,
            )
            begin = time.perf_counter()
            norm, lr, tokens = self._step(control)
            flags = self.averaging.agreed()
            self.interval_seconds += time.perf_counter() - begin
            self.interval_tokens += tokens
            state = self.state
            if state.step > first + SETTLED:
                clock.settled_seconds += time.perf_counter() - begin
                clock.settled_tokens += tokens
            if state.step % self.config.log.every == 0:
                self._log(norm, lr)
            best = self._evaluate() if self._evaluation_due() else False
            every = self.config.checkpoint.every_steps
            if best or flags[CHECKPOINT] or (every and state.step % every == 0):
                self._save(best)
        stopped = bool(flags[STOP]) and self.state.step < self.end
        best = False if stopped else self._evaluate(final=True)
        self._save(best)
        return not stopped

    def _step(self, control):
        """One step of every rank. Returns the gradient's norm, the learning rate and the tokens of all ranks."""
        state, new, model, averaging, train = self.state, self.next, self.model, self.averaging, self.config.train
        width, tokens = self.schedule.width(state.window), self.schedule.tokens(state.window)
        inputs, targets = self.lanes.window(state.window, width)
        scale = (width if train.loss_norm == "window" else 1) / tokens
        mask = (train.seed, state.step, self.lanes.numbers)
        lr = optim.learning_rate(train, state.step, state.epoch, state.lr_factor, self.total_steps)

        sent = averaging.bytes_sent
        averaging.begin(inputs.reshape(-1), control)
        self.h[:], self.c[:] = state.h, state.c
        losses = model.forward(inputs, targets, self.h, self.c, scale, mask, averaging.progress)
        lane_loss = state.lane_loss + losses.sum(axis=0, dtype=np.float64)
        if self.copies:
            self.copies.send(state.step + 1, self.h, self.c, lane_loss)
        model.backward(averaging.ready, averaging.progress)
        parts, rows = averaging.gradient()
        sent -= self.copies.complete() if self.copies else 0

        # All ranks have come so far: nobody will ask for what `new` held.
        norm = self.optimizer.step(state, parts, rows, lr, averaging.squares, averaging.release, new)
        averaging.clear()
        averaging.mix(new.theta)
        new.h[:], new.c[:], new.lane_loss[:] = self.h, self.c, lane_loss
        new.set_scalars(state.scalars())
        new.tokens += tokens
        new.bytes_sent += averaging.bytes_sent - sent
        new.next_window(self.schedule.windows, train.carry)
        self.state, self.next = new, state
        model.bind(new.theta)
        return norm, lr, tokens

    def _reset_interval(self):
        averaging = self.averaging
        self.interval_seconds, self.interval_tokens, self.interval_begin = 0.0, 0, self.state.step
        averaging.exposed_seconds = averaging.flight_seconds = 0.0

    def _log(self, norm, lr):
        """A line of metrics; every rank checks that it still has the same parameters as the others."""
        state, averaging = self.state, self.averaging
        losses = np.zeros(self.config.train.lanes)
        losses[self.mine.start : self.mine.stop] = state.lane_loss
        losses = self.comm.allreduce(losses)  # by lane, so that the sum does not depend on who computed which
        times = (self.interval_seconds, averaging.exposed_seconds, averaging.flight_seconds)
        steps = self.state.step - self.interval_begin
        everyone = self.comm.allgather((self._hash(), times))
        different = [rank for rank, (digest, _) in enumerate(everyone) if digest != everyone[0][0]]
        seconds, exposed, flight = np.mean([times for _, times in everyone], axis=0)
        busy = [(one[0] - one[1]) / steps for _, one in everyone]
        slowest = int(np.argmax(busy))
        self._name_straggler(slowest, busy[slowest] / float(np.median(busy)))
        loss = float(losses.sum() / state.tokens)
        problem = None
        if different:
            problem = (
                f"at step {state.step} rank {different[0]} has other parameters than rank 0: its memory or MPI is at fault"
            )
        elif not math.isfinite(loss) or not math.isfinite(norm):
            problem = f"the loss is not finite at step {state.step}: try a lower train.lr, or train.clip"
        if problem:
            error = UserError(problem)
            error.shared = True
            raise error
        self.reporter.log(
            {
                "step": state.step,
                "epoch": state.epoch + state.window / self.schedule.windows,
                "loss": loss,
                "grad_norm": norm,
                "lr": lr,
                "tokens_per_second": self.interval_tokens / seconds,
                "exposed_comm_fraction": exposed / seconds,
                "hidden_comm_fraction": max(0.0, 1 - exposed / flight) if flight else 1.0,
                "busy_seconds": [min(busy), float(np.median(busy)), busy[slowest]],
                "slowest_rank": slowest,
                "bytes_sent": state.bytes_sent,
                "parameters": everyone[0][0],
            }
        )
        self.clock.exposed_seconds += exposed
        self.clock.logged_seconds += seconds
        state.lane_loss[:] = 0
        state.tokens = state.bytes_sent = 0
        self._reset_interval()

    def _name_straggler(self, rank, times):
        """Say which rank takes `times` as long for its part of a step as the others, once it has for a while."""
        now, crowded = time.monotonic(), self.place.ranks > self.place.cores
        if times < SLOW or crowded or self.slow[0] != rank:
            self.slow = rank, now
        elif now - self.slow[1] > PATIENCE:
            self.reporter.warn(f"rank {rank} takes {times:.1f} times as long for a step as the others do")
            self.slow = rank, math.inf  # once

    def _evaluation_due(self):
        every = self.config.train.eval_every
        return self.state.step % every == 0 if every else self.state.window == 0

    def _evaluate(self, final=False):
        """Evaluate on the validation split. Returns whether it is the best so far.

        The one at a run's end, where none is due, changes nothing that a resumed run would notice.
        """
        if self.evaluation is None or (final and self._evaluation_due()):
            return False
        state = self.state
        result = self.evaluation.run(state.theta)
        self.reporter.log({"step": state.step, **result})
        best = result["loss"] < state.best_loss
        self.best = min(self.best, state.best_loss, result["loss"])
        if not final:
            state.lr_factor = optim.stalled(self.config.train, state.lr_factor, result["loss"], state.best_loss)
            state.best_loss = min(state.best_loss, result["loss"])
        return best

    def _save(self, best):
        """A checkpoint, once a step. Where it cannot be written, training goes on with a warning."""
        state = self.state
        if self.saved_at == state.step:
            return
        problem = checkpoint.save(
            self.comm, self.run_folder, state, self.layout, (self.mine, self.config.train.lanes),
            self.corpus.tokenizer_hash, best,
        )  # fmt: skip
        self.clock.saved, self.saved_at, self.saved = time.monotonic(), state.step, not problem
        if problem:
            self.reporter.warn(f"no checkpoint at step {state.step}: {problem}; training goes on, older ones stay")
            return
        if self.comm.rank == 0:
            checkpoint.prune(self.run_folder, self.config.checkpoint.keep)

    def close(self):
        """Nothing is under way any more."""
        self.averaging.end()
        if self.pulse is not None:
            self.pulse.end()

    def survive(self):
        """After a failure: the survivors' communicator and what they go on with. Collective over the survivors."""
        comm, buddies = self.comm, self.copies.buddies
        if self.pulse is not None:
            self.pulse.end()
        communicators, requests = self.averaging.under_way()
        communicators += [self.place.comm, buddies.comm]
        new, step, alive = recovery.shrink(comm, communicators, self.finished.step, [*requests, *buddies.requests])
        state = next(version for version in (self.state, self.next) if version.step == step)
        lanes = self.copies.pieces(state, self.mine.start, alive)
        dead = sorted(set(range(comm.size)) - set(alive))
        return new, Survived(state.theta, state.moments, state.scalars(), lanes, self.clock), dead

    def summary(self):
        """What summary.json holds. Collective."""
        peaks = self.comm.allgather(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
        clock = self.clock
        speed = clock.settled_tokens / clock.settled_seconds if clock.settled_seconds else None
        return {
            "ranks": self.comm.size,
            "mpi_library": mpi_library(),
            "parameters": self.layout.parameters,
            "tokens_per_second": speed,
            "gflops": speed and 6 * self.layout.active() * speed / 1e9,
            "exposed_comm_fraction": clock.exposed_seconds / clock.logged_seconds if clock.logged_seconds else None,
            "peak_rss_bytes": peaks,
            "best_valid_perplexity": math.exp(min(self.best, 700)) if math.isfinite(self.best) else None,
            "steps": self.state.step,
            "wall_seconds": time.monotonic() - clock.begun,
            "threads": self.place.threads,
            "config": as_dict(self.config),
        }


def code_hash():
    """Names the version of the code by its text."""
    root = pathlib.Path(__file__).parent
    files = sorted({*root.rglob("*.py"), *(root / "kernels").glob("*.py")})
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()[:16]


def warm_up(config):
    """Run every kernel of a configuration once on a tiny model, so that all are compiled or loaded from the cache."""
    small = dataclasses.replace(config.model, embedding=min(2, config.model.embedding), hidden=2, layers=2)
    small = dataclasses.replace(small, tied=config.model.tied and small.embedding == 2)
    dtype = DTYPES[config.train.precision]
    model = LanguageModel(small, 5, dtype, 2, 1, bf16=config.train.precision == "bf16")
    optimizer = optim.make(config.train, model.layout.table)
    P = model.layout.size
    h, c = np.zeros((2, 1, 2), dtype), np.zeros((2, 1, 2), dtype)
    moments = [np.zeros(P, dtype) for _ in range(optimizer.moments)]
    state = State(np.zeros(P, dtype), moments, h, c, np.zeros(1))
    model.bind(state.theta)
    tokens = np.zeros((2, 1), np.int64)
    model.forward(tokens, tokens, h, c, 1.0, (1, 1, np.zeros(1, np.int64)))
    model.backward()
    rows = None if model.layout.table is None else np.zeros(1, np.int64)
    start = P if rows is None else model.layout.table.start
    optimizer.step(state, [(0, model.gradient[:start]), (start, model.gradient[start:])], rows, 0.0)
    fence()
    vectors = np.zeros((1, 8), dtype)
    sum_ranks(vectors, 0, 0, 8)
    copy(vectors[0], vectors[0])
    sum_ranks_of_rows(np.zeros((1, 2), dtype), vectors, 0, np.zeros(1, np.int64))
    LanguageModel(small, 5, dtype, 2, 1, state.theta, training=False).forward(tokens, tokens, h, c)
