"""Everything that changes from step to step, in one place that can be copied, hashed, saved and swapped."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import xxhash

from ..kernels.gemm import aligned
from ..kernels.types import Array


def parameters_hash(theta: Array) -> str:
    """16 characters that name the bits of theta (P,)."""
    return xxhash.xxh3_64_hexdigest(theta.data)


@dataclass
class State:
    """The state of a run on one rank. P parameters, L layers, B lanes of this rank, H hidden units."""

    theta: Array  # (P,) parameters, the same on every rank where averaging is identical
    moments: list[Array]  # of (P,) optimiser moments, the same on every rank
    h: Array  # (L,B,H) this rank's lanes
    c: Array  # (L,B,H)
    lane_loss: Array  # (B,) float64, nats since the last line of metrics
    step: int = 0  # optimiser steps taken
    epoch: int = 0  # epochs finished
    place: int = 0  # where every lane stands in this epoch: tokens of it, or pairs
    tokens: int = 0  # of all ranks, since the last line of metrics
    bytes_sent: int = 0  # by each rank, since the last line of metrics
    lr_factor: float = 1.0  # what the plateau schedule has made of lr
    best_loss: float = float("inf")  # validation, nats a token
    stale: int = 0  # evaluations since then
    seen: int = 0  # tokens of this text predicted by all ranks
    order: int = 0  # seed of the order in which the pairs of an epoch come: the one with which the run began
    skipped: int = 0  # steps that changed nothing, because the gradient was not finite
    skipped_in_a_row: int = 0  # the newest ones of these

    SCALARS: ClassVar[tuple[str, ...]] = (
        "step", "epoch", "place", "tokens", "bytes_sent", "lr_factor", "best_loss", "stale", "seen", "order",
        "skipped", "skipped_in_a_row",
    )  # fmt: skip

    def empty_like(self) -> State:
        """Another of the same size, whose values are not set."""
        vectors = self.theta, *self.moments, self.h, self.c, self.lane_loss
        theta, *moments, h, c, lane_loss = (aligned(vector.shape, vector.dtype) for vector in vectors)
        return State(theta, moments, h, c, lane_loss)

    def scalars(self) -> dict[str, Any]:
        """name -> value of SCALARS."""
        return {name: getattr(self, name) for name in self.SCALARS}

    def set_scalars(self, values: dict[str, Any]) -> None:
        """Take over what `scalars` gave."""
        for name, value in values.items():
            setattr(self, name, value)

    def move_on(self, place: int, carry: str) -> None:
        """Move every lane on to `place`, from zero states unless carried; at 0 the next epoch begins."""
        self.step += 1
        self.place, self.epoch = place, self.epoch + (place == 0)
        self._carry(carry)

    def begin_text(self, carry: str) -> None:
        """Begin with another text for training: with its first epoch."""
        self.place = self.epoch = 0
        self.lane_loss[:] = 0  # a line of metrics is of one text
        self.tokens = self.bytes_sent = 0
        self._carry(carry)

    def begin_validation(self) -> None:
        """Begin with another text for validation: what was found on the one before says nothing about it."""
        self.best_loss, self.lr_factor, self.stale = float("inf"), 1.0, 0

    def _carry(self, carry: str) -> None:
        if self.from_zero(carry):
            self.h[:] = 0
            self.c[:] = 0

    def from_zero(self, carry: str) -> bool:
        """Whether the next window begins from zero states."""
        return carry == "window" or (carry == "epoch" and self.place == 0)
