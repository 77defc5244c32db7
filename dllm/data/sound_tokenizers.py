"""Sound as tokens: a sample is one of 256 levels (kernels/mulaw.py)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from ..errors import UserError
from ..kernels.mulaw import LEVELS, mulaw_levels, mulaw_samples
from ..kernels.types import Array
from . import audio
from .tokenizer import Tokenizer, Tokens


def levels(data: bytes, rate: int) -> bytes:
    """The levels of the recording that the bytes of a file hold, a byte each, `rate` a second. Raises UserError."""
    return mulaw_levels(audio.at_rate(audio.decode(data), rate).samples).tobytes()


class MulawTokenizer(Tokenizer):
    """A token is a level; the bytes of sound are its levels, `rate` of them a second."""

    kind, exact, fixed, text_size = "mulaw", True, True, LEVELS

    def __init__(self, rate: int = audio.RATE) -> None:
        self.rate = rate

    @classmethod
    def build(cls, counts: Mapping[str, int], size: int, unseen: bool = False) -> Tokenizer:
        if size not in (0, LEVELS):
            raise UserError(f"--vocab-size {size}: mulaw has {LEVELS} tokens; leave the option out")
        return cls()

    def encode(self, data: bytes, end: bool = True) -> Array:
        return np.frombuffer(data, np.uint8).astype(np.int64)

    def decode_text(self, tokens: Tokens) -> bytes:
        return np.asarray(tokens, np.uint8).tobytes()

    def sound(self, tokens: Tokens) -> audio.Sound:
        """What tokens sound like."""
        return audio.Sound(mulaw_samples(np.asarray(tokens)).astype(np.float32), self.rate)

    def vocabulary(self) -> dict[str, Any]:
        return {"rate": self.rate}

    @classmethod
    def of_vocabulary(cls, value: Mapping[str, Any]) -> Tokenizer:
        rate = value["rate"]
        if type(rate) is not int or not audio.LEAST_RATE <= rate <= audio.MOST_RATE:
            raise ValueError("its rate is none of sound")
        return cls(rate)
