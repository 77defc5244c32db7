"""The kinds of models by name. To add one: a class of Model, its tensors in blocks.py, a line in KINDS, its name in the config."""

from __future__ import annotations

from typing import Any

from .base import Model
from .language_model import LanguageModel
from .layout import Layout
from .seq2seq import Seq2Seq

KINDS: dict[str, type[Model]] = {"lm": LanguageModel, "seq2seq": Seq2Seq}


def make_model(layout: Layout, window: int, lanes: int, **options: Any) -> Model:
    """The Model that layout.config.kind names. options : those of Model"""
    return KINDS[layout.config.kind](layout, window, lanes, **options)
