"""The engine of each kind of model. A new kind: its Worker, and a line here and in routes.py."""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

from ..errors import UserError
from ..inference.loaded_model import LoadedModel
from .engine import Engine
from .reports import MOST_MODELS
from .source_engine import SourceEngine
from .text_engine import TextEngine
from .workers import Labels, Targets, Transcripts, Worker

Make: TypeAlias = Callable[[LoadedModel, argparse.Namespace, int], Engine[Any]]  # model, options of serve, threads


def _of_text(model: LoadedModel, options: argparse.Namespace, threads: int) -> Engine[Any]:
    return TextEngine(model, options.slots, threads, options.cache << 20, options.queue, options.precision)


def _of_sources(worker: type[Worker]) -> Make:
    def make(model: LoadedModel, options: argparse.Namespace, threads: int) -> Engine[Any]:
        made = worker(model, options.max_source, options.slots, threads, options.precision)
        return SourceEngine(made, options.slots, options.queue)

    return make


ENGINES: dict[str, Make] = {
    "lm": _of_text,
    "seq2seq": _of_sources(Targets),
    "tagger": _of_sources(Labels),
    "classifier": _of_sources(Labels),
    "ctc": _of_sources(Transcripts),
}


def check_forms(model: LoadedModel) -> None:
    """Raise UserError where requests could not be read: recordings come as forms."""
    if model.config.features and not importlib.util.find_spec("python_multipart"):
        raise UserError("recordings are sent as forms, which takes python-multipart: pip install 'dllm[serve]'")


def check_names(names: Sequence[str], paths: Sequence[str]) -> None:
    """Raise UserError where requests could not name each model. paths : as the user has given them"""
    for place, name in enumerate(names):
        if name in names[:place]:
            both = f"{paths[names.index(name)]} and {paths[place]}"
            raise UserError(f"two models would be called {name}: {both}; give one of the folders another name")
    if len(names) > MOST_MODELS:
        raise UserError(f"{len(names)} models are given; one server has at most {MOST_MODELS}: start another one for the rest")


def make_engine(model: LoadedModel, options: argparse.Namespace, threads: int) -> Engine[Any]:
    """The engine of a model, not started. Raises UserError where models of its kind are not served."""
    kind = model.config.kind
    if kind not in ENGINES:
        raise UserError(
            f"{model.name} is a model of kind {kind}, which is the beginning of others (dllm train --init-from {model.name}); "
            f"{', '.join(ENGINES)} are served"
        )
    return ENGINES[kind](model, options, threads)
