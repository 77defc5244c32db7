"""The engine of each kind of model. A new kind: its Worker, a line here, and its routes in serving/routes.py."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any, TypeAlias

from ..errors import UserError
from ..inference.loaded_model import LoadedModel
from .engine import Engine
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


def make_engine(model: LoadedModel, options: argparse.Namespace, threads: int) -> Engine[Any]:
    """The engine of a model, not started. Raises UserError where models of its kind are not served."""
    kind = model.config.kind
    if kind not in ENGINES:
        raise UserError(
            f"{model.name} is a model of kind {kind}, which is the beginning of others (dllm train --init-from {model.name}); "
            f"{', '.join(ENGINES)} are served"
        )
    return ENGINES[kind](model, options, threads)
