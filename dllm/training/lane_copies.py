"""What a run brings out of the death of ranks: parameters, which all have, and states of lanes, which one had and one copied.

How survivors find each other stands in comm/recovery.py.
"""

from dataclasses import dataclass

import numpy as np

from ..comm import recovery
from ..comm.runtime import allgather
from ..data.lanes import deal


@dataclass
class Clock:
    """What a run has spent, over all the Trainers that it may take."""

    begun: float
    settled_seconds: float = 0.0
    settled_tokens: int = 0
    exposed_seconds: float = 0.0
    logged_seconds: float = 0.0


@dataclass
class Survived:
    """What a rank brings out of a failure."""

    theta: np.ndarray
    moments: list
    scalars: dict
    lanes: list  # of (first lane, h (L,B,H), c, lane_loss): its own, and the previous rank's where that has died
    clock: Clock
    saver: object  # of the run before


class LaneCopies:
    """The LSTM states and losses of each rank's lanes, sent to the next rank in each step.

    Parameters
    ----------
    comm : MPI.Comm
    config : Config
    dtype : numpy dtype
        Of the states.
    """

    def __init__(self, comm, config, dtype):
        self.config, self.dtype = config, np.dtype(dtype)
        self.lanes = [deal(config.train.lanes, comm.size, rank) for rank in range(comm.size)]
        bytes_of_lane = 2 * config.model.layers * config.model.hidden * self.dtype.itemsize + 8
        self.buddies = recovery.Buddies(comm, [len(lanes) * bytes_of_lane for lanes in self.lanes])

    def send(self, step, h, c, lane_loss):
        """Begin to send what is h, c (L,B,H) and lane_loss (B,) after `step` steps."""
        parts = [np.ascontiguousarray(part).view(np.uint8).reshape(-1) for part in (h, c, lane_loss)]
        self.buddies.send(step, np.concatenate(parts))

    def complete(self):
        """Wait until they are there. Returns the bytes sent."""
        return self.buddies.complete()

    def pieces(self, state, own, alive):
        """What this rank has of the lanes' states at `state`: its own, from lane `own` on, and a dead rank's."""
        found, previous = [(own, state.h, state.c, state.lane_loss)], self.buddies.previous
        packed = self.buddies.kept(state.step)
        if previous in alive or packed is None:
            return found
        model, lanes = self.config.model, self.lanes[previous]
        h, c = packed[: -8 * len(lanes)].view(self.dtype).reshape(2, model.layers, len(lanes), model.hidden)
        lane_loss = packed[-8 * len(lanes) :].view(np.float64)
        # What became of them on their own rank after they were sent.
        if state.step % self.config.log.every == 0:
            lane_loss = np.zeros_like(lane_loss)
        if state.from_zero(self.config.train.carry):
            h, c = np.zeros_like(h), np.zeros_like(c)
        return [*found, (lanes.start, h, c, lane_loss)]


def take_lanes(comm, pieces, state, mine, config, warn):
    """Fill the lanes `mine` of state with what all survivors have. Collective.

    Lanes that nobody has begin from zero, or where config.resilience.lost_lanes says so GiveUp is raised on all ranks.
    """
    found = np.zeros(config.train.lanes, bool)
    for first, h, c, lane_loss in (piece for part in allgather(comm, pieces) for piece in part):
        lanes = range(first, first + len(lane_loss))
        found[lanes.start : lanes.stop] = True
        for lane in set(lanes) & set(mine):
            here, there = lane - mine.start, lane - first
            state.h[:, here], state.c[:, here], state.lane_loss[here] = h[:, there], c[:, there], lane_loss[there]
    lost = np.count_nonzero(~found)
    if lost and config.resilience.lost_lanes == "stop":
        raise recovery.GiveUp(f"the states of {lost} lanes died with their rank and with the next one, which had the copy")
    if lost:
        warn(f"{lost} lanes begin from zero states: theirs died with their rank and with the copy of it")
