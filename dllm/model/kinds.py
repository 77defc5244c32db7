"""The kinds of models by name. A new one: a class of Model, its tensors in blocks.py, a line here, its name in the config."""

from __future__ import annotations

from typing import Any

from ..errors import UserError
from .base import Model
from .both_ways import BothWays
from .ctc import Ctc
from .encoder_model import Classifier, Tagger
from .language_model import LanguageModel
from .layout import Layout
from .seq2seq import Seq2Seq

KINDS: dict[str, type[Model]] = {
    "lm": LanguageModel,
    "bilm": BothWays,
    "seq2seq": Seq2Seq,
    "tagger": Tagger,
    "classifier": Classifier,
    "ctc": Ctc,
}


def language_model(model: Model) -> LanguageModel:
    """The same, where it is one that continues text. Raises UserError."""
    if not isinstance(model, LanguageModel):
        raise UserError(f"this is asked of a model of text (model.kind = lm), and the model is of kind {model.config.kind}")
    return model


def make_model(layout: Layout, window: int, lanes: int, **options: Any) -> Model:
    """The Model that layout.config.kind names. options : those of Model"""
    return KINDS[layout.config.kind](layout, window, lanes, **options)
