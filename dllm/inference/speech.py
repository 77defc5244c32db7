"""Models of sound in use: what they say of recordings, how often they are wrong, and sound that they continue."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from ..data import audio
from ..data.lanes import Lanes, Schedule
from ..data.sound_tokenizers import MulawTokenizer
from ..errors import UserError, reason
from ..kernels.mulaw import LEVELS
from ..kernels.softmax import IGNORE
from ..kernels.types import Array
from ..model.ctc import Ctc
from .generation import Sampling, continuation
from .loaded_model import LoadedModel
from .scores import edits

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


def errors_of_split(
    model: Ctc, labels: Sequence[str], lanes: Lanes, schedule: Schedule, between: Callable[[], object]
) -> Array:
    """Of the transcripts of these lanes the words that are wrong, and all words; the same of letters: (2,2) int64."""
    counts = np.zeros((2, 2), np.int64)
    for place in schedule.places if len(lanes.starts) else ():
        batch = lanes.window(place, schedule.width(place))
        assert batch.lengths is not None
        said = model.transcribe(batch.inputs, batch.lengths, BEAMS)
        for lane in np.flatnonzero(batch.lengths):
            there = batch.targets[:, lane]
            wanted, text = ("".join(labels[label] for label in one) for one in (there[there != IGNORE], said[lane]))
            for row, sides in enumerate(((wanted.split(), text.split()), (wanted, text))):
                counts[row] += edits(*sides), len(sides[0])
        between()
    return counts
