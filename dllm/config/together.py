"""Which settings go together: what no bound of a single one says."""

from collections.abc import Mapping
from typing import Any

from ..errors import UserError
from .sections import FIELDS, Config, ModelConfig, TrainConfig

SIDE_BY_SIDE = 16  # units that fill a row of panels, in either precision
TEXT, SOURCES = ("lm", "bilm"), ("seq2seq",)
READS_WHOLE = ("seq2seq", "tagger", "classifier", "ctc")
EVERY = TEXT + READS_WHOLE
READ_BY: dict[str, tuple[str, ...]] = {  # settings that not every kind of model reads
    "model.bidirectional": READS_WHOLE,
    "model.encoder_layers": SOURCES,
    "model.attention": SOURCES,
    "model.copy": SOURCES,
    "model.pool": ("classifier",),
    "model.projection": READS_WHOLE,
    "model.labels": ("tagger", "classifier", "ctc"),
    "model.features": ("tagger", "classifier", "ctc"),
    "model.embedding": tuple(kind for kind in EVERY if kind != "ctc"),
    "model.tied": TEXT + SOURCES,
    "train.carry": TEXT,
    "train.last_window": TEXT,
    "train.smoothing": tuple(kind for kind in EVERY if kind != "ctc"),
    "log.prompt": ("lm",),
}
FALSE = ("model.copy", "model.projection", "model.labels", "model.features", "train.smoothing")  # whose default means nothing


def reads(kind: str, name: str) -> bool:
    """Whether models of a kind read the setting "section.key"."""
    return kind in READ_BY.get(name, EVERY)


def check_said(config: Config, said: Mapping[str, Any]) -> None:
    """Raise UserError where a user has said a setting, section -> key -> value, that this kind of model does not read.

    What a preset or another run says is not meant for one kind, and may stay without effect.
    """
    for section, values in said.items():
        for key in values:
            _check_read(f"{section}.{key}", config.model.kind)


def _check_read(name: str, kind: str) -> None:
    if not reads(kind, name):
        *others, last = READ_BY[name]
        kinds = f"{', '.join(others)} and {last}" if others else last
        raise UserError(f"{name} is read by model.kind = {kinds}, not by {kind}: leave it out")


def check_together(config: Config) -> None:
    """Raise UserError where settings contradict each other."""
    _check_model(config.model)
    _check_train(config.train)
    for name in FALSE:
        section, _, key = name.partition(".")
        if getattr(getattr(config, section), key) != FIELDS[name].default:
            _check_read(name, config.model.kind)
    if config.train.unfreeze and not config.train.init_from:
        raise UserError("train.unfreeze frees the layers of a model to begin with: give one by --init-from")
    if config.train.unfreeze and config.model.tied:
        raise UserError("train.unfreeze begins with the output alone, which model.tied makes one with the embedding")
    if config.train.unfreeze and config.train.weight_decay:
        raise UserError("train.unfreeze keeps parameters as they are, which train.weight_decay would move: not both")


def _check_model(model: ModelConfig) -> None:
    kind = model.kind
    if model.bidirectional and kind in TEXT:
        raise UserError(
            "model.bidirectional: a model of text that reads in both directions sees the token that it is to predict; "
            "model.kind = bilm has two directions that do not see each other"
        )
    if not model.embedding and kind != "lm" and not model.features:
        raise UserError(f"model.embedding = 0, one-hot inputs, is of model.kind = lm, not of {kind}")
    if (model.bidirectional or kind in SOURCES) and model.hidden % SIDE_BY_SIDE:
        raise UserError(f"model.hidden = {model.hidden}: of model.kind = {kind} it is a multiple of {SIDE_BY_SIDE} here")
    if model.attention == "dot" and kind in SOURCES and model.bidirectional:
        raise UserError("model.attention = dot compares states of one width: model.bidirectional needs general")
    if model.tied:
        _check_tied(model)


def _check_tied(model: ModelConfig) -> None:
    kind, embedding = model.kind, model.embedding
    if kind in SOURCES:
        if model.projection not in (0, embedding):
            raise UserError(
                f"model.tied needs model.projection = model.embedding, but they are {model.projection} and {embedding}"
            )
    elif kind in READS_WHOLE:
        raise UserError(f"model.tied is of kinds that predict tokens, not of {kind}")
    elif embedding != model.hidden:
        raise UserError(f"model.tied needs model.embedding = model.hidden, but they are {embedding} and {model.hidden}")


def _check_train(train: TrainConfig) -> None:
    if train.nesterov and train.momentum == 0:
        raise UserError("train.nesterov needs train.momentum above 0")
    if train.schedule == "range" and not 0 < train.min_lr < train.lr:
        raise UserError("train.schedule = range rises from train.min_lr to train.lr: it needs 0 < train.min_lr < train.lr")
    if train.schedule == "plateau" and train.decay <= 1:
        raise UserError("train.schedule = plateau divides lr by train.decay, which must be above 1, for example 4")
