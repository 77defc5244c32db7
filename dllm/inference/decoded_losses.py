"""The losses of given tokens by a Decoder, in the precision that it serves: what its products really cost in perplexity."""

from __future__ import annotations

import numpy as np

from ..kernels.sample import Choice
from ..kernels.types import Array
from ..model.batch import Batch
from ..model.decoder import Decoder
from ..model.language_model import LanguageModel

TOGETHER = 64  # tokens whose losses are computed at a time


class DecodedLosses:
    """Stands in for a LanguageModel where nothing but losses is wanted.

    Parameters
    ----------
    model : LanguageModel
        With parameters.
    lanes : int
        At most.
    precision : "fp32", "bf16" or "int8"
    """

    def __init__(self, model: LanguageModel, lanes: int, precision: str) -> None:
        self.config, self.dtype, self.window = model.config, model.dtype, model.window
        self._decoder, self._choice = Decoder(model, lanes, precision), Choice(TOGETHER)

    def forward(self, batch: Batch, h: Array, c: Array) -> Array:
        """The losses (T,B) of a window, in nats; all is as `LanguageModel.forward` has it."""
        tokens, targets, *_ = batch
        (T, B), (L, _, H), decoder = tokens.shape, h.shape, self._decoder
        slots, states = np.arange(B), decoder.states[:B].reshape(B, L, 2, -1)
        states[..., :H] = np.stack([h, c]).transpose(2, 1, 0, 3)
        decoder.read(tokens, slots)
        h[:], c[:] = states[..., :H].transpose(2, 1, 0, 3)
        losses, wanted = np.zeros(T * B), np.flatnonzero(targets >= 0)
        for start in range(0, len(wanted), TOGETHER):
            rows = wanted[start : start + TOGETHER]
            self._choice.given[: len(rows)] = targets.reshape(-1)[rows]
            decoder.choose(self._choice, np.arange(len(rows)), rows)
            losses[rows] = -self._choice.logprob[: len(rows)]
        return losses.reshape(T, B)
