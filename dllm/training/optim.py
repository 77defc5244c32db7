"""Optimisers and learning-rate schedules over flat vectors. Formulas and sources stand in kernels/optim.py.

To add an optimiser: its kernel there, a class here with `moments` and `_update`, its name in `make_optimizer` and in
config/sections.py.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from ..comm.averaging import Gradient
from ..kernels.optim import adam_update, rmsprop_update, sgd_update, sum_of_squares
from ..kernels.rows import copy_rows, gather_rows, scatter_rows, squares_of_rows
from ..kernels.team import Team
from ..kernels.types import Array

if TYPE_CHECKING:
    from ..config import TrainConfig
    from ..model.factors import Factors
    from ..model.layout import Extent
    from ..runs.state import State

BLOCK = 1 << 17  # elements that one thread sums, or copies and updates, at a time: they stay in the second-level cache
Parts = list[tuple[int, Array]]  # of a vector: (first element, its elements from there on)
Common = tuple[int, float, float, float]  # step, lr, factor and limit of the gradient, the same for all elements


class Optimizer(ABC):
    """Clips the averaged gradient and moves the parameters.

    Parameters
    ----------
    config : TrainConfig
    team : kernels.team.Team, optional
        Threads that share the work.
    table : layout.Extent or None
        The embedding at the end of the flat vectors, whose gradient may be zero but for a few rows.
    """

    moments = 0  # vectors (P,) of optimiser state
    sparse = False  # True: a zero gradient changes nothing, so untouched embedding rows are passed over

    def __init__(self, config: TrainConfig, table: Extent | None, team: Team | None = None) -> None:
        self.config, self.table, self.team = config, table, team or Team()
        self._moved = np.arange(
            table.shape[0] if table else 0
        )  # rows of the embedding that the step before has moved; at first all

    def step(
        self, state: State, gradient: Gradient, lr: float, out: State | None = None, factors: Factors | None = None
    ) -> float:
        """Move state.theta (P,) against the gradient at learning rate lr. Returns the gradient's norm before clipping.

        Where the norm is not finite nothing moves.

        gradient : Gradient
            Of the method of averaging.
        out : State, optional
            Where the new theta and moments go; `state` stays as it is. It must be what `out` was in the step before.
        factors : Factors, optional
            Of the model: made of the new theta while it is in the cache.
        """
        parts, rows, squares = gradient.parts, gradient.rows, gradient.squares
        factors = factors if factors is not None and factors.kept else None
        edges = None if factors is None else factors.edges
        dense = _blocks(parts if rows is None else parts[:-1], edges)
        squares = self._squares(dense) if squares is None else squares
        if rows is not None:
            squares += squares_of_rows(self._rows(parts[-1][1]), rows)
        norm = math.sqrt(squares)  # NaN stays NaN
        by_norm = self.config.clip and self.config.clip_by == "norm"
        factor = self.config.clip / norm if by_norm and norm > self.config.clip else 1.0
        limit = self.config.clip if self.config.clip and self.config.clip_by == "value" else math.inf
        common = (state.step + 1, lr, factor, limit)
        out = out or state
        if not math.isfinite(norm):
            self._stay(state, out)
            return norm
        if factors is None:
            self._share(state, out, dense, common)
        else:
            factors.begin(out.theta)
            self._share(state, out, dense, common, factors.take)
            factors.finish()
        if rows is None:
            return norm
        if not self.sparse:
            self._share(state, out, _blocks(parts[-1:]), common)
            return norm
        old, new = (self._rows(version.theta[parts[-1][0] :]) for version in (state, out))
        if out is not state:  # where they differ: in the rows of the step before
            copy_rows(new, old, self._moved)
            self._moved = rows
        theta, slopes = np.empty((2, len(rows), old.shape[1]), old.dtype)
        gather_rows(theta, old, rows)
        gather_rows(slopes, self._rows(parts[-1][1]), rows)
        self._update(theta.reshape(-1), slopes.reshape(-1), [], *common)
        scatter_rows(new, rows, theta)
        return norm

    @abstractmethod
    def _update(
        self, theta: Array, gradient: Array, moments: list[Array], step: int, lr: float, factor: float, limit: float
    ) -> None:
        """Move some elements of the parameters and of the moments, (n,) each, in place."""

    def _rows(self, values: Array) -> Array:
        """Values of the embedding as its rows, (n, E)."""
        if self.table is None:
            raise ValueError("rows are of an embedding, and there is none at the end of the vectors")
        return values.reshape(-1, self.table.shape[1])

    def _stay(self, state: State, out: State) -> None:
        if out is not state:
            for old, new in zip((state.theta, *state.moments), (out.theta, *out.moments), strict=True):
                new[:] = old
            self._moved = np.zeros(0, np.int64)

    def _squares(self, blocks: Parts) -> float:
        """The sum of squares, block by block whatever the number of threads."""
        sums = np.zeros(len(blocks))

        def work(first: int, last: int) -> None:
            for number in range(first, last):
                sums[number] = sum_of_squares(blocks[number][1])

        self.team.share(work, len(blocks))
        return float(sums.sum())

    def _share(
        self,
        state: State,
        out: State,
        blocks: Parts,
        common: Common,
        done: Callable[[int, int], None] = lambda start, stop: None,
    ) -> None:
        """`_update` of the elements of some blocks, from state to out, each thread a share of them; done(start, stop) of
        each.
        """
        vectors = list(zip((state.theta, *state.moments), (out.theta, *out.moments), strict=True))

        def work(first: int, last: int) -> None:
            for start, gradient in blocks[first:last]:
                here = slice(start, start + len(gradient))
                if out is not state:
                    for old, new in vectors:
                        new[here] = old[here]
                theta, *moments = (new[here] for _, new in vectors)
                self._update(theta, gradient, moments, *common)
                done(here.start, here.stop)

        self.team.share(work, len(blocks))


def _blocks(parts: Parts, edges: Array | None = None) -> Parts:
    """The same elements in parts of at most BLOCK, cut at an edge where there is one within."""
    blocks: Parts = []
    for first, part in parts:
        at = 0
        while at < len(part):
            stop = min(at + BLOCK, len(part))
            if edges is not None and stop < len(part):
                within = edges[np.searchsorted(edges, first + at, "right") : np.searchsorted(edges, first + stop, "right")]
                stop = int(within[-1]) - first if len(within) else stop
            blocks.append((first + at, part[at:stop]))
            at = stop
    return blocks


class SGD(Optimizer):
    """Stochastic gradient descent, with momentum or Nesterov's."""

    def __init__(self, config: TrainConfig, table: Extent | None, team: Team | None = None) -> None:
        super().__init__(config, table, team)
        self.moments = int(config.momentum > 0)
        self.sparse = config.momentum == 0 and config.weight_decay == 0

    def _update(
        self, theta: Array, gradient: Array, moments: list[Array], step: int, lr: float, factor: float, limit: float
    ) -> None:
        config, velocity = self.config, moments[0] if moments else np.empty(0, theta.dtype)
        sgd_update(theta, gradient, velocity, lr, config.momentum, config.nesterov, config.weight_decay, factor, limit)


class Adam(Optimizer):
    """Adam; AdamW where the weight decay is decoupled."""

    moments = 2

    def _update(
        self, theta: Array, gradient: Array, moments: list[Array], step: int, lr: float, factor: float, limit: float
    ) -> None:
        c, decoupled = self.config, self.config.optimizer == "adamw"
        mean, square = moments
        betas = c.beta1, c.beta2, c.epsilon
        adam_update(theta, gradient, mean, square, step, lr, *betas, c.weight_decay, decoupled, factor, limit)


class RMSprop(Optimizer):
    """RMSprop as in Torch7's optim: epsilon outside the root, no centring."""

    moments = 1

    def _update(
        self, theta: Array, gradient: Array, moments: list[Array], step: int, lr: float, factor: float, limit: float
    ) -> None:
        c, (square,) = self.config, moments
        rmsprop_update(theta, gradient, square, lr, c.alpha, c.epsilon, c.weight_decay, factor, limit)


def make_optimizer(config: TrainConfig, table: Extent | None, team: Team | None = None) -> Optimizer:
    """The Optimizer that train.optimizer names."""
    kinds: dict[str, type[Optimizer]] = {"sgd": SGD, "adam": Adam, "adamw": Adam, "rmsprop": RMSprop}
    return kinds[config.optimizer](config, table, team)


def learning_rate(config: TrainConfig, step: int, epoch: int, factor: float, total_steps: int) -> float:
    """The rate of one step.

    Parameters
    ----------
    config : TrainConfig
    step, epoch : int
        Steps taken and epochs finished before this one.
    factor : float
        What validation has made of the rate so far; see `stalled`.
    total_steps : int
        Where the cosine (Loshchilov and Hutter 2017) and the range (Smith 2017) end.
    """
    if step < config.warmup:
        return config.lr * (step + 1) / config.warmup
    if config.schedule == "cosine":
        done = (step - config.warmup) / max(1, total_steps - config.warmup)
        return config.min_lr + (config.lr - config.min_lr) * (1 + math.cos(math.pi * min(1.0, done))) / 2
    if config.schedule == "range":
        return config.min_lr * math.pow(config.lr / config.min_lr, step / max(1, total_steps - 1))
    if config.schedule == "epochs":
        return config.lr / config.decay ** max(0, epoch + 1 - config.decay_after)
    return config.lr * factor


def stalled(config: TrainConfig, factor: float, loss: float, best: float) -> float:
    """The plateau schedule's factor after an evaluation: divided by `decay` where `loss` is no better than `best`."""
    return factor / config.decay if config.schedule == "plateau" and not loss < best else factor
