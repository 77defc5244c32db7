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
    window: int = 0  # windows of this epoch done: where every lane stands
    tokens: int = 0  # of all ranks, since the last line of metrics
    bytes_sent: int = 0  # by each rank, since the last line of metrics
    lr_factor: float = 1.0  # what the plateau schedule has made of lr
    best_loss: float = float("inf")  # validation, nats a token
    skipped: int = 0  # steps that changed nothing, because the gradient was not finite
    skipped_in_a_row: int = 0  # the newest ones of these

    SCALARS: ClassVar[tuple[str, ...]] = (
        "step", "epoch", "window", "tokens", "bytes_sent", "lr_factor", "best_loss", "skipped", "skipped_in_a_row",
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

    def next_window(self, windows: int, carry: str) -> None:
        """Move every lane on by one window, from zero states unless carried; behind the last one comes the next epoch."""
        self.step += 1
        self.window += 1
        if self.window == windows:
            self.window, self.epoch = 0, self.epoch + 1
        if self.from_zero(carry):
            self.h[:] = 0
            self.c[:] = 0

    def from_zero(self, carry: str) -> bool:
        """Whether the next window begins from zero states."""
        return carry == "window" or (carry == "epoch" and self.window == 0)
