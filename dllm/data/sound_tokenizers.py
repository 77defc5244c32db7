"""Sound as tokens: a sample is one of 256 levels (kernels/mulaw.py). Or as frames in the place of tokens (kernels/mel.py)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from ..errors import UserError
from ..kernels.mel import log_mel
from ..kernels.mulaw import LEVELS, mulaw_levels, mulaw_samples
from ..kernels.types import Array
from . import audio
from .tokenizer import Tokenizer, Tokens

MOST_BANDS = 1000


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
        return cls(_checked(value["rate"], audio.LEAST_RATE, audio.MOST_RATE))


class MelTokenizer(Tokenizer):
    """Says how recordings become frames: log-mel bands of sound of one rate. There are no tokens."""

    kind, exact, fixed = "mel", True, True
    BANDS = 40

    def __init__(self, rate: int = audio.RATE, bands: int = BANDS) -> None:
        self.rate, self.bands = rate, bands

    @classmethod
    def build(cls, counts: Mapping[str, int], size: int, unseen: bool = False) -> Tokenizer:
        if size:
            raise UserError(f"--vocab-size {size}: mel has no tokens; leave the option out")
        return cls()

    def frames(self, sound: audio.Sound) -> Array:
        """Frames (T, bands) float32 of a recording."""
        return log_mel(audio.at_rate(sound, self.rate).samples, self.rate, self.bands)

    def encode(self, data: bytes, end: bool = True) -> Array:
        raise UserError("frames are made of recordings, not of text")

    def decode_text(self, tokens: Tokens) -> bytes:
        return b""

    def vocabulary(self) -> dict[str, Any]:
        return {"rate": self.rate, "bands": self.bands}

    @classmethod
    def of_vocabulary(cls, value: Mapping[str, Any]) -> Tokenizer:
        return cls(_checked(value["rate"], audio.LEAST_RATE, audio.MOST_RATE), _checked(value["bands"], 1, MOST_BANDS))


def _checked(value: Any, least: int, most: int) -> int:
    if type(value) is not int or not least <= value <= most:
        raise ValueError("it says nothing of sound")
    return value
