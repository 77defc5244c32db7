"""The states of lanes, which one rank has and another copies, so that they outlive the death of a rank."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from ..comm import survivors
from ..comm.messages import allgather
from ..config import Config
from ..data.lanes import deal
from ..kernels.types import Array
from ..model.layout import Layout
from ..runs.state import State

if TYPE_CHECKING:
    from mpi4py import MPI


class Piece(NamedTuple):
    """States of lanes that follow each other."""

    first: int  # lane
    h: Array  # (L,B,H)
    c: Array  # (L,B,H)
    lane_loss: Array  # (B,) float64


class LaneCopies:
    """What a run asks of them; as it stands, where the death of a rank cannot be survived in memory."""

    def send(self, step: int, h: Array, c: Array, lane_loss: Array) -> None:
        """Begin to send what is h, c (L,B,H) and lane_loss (B,) after `step` steps."""

    def complete(self) -> int:
        """Wait until they are there. Returns the bytes sent."""
        return 0

    def under_way(self) -> tuple[list[MPI.Comm], list[MPI.Request]]:
        """Communicators and requests in which a rank may still wait when another has died."""
        return [], []

    def pieces(self, state: State, first: int, alive: tuple[int, ...]) -> list[Piece]:
        """What this rank has of the lanes' states at `state`: its own, from lane `first` on, and a dead rank's."""
        return [Piece(first, state.h, state.c, state.lane_loss)]


class SentLaneCopies(LaneCopies):
    """The LSTM states and losses of each rank's lanes, sent to the next rank in each step.

    Parameters
    ----------
    comm : MPI.Comm
    config : Config
    layout : Layout
        Of the model.
    """

    def __init__(self, comm: MPI.Comm, config: Config, layout: Layout) -> None:
        self.config, self.layout = config, layout
        self.lanes = [deal(config.train.lanes, comm.size, rank) for rank in range(comm.size)]
        bytes_of_lane = 2 * layout.carried * config.model.hidden * layout.dtype.itemsize + 8
        self.buddies = survivors.Buddies(comm, [len(lanes) * bytes_of_lane for lanes in self.lanes])

    def send(self, step: int, h: Array, c: Array, lane_loss: Array) -> None:
        parts = [np.ascontiguousarray(part).view(np.uint8).reshape(-1) for part in (h, c, lane_loss)]
        self.buddies.send(step, np.concatenate(parts))

    def complete(self) -> int:
        return self.buddies.complete()

    def under_way(self) -> tuple[list[MPI.Comm], list[MPI.Request]]:
        return [self.buddies.comm], list(self.buddies.requests)

    def pieces(self, state: State, first: int, alive: tuple[int, ...]) -> list[Piece]:
        found, previous = super().pieces(state, first, alive), self.buddies.previous
        packed = self.buddies.kept(state.step)
        if previous in alive or packed is None:
            return found
        layout, lanes = self.layout, self.lanes[previous]
        shape = 2, layout.carried, len(lanes), layout.config.hidden
        h, c = packed[: -8 * len(lanes)].view(layout.dtype).reshape(shape)
        lane_loss = packed[-8 * len(lanes) :].view(np.float64)
        # What became of them on their own rank after they were sent.
        if state.step % self.config.log.every == 0:
            lane_loss = np.zeros_like(lane_loss)
        if state.from_zero(self.config.train.carry):
            h, c = np.zeros_like(h), np.zeros_like(c)
        return [*found, Piece(lanes.start, h, c, lane_loss)]


def take_lanes(
    comm: MPI.Comm, pieces: list[Piece], state: State, own: range, config: Config, warn: Callable[[str], None]
) -> None:
    """Fill the lanes `own` of state with what all survivors have. Collective.

    Lanes that nobody has begin from zero, or where config.resilience.lost_lanes says so GiveUp is raised on all ranks.
    """
    found = np.zeros(config.train.lanes, bool)
    mine: list[tuple[int, Array, Array, Array]] = [(*piece,) for piece in pieces]
    everyone = allgather(comm, mine, list[tuple[int, np.ndarray, np.ndarray, np.ndarray]])
    for first, h, c, lane_loss in itertools.chain(*everyone):
        lanes = range(first, first + len(lane_loss))
        found[lanes.start : lanes.stop] = True
        for lane in set(lanes) & set(own):
            here, there = lane - own.start, lane - first
            state.h[:, here], state.c[:, here], state.lane_loss[here] = h[:, there], c[:, there], lane_loss[there]
    lost = np.count_nonzero(~found)
    if lost and config.resilience.lost_lanes == "stop":
        raise survivors.GiveUp(f"the states of {lost} lanes died with their rank and with the next one, which had the copy")
    if lost:
        warn(f"{lost} lanes begin from zero states: theirs died with their rank and with the copy of it")
