"""Models of sound in use: what they say of recordings, how often they are wrong, and sound that they continue."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ..data import audio
from ..data.sound_tokenizers import MelTokenizer, MulawTokenizer
from ..errors import UserError, reason
from ..kernels.ctc import log_probabilities
from ..kernels.mulaw import LEVELS
from ..kernels.softmax import IGNORE
from ..kernels.types import Array
from ..model.batch import Batch
from ..model.ctc import Ctc
from ..model.encoder_model import EncoderModel
from .generation import Sampling, continuation
from .loaded_model import LoadedModel
from .scores import errors

BEAMS = 8  # texts that are kept at each frame


def write_sound(model: LoadedModel, path: str, tokens: int, sampling: Sampling, precision: str = "fp32") -> None:
    """Write sound that a language model of levels continues from silence, as WAV. Raises UserError.

    tokens : samples; 0: a second
    """
    tokenizer = model.tokenizer
    assert isinstance(tokenizer, MulawTokenizer)
    silence = np.array([LEVELS // 2])
    found = [*continuation(model, silence, tokens or tokenizer.rate, sampling, None, precision)]
    try:
        audio.write(path, tokenizer.sound(found))
    except OSError as error:
        raise UserError(f"cannot write --out {path}: {reason(error)}") from None


def transcribe(model: Ctc, labels: Sequence[str], frames: Sequence[Array], beams: int = BEAMS) -> list[str]:
    """What is said in recordings.

    Parameters
    ----------
    model : Ctc
        Made for at least as many lanes and frames.
    labels : sequence of str
        Those of the corpus that it was trained on.
    frames : sequence of (T,F) float32
        Of each recording; those of a file are MelTokenizer.frames(audio.read(path)).
    beams : int
        Texts that a search keeps; 0: the likeliest path is taken.
    """
    lengths = np.array([len(one) for one in frames])
    inputs = np.zeros((lengths.max(), len(frames), model.config.features), np.float32)
    for lane, one in enumerate(frames):
        inputs[: len(one), lane] = one
    return ["".join(labels[label] for label in said) for said in model.transcribe(inputs, lengths, beams)]


def of_recording(model: LoadedModel, path: str) -> dict[str, Any]:
    """What a model of frames says of the recording in a file: {"text"}, or {"label", "probabilities"}. Raises UserError."""
    tokenizer = model.tokenizer
    assert isinstance(tokenizer, MelTokenizer)
    frames = tokenizer.frames(audio.read(path))
    if model.config.kind == "classifier":
        frames = frames[-model.window :]
    network = model.network(len(frames), 1)
    if isinstance(network, Ctc):
        return {"text": transcribe(network, tokenizer.labels, [frames])[0]}
    assert isinstance(network, EncoderModel)
    nothing = np.zeros((0, 1, 0), network.dtype)
    network.forward(Batch(frames[:, None], np.full((1, 1), IGNORE), np.array([len(frames)])), nothing, nothing)
    found = np.exp(log_probabilities(network.logits())).reshape(-1)
    return {
        "label": tokenizer.labels[found.argmax()],
        "probabilities": dict(zip(tokenizer.labels, found.tolist(), strict=True)),
    }


class TranscriptErrors:
    """How often a model is wrong in the transcripts of the windows of a split. labels : letters"""

    def __init__(self, model: Ctc, labels: Sequence[str]) -> None:
        self._model, self._labels = model, labels
        self._counts = np.zeros((2, 2), np.int64)

    def see(self, batch: Batch) -> None:
        """Count what the model has just heard in a batch."""
        assert batch.lengths is not None
        said = self._model.said(batch.lengths, BEAMS)
        for lane in np.flatnonzero(batch.lengths):
            there = batch.targets[:, lane]
            wanted, text = ("".join(self._labels[label] for label in one) for one in (there[there != IGNORE], said[lane]))
            self._counts += errors(wanted, text)

    @property
    def counts(self) -> Array:
        """Words that are wrong, and all words that are wanted; the same of letters: (4,) int64."""
        return self._counts.reshape(-1)

    def scores(self, counts: Array, whole: bool) -> dict[str, Any]:
        """{"wer", "cer"} of counts of all ranks, in per cent; null with a reason where nothing was to be heard."""
        found: dict[str, Any] = {}
        for name, (wrong, count) in zip(("wer", "cer"), counts.reshape(2, 2).tolist(), strict=True):
            found |= {name: 100 * wrong / count} if count else {name: None, f"{name}_reason": "all transcripts are empty"}
        return found
