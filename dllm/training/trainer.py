"""The training run: what one rank does from the first step to the last, the same on every rank."""

from __future__ import annotations

import dataclasses
import functools
import math
import resource
import time
from collections.abc import Callable
from typing import ClassVar

import numpy as np
import xxhash
from threadpoolctl import threadpool_limits

from ..comm import methods, recovery
from ..comm.heartbeat import Pulse
from ..comm.node_allreduce import averaging, share
from ..comm.runtime import allgather, check_same, mpi_library, survivable, together
from ..config import as_dict
from ..data.lanes import Schedule, deal
from ..data.pair_lanes import read_lanes
from ..errors import UserError
from ..inference.evaluation import Evaluation
from ..kernels.gemm import aligned
from ..kernels.team import Team
from ..model.language_model import LanguageModel
from ..model.layout import Layout
from ..model.precision import DTYPES
from ..runs import checkpoint
from ..runs.checkpoint_writer import Saver
from ..runs.state import State
from . import optim
from .lane_copies import Clock, LaneCopies, Survived, take_lanes
from .metrics import Monitor

STOP, OUT_OF_TIME, CHECKPOINT, WRITING, UNSOUND = range(5)  # places in the control values that ranks combine in each step
NOT_ASKED = np.array([0, 0, 0, 1, 0.0])  # what they are where ranks do not meet
SETTLED = 10  # steps before speed counts
IN_NODE, BETWEEN_NODES = 4.0, 0.5  # MiB of a bucket: many small ones keep slow links busy


class Trainer:
    """A run on this rank. Collective: every rank makes one and calls the same methods.

    Parameters
    ----------
    comm : MPI.Comm
    place : NodeInfo
        Of comm.node_info.
    config : Config
    corpus : Corpus
        This rank's own where config.data.path has {rank}.
    claim : Ownership
        On the run's folder, before it is taken.
    reporter : Reporter
    resume : Checkpoint, optional
        Where to go on from.
    survived : Survived, optional
        Of the run that goes on, on fewer ranks.

    Attributes
    ----------
    before_step : list of callable
        Of the class: each is called with the Trainer before every step, on every rank.
    """

    before_step: ClassVar[list[Callable[[Trainer], None]]] = []

    def __init__(self, comm, place, config, corpus, claim, reporter, resume=None, survived=None):
        self.comm, self.place, self.config, self.claim, self.reporter = comm, place, config, claim, reporter
        self.corpus, self.private = corpus, config.data.private
        train = config.train
        self._deal_lanes()
        self.dtype = DTYPES[train.precision]
        B, L, H = len(self.mine), config.model.layers, config.model.hidden
        zeros = lambda *shape, dtype=self.dtype: np.zeros(shape, dtype)
        self.layout = Layout(config.model, corpus.vocabulary, self.dtype)
        plain = methods.is_plain(config)
        self.resilient = survivable(comm) and not self.private and plain
        memory = share(comm, place.comm, self.layout.size if plain else 1, self.dtype)
        with together(comm):
            team = Team(place.threads)
            threadpool_limits(place.threads, "blas")  # more than there are cores stand in each other's way
            bf16 = train.precision == "bf16"
            gradient = memory.mine if plain and memory is not None else None
            shape = config.model, corpus.vocabulary, self.dtype, train.window, B
            self.model = LanguageModel(*shape, bf16=bf16, gradient=gradient, team=team)
            self.optimizer = optim.make_optimizer(train, self.layout.table, team)
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
        bucket = config.averaging.bucket_mb or (IN_NODE if place.ranks == comm.size else BETWEEN_NODES)
        if plain:
            self.averaging = averaging(
                comm, place.comm, memory, self.model.gradient, self.layout.table, train.window * -(-train.lanes // comm.size),
                int(bucket * 2**20), place.oversubscribed,
            )  # fmt: skip
        else:
            self.averaging = methods.make(
                place.comm, comm, self.state.theta, self.model.gradient, self.layout.table,
                dataclasses.replace(config.averaging, bucket_mb=bucket), train, place.oversubscribed, self.layout,
            )  # fmt: skip
            self.averaging.step = self.state.step
        self.means = None  # theta and moments of the model that all ranks make up, where each has its own
        if not self.averaging.identical:
            self.means = [vector() for _ in range(1 + len(self.state.moments))]
        self.unsound = 0  # this rank + 1, where its gradient was not finite and the others do not know yet
        if resume is not None:
            self._take_own(resume)
        self.pulse = None
        if memory is not None:
            self.pulse = Pulse(place, memory, config.resilience.deadline, reporter.complain)
        self.evaluation = None
        if "valid" in corpus.manifest["splits"]:
            self.evaluation = Evaluation(comm, corpus, "valid", config, self.dtype, self.private, team)
        self.total_steps = train.epochs * self.schedule.windows
        if train.max_steps:
            self.total_steps = min(self.total_steps, train.max_steps)
        self.deaths = 0  # of ranks, since the start
        self.finished = self.state  # what it goes back to if a rank dies: the state at the beginning of the step
        self.clock = survived.clock if survived else Clock(time.monotonic())
        before = survived and survived.saver
        self.saver = Saver(
            comm, claim, self.layout, train.lanes, corpus.tokenizer_hash, config.checkpoint, reporter.warn, before,
            self._made_by(),
        )  # fmt: skip
        self.saver.step = self.state.step if resume else -1
        self.monitor = Monitor(comm, place.oversubscribed, self.averaging, self.clock, reporter, claim)
        self.best = math.inf

    def _deal_lanes(self):
        """This rank's lanes, and what every rank knows of all of them."""
        comm, train = self.comm, self.config.train
        if comm.size > train.lanes:
            raise UserError.of_all(
                f"{comm.size} ranks share train.lanes = {train.lanes}: start at most {train.lanes} ranks, "
                f"or --set train.lanes={comm.size} or more"
            )
        if self.corpus.tokenizer.pairs and train.carry != "window":
            raise UserError.of_all("pairs begin from zero states: --preset pairs, or --set train.carry=window")
        self.mine = deal(train.lanes, comm.size, comm.rank)
        B = len(self.mine)
        with together(comm):
            if self.private:
                self.lanes = read_lanes(self.corpus, "train", range(B), B, train.window, self.mine.start)
            else:
                self.lanes = read_lanes(self.corpus, "train", self.mine, train.lanes, train.window)
        self.schedule = Schedule(self.lanes, train.last_window, functools.partial(allgather, comm))

    def _own(self):
        """name -> vector: what only this rank has, and a checkpoint must hold."""
        if self.averaging.identical:
            return self.averaging.arrays
        moments = {f"moment.{number}": moment for number, moment in enumerate(self.state.moments)}
        return {"theta": self.state.theta, **moments, **self.averaging.arrays}

    def _made_by(self):
        """What must be the same for `_own` to be of use."""
        averaging = self.config.averaging
        names = ("method", "topology", "weights", "degree", "compression", "rank", "fraction")
        made_by = " ".join(f"{name}={getattr(averaging, name)}" for name in names)
        return f"{made_by} ranks of a node={self.place.ranks}" if averaging.hierarchical else made_by

    def _take_own(self, resume):
        """Go on from this rank's own model and memories, where it wrote them; else from the average. Collective."""
        own, name = self._own(), self.config.averaging.method
        if own and not checkpoint.load_own(resume, self.comm.rank, self.comm.size, own, self._made_by()):
            self.reporter.warn(
                f"{resume.folder} has no {name} state for {self.comm.size} ranks: all go on from the average model"
            )

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
        clock, first, saver = self.clock, self.state.step, self.saver
        if self.pulse is not None:
            self.pulse.start()
        self.end = min(self.total_steps, max_steps or self.total_steps)
        self.monitor.begin()
        flags, every = np.zeros(4), self.config.checkpoint.every_steps
        while self.state.step < self.end and not flags[STOP] and not flags[OUT_OF_TIME]:
            self.finished, now = self.state, time.monotonic()
            control = (
                stop(),
                0 < max_seconds <= now - clock.begun,
                0 < saver.interval() <= now - saver.begun,
                saver.writing,
                self.unsound,
            )
            self.monitor.start()
            for hook in self.before_step:
                hook(self)
            norm, lr, tokens = self._step(control)
            flags = self._agreed()
            seconds = self.monitor.count(tokens)
            state = self.state
            if state.step > first + SETTLED:
                clock.settled_seconds += seconds
                clock.settled_tokens += tokens
            if state.step % self.config.log.every == 0:
                self.monitor.log(state, self._hash(), self.schedule.windows, norm, lr)
            if saver.under_way and not flags[WRITING]:
                saver.settle()
            best = self._evaluate() if self._evaluation_due() else False
            if best or (every and state.step % every == 0) or (flags[CHECKPOINT] and not saver.under_way):
                saver.begin(self._to_save(), best, self._own())
        self.monitor.check_claim(self.state.step)
        stopped = bool(flags[STOP]) and self.state.step < self.end
        best = False if stopped else self._evaluate(final=True)
        if saver.step != self.state.step:
            saver.save(self._to_save(), best, self._own())
        saver.complete()
        return not stopped

    def _agreed(self):
        """The control values of this step. Raises UserError on all ranks where gradients are not finite for too long."""
        flags = self.averaging.agreed()
        if flags is None:
            return NOT_ASKED
        if not self.averaging.identical:
            state = self.state
            state.skipped_in_a_row = state.skipped_in_a_row + 1 if flags[UNSOUND] else 0
            if flags[UNSOUND]:
                self._note_skipped(state, f"rank {int(flags[UNSOUND]) - 1}", state.step - 1)
        return flags

    def _model(self):
        """Parameters of the model that all ranks make up. Collective."""
        if self.averaging.identical:
            return self.state.theta
        self.averaging.average(self.means[0])
        return self.means[0]

    def _to_save(self):
        """The State with the model that all ranks make up. Collective."""
        if self.averaging.identical:
            return self.state
        for moment, mean in zip(self.state.moments, self.means[1:], strict=True):
            self.averaging.mean(moment, mean)
        return dataclasses.replace(self.state, theta=self._model(), moments=self.means[1:])

    def _step(self, control):
        """One step of every rank. Returns the gradient's norm, the learning rate and the tokens of all ranks."""
        state, new, model, averaging, train = self.state, self.next, self.model, self.averaging, self.config.train
        width, tokens = self.schedule.width(state.window), self.schedule.tokens(state.window)
        inputs, targets = self.lanes.window(state.window, width)
        scale = averaging.scale * (width if train.loss_norm == "window" else 1) / tokens
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
        averaging.mix(new.theta, lr)
        sound = math.isfinite(norm)
        if sound:
            new.h[:], new.c[:], new.lane_loss[:] = self.h, self.c, lane_loss
        elif new is not state:
            new.h[:], new.c[:], new.lane_loss[:] = state.h, state.c, state.lane_loss
        new.set_scalars(state.scalars())
        new.tokens += tokens if sound or not averaging.identical else 0
        new.bytes_sent += averaging.bytes_sent - sent
        if not averaging.identical:  # the others learn of it with the next step
            told = averaging.control_request is not None
            self.unsound = self.comm.rank + 1 if not sound else 0 if told else self.unsound
        elif sound:
            new.skipped_in_a_row = 0
        else:
            self._skip(state, new, np.isfinite(losses).all() and not averaging.unsound)
        new.next_window(self.schedule.windows, train.carry)
        self.state, self.next = new, state
        model.bind(new.theta)
        return norm, lr, tokens

    def _skip(self, state, new, sound):
        """A step whose gradient is not finite changes nothing, on all ranks; its text is passed over. Collective.

        sound : whether this rank's own share of the gradient was finite.
        """
        new.skipped_in_a_row += 1
        guilty = [rank for rank, well in enumerate(allgather(self.comm, bool(sound))) if not well]
        ranks = f"rank{'s' if len(guilty) > 1 else ''} {', '.join(map(str, guilty))}" if guilty else "all ranks together"
        self._note_skipped(new, ranks, state.step + 1)
        if self.copies:  # what was sent before is what the step would have made of them
            self.copies.send(state.step + 1, new.h, new.c, new.lane_loss)
            self.copies.complete()

    def _note_skipped(self, state, ranks, step):
        """Count a step that the gradient of `ranks` spoilt. Raises UserError on all ranks where it was one too many."""
        state.skipped += 1
        if state.skipped_in_a_row >= self.config.resilience.max_skipped:
            raise UserError.of_all(
                f"the gradient is not finite at step {step}, {state.skipped_in_a_row} times in a row, "
                f"that of {ranks}: try a lower train.lr, or train.clip"
            )
        self.reporter.warn(f"step {step} is left out: the gradient of {ranks} is not finite")

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
        theta = self._model()
        result = self.evaluation.run(theta, self.monitor.beat)
        if not self.averaging.identical:
            result |= {
                "own_loss": self.evaluation.run(state.theta, self.monitor.beat)["loss"],
                "consensus_distance": self._apart(theta),
            }
        self.reporter.log({"step": state.step, **result})
        best = result["loss"] < state.best_loss
        self.best = min(self.best, state.best_loss, result["loss"])
        if not final:
            state.lr_factor = optim.stalled(self.config.train, state.lr_factor, result["loss"], state.best_loss)
            state.best_loss = min(state.best_loss, result["loss"])
        return best

    def _apart(self, mean):
        """How far ranks are from their mean: the root of the mean over ranks of |x_i - mean|^2, over |mean|. Collective."""
        squares = allgather(self.comm, float(np.square(self.state.theta - mean, dtype=np.float64).sum()))
        return math.sqrt(np.mean(squares) / np.square(mean, dtype=np.float64).sum())

    def close(self):
        """Nothing is under way any more, and all ranks have the model that they make up."""
        if not self.averaging.identical:
            self.state.theta[:] = self._model()
        self.averaging.end()
        if self.pulse is not None:
            self.pulse.end()

    def survive(self):
        """After a failure: the survivors' communicator and what they go on with. Collective over the survivors."""
        comm, buddies = self.comm, self.copies.buddies
        self.saver.abandon()
        if self.pulse is not None:
            self.pulse.end()
        communicators, requests = self.averaging.under_way()
        communicators += [self.place.comm, buddies.comm]
        new, step, alive = recovery.shrink(
            comm, communicators, self.finished.step, [*requests, *buddies.requests], self.place.pids
        )  # fmt: skip
        state = next(version for version in (self.state, self.next) if version.step == step)
        lanes = self.copies.pieces(state, self.mine.start, alive)
        dead = sorted(set(range(comm.size)) - set(alive))
        return new, Survived(state.theta, state.moments, state.scalars(), lanes, self.clock, self.saver), dead

    def summary(self):
        """What summary.json holds. Collective."""
        peaks = allgather(self.comm, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
        clock = self.clock
        speed = clock.settled_tokens / clock.settled_seconds if clock.settled_seconds else None
        return {
            "ranks": self.comm.size,
            "mpi_library": mpi_library(),
            "parameters": self.layout.parameters,
            "tokens_per_second": speed,
            "gflops": speed and 6 * self.layout.active() * speed / 1e9,
            "exposed_comm_fraction": clock.exposed_seconds / clock.logged_seconds if clock.logged_seconds else None,
            "checkpoints": self.saver.count,
            "checkpoint_seconds": self.saver.stalled,
            "peak_rss_bytes": peaks,
            "best_valid_perplexity": math.exp(min(self.best, 700)) if math.isfinite(self.best) else None,
            "steps": self.state.step,
            "wall_seconds": time.monotonic() - clock.begun,
            "threads": self.place.threads,
            "config": as_dict(self.config),
        }
