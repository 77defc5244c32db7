"""Frames to a transcript, of which nobody says where each of its labels is (kernels/ctc.py).

m = encoder(frames)      u = m, or tanh(m Wp)      z = u W^T + b: of each frame a logit for each label, and last the blank
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from ..kernels.ctc import beam_search, best_path, ctc_loss_and_gradient, log_probabilities
from ..kernels.gemm import from_panels, to_panels, zero_panels
from ..kernels.operands import Operands, Weight
from ..kernels.softmax import IGNORE
from ..kernels.types import Array
from . import blocks
from .base import Between, Mask
from .batch import Batch
from .encoder_model import EncoderModel
from .layers import Plan
from .output import Head


class CtcOutput(Head):
    """Logits of all frames, and losses of transcripts. Its products are never rounded: they are few.

    lengths : (B,) int64, the frames of each lane that count, set before the forward
    """

    lengths: Array

    def __init__(self, plan: Plan, columns: int, classes: int) -> None:
        self.columns, self.classes, dtype = columns, classes, plan.layout.dtype
        self._operands = Operands(dtype, False, plan.operands.team)
        self._z = plan.panels(classes)
        plan.take(2 * plan.rows * classes)  # logits, and their probabilities
        plan.take(3 * plan.rows * classes, 8)
        self._W, self._WT = zero_panels(classes, columns, dtype), zero_panels(columns, classes, dtype)
        self._plain = np.zeros((classes, columns + 1), dtype)
        self.training = plan.training
        if plan.training:
            self._dz, self.dy = plan.panels(classes), plan.panels(columns)
            self._d, self._d_plain = zero_panels(classes, columns, dtype), np.zeros_like(self._plain)

    def bind(self, parameters: Mapping[str, Array], factors: Mapping[str, Weight]) -> None:
        self._parameters = parameters["output"]

    def bind_gradients(self, gradients: Mapping[str, Array]) -> None:
        self._gradients = gradients["output"]

    def forward(self, y: Array, row: int, targets: Array, scale: float, between: Callable[[], object] | None = None) -> Array:
        """Losses (U,B) of transcripts (U,B), nats, each in its first row, of rows of y (columns/R,:,R). Fills dy."""
        self._take_weights()
        B = targets.shape[1]
        N, H, V = int(self.lengths.max(initial=1)) * B, self.columns, self.classes
        self._operands.multiply(self._z, 0, y, row, self._WT, N, H, False)
        z = np.empty((N, V), self._plain.dtype)
        from_panels(z, self._z, 0)
        z += self._plain[:, H]
        self.logits = z.reshape(-1, B, V)
        dz = np.empty_like(self.logits) if self.training else None
        losses, labels = np.zeros(targets.shape), np.count_nonzero(targets != IGNORE, axis=0)
        ctc_loss_and_gradient(losses[0], dz, self.logits, targets, self.lengths, labels, scale, self._operands.team)
        if dz is not None:
            self._backward(dz.reshape(N, V), y, row)
        return losses

    def _take_weights(self) -> None:
        from_panels(self._plain, self._parameters, 0)
        W = np.ascontiguousarray(self._plain[:, : self.columns])
        to_panels(self._W, 0, W)
        to_panels(self._WT, 0, np.ascontiguousarray(W.T))

    def _backward(self, dz: Array, y: Array, row: int) -> None:
        N, V = dz.shape
        to_panels(self._dz, 0, dz)
        self.dy[:] = 0  # behind the longest lane nothing was looked at
        self._operands.multiply(self.dy, 0, self._dz, 0, self._W, N, V, False)
        self._operands.multiply_transposed(self._d, "dz", self._dz, 0, y, row, N)
        from_panels(self._d_plain[:, : self.columns], self._d, 0)
        self._d_plain[:, self.columns] = dz.sum(axis=0)
        to_panels(self._gradients, 0, self._d_plain)


class Ctc(EncoderModel):
    """See CtcOutput. Targets (U,B) are labels; a loss is that of a transcript, which all its labels share."""

    output: CtcOutput

    def _make_output(self, plan: Plan) -> CtcOutput:
        return CtcOutput(plan, blocks.top(self.config), blocks.outputs(self.config, self.vocabulary))

    def forward(
        self, batch: Batch, h: Array, c: Array, scale: float = 0.0, mask: Mask | None = None, between: Between | None = None
    ) -> Array:
        S, B = batch.inputs.shape[:2]
        self.output.lengths = np.full(B, S) if batch.lengths is None else batch.lengths
        return super().forward(batch, h, c, scale, mask, between)

    def _multiplied(self, batch: Batch) -> dict[str, int]:
        return dict.fromkeys(("encoder", "projection", "output"), batch.steps)

    def transcribe(self, frames: Array, lengths: Array, beams: int = 0) -> list[list[int]]:
        """The labels that lanes say.

        Parameters
        ----------
        frames : (S,B,F) float32
        lengths : (B,) int64
        beams : int
            Texts that a search keeps; 0: those of the likeliest path.
        """
        nothing = np.zeros((0, 0, 0), self.dtype)
        self.forward(Batch(frames, np.full((1, frames.shape[1]), IGNORE), lengths), nothing, nothing)
        return self.said(lengths, beams)

    def said(self, lengths: Array, beams: int = 0) -> list[list[int]]:
        """The labels that lanes of their lengths (B,) say in the batch of the last `forward`. beams : as of `transcribe`"""
        y = log_probabilities(self.output.logits)
        lanes = [np.ascontiguousarray(y[:length, lane]) for lane, length in enumerate(lengths)]
        return [best_path(one) if not beams else beam_search(one, beams)[0] for one in lanes]
