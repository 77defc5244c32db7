"""Which settings go together: what no bound of a single one says."""

from ..errors import UserError
from .sections import Config, ModelConfig, TrainConfig

SIDE_BY_SIDE = 16  # units that fill a row of panels, in either precision
TEXT, SOURCES = ("lm", "bilm"), ("seq2seq",)
READS_WHOLE = ("seq2seq", "tagger", "classifier", "ctc")


def check_together(config: Config) -> None:
    """Raise UserError where settings contradict each other."""
    _check_model(config.model)
    _check_train(config.train)
    if config.train.smoothing and config.model.kind == "ctc":
        raise UserError("train.smoothing is of targets that stand in a place, not of model.kind = ctc")
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
    for name, others in (("projection", TEXT), ("labels", TEXT + SOURCES), ("features", TEXT + SOURCES)):
        if getattr(model, name) and kind in others:
            raise UserError(f"model.{name} is not of model.kind = {kind}")
    if model.copy and kind not in SOURCES:
        raise UserError(f"model.copy is of model.kind = seq2seq, not of {kind}")
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
