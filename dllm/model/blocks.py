"""Which tensors each kind of model has between its output layer and its embedding, in the order in which the backward finishes
them.
"""

from __future__ import annotations

from typing import NamedTuple, TypeAlias

from ..config import ModelConfig


class Gates(NamedTuple):
    """The weights of an LSTM layer in one direction."""

    name: str
    inputs: int
    units: int


class Dense(NamedTuple):
    """The weights of a layer without bias."""

    name: str
    inputs: int
    units: int


class Units(NamedTuple):
    """What a kind of model reads and what it predicts, in words."""

    read: str = "tokens"
    predicted: str = "tokens"

    @property
    def text(self) -> bool:
        """Whether text is predicted, so that a loss has a perplexity."""
        return self.predicted == "tokens"


Block: TypeAlias = Gates | Dense
LABELLED = "tagger", "classifier", "ctc"  # kinds whose classes are the labels of a corpus


def directions(config: ModelConfig) -> tuple[str, ...]:
    """Of the layers that read what is there as a whole."""
    return ("forward", "backward") if config.bidirectional else ("forward",)


def memory(config: ModelConfig) -> int:
    """Columns of what such layers give: their directions side by side."""
    return len(directions(config)) * config.hidden


def units(config: ModelConfig) -> Units:
    """What such a model reads, by which its speed is counted, and what it predicts, by which its losses are."""
    predicted = {"tagger": "labels", "classifier": "labels", "ctc": "letters"}.get(config.kind, "tokens")
    return Units("frames" if config.features else "tokens", predicted)


def carried(config: ModelConfig) -> int:
    """LSTM layers whose state goes on from window to window."""
    return {"lm": 1, "bilm": 2}.get(config.kind, 0) * config.layers


def outputs(config: ModelConfig, vocabulary: int) -> int:
    """Classes of the output layer; of ctc the last one says nothing."""
    return {"tagger": config.labels, "classifier": config.labels, "ctc": config.labels + 1}.get(config.kind, vocabulary)


def top(config: ModelConfig) -> int:
    """Columns of what the output layer reads."""
    if config.kind in ("lm", "bilm"):
        return config.hidden
    return config.projection or (config.embedding if config.kind == "seq2seq" else memory(config))


def between(config: ModelConfig) -> list[Block]:
    """The blocks of a model between output layer and embedding."""
    if config.kind == "lm":
        return _layers("lstm", config)
    if config.kind == "bilm":
        return [*_layers("backward", config), *_layers("forward", config)]
    if config.kind == "seq2seq":
        return [*_decoder(config), *_encoder(config, config.encoder_layers)]
    projection = [Dense("projection", memory(config), config.projection)] if config.projection else []
    return [*projection, *_encoder(config, config.layers)]


def _layers(name: str, config: ModelConfig) -> list[Block]:
    """Of running text, the last layer first."""
    H, E = config.hidden, config.embedding
    return [Gates(f"{name}.{layer}", H if layer else E, H) for layer in reversed(range(config.layers))]


def _encoder(config: ModelConfig, layers: int) -> list[Block]:
    """Of what is read as a whole."""
    below = [config.features or config.embedding] + [memory(config)] * (layers - 1)
    return [
        Gates(f"encoder.{layer}.{direction}", below[layer], config.hidden)
        for layer in reversed(range(layers))
        for direction in directions(config)
    ]


def _decoder(config: ModelConfig) -> list[Block]:
    """The attention stands between the first layer and those above it."""
    H, M = config.hidden, memory(config)
    keys: list[Block] = [Dense("keys", M, H)] if config.attention == "general" else []
    gate: list[Block] = [Dense("gate", H + M, 1)] if config.copy else []
    return [
        Dense("combine", H + M, top(config)),
        *gate,
        *(Gates(f"decoder.{layer}", H + M if layer == 1 else H, H) for layer in reversed(range(1, config.layers))),
        *keys,
        Gates("decoder.0", config.embedding, H),
        Dense("bridge", M, H),
    ]


def describe(config: ModelConfig) -> str:
    """A model's shape in words, its kind before it; lm is not said."""
    inputs = f"embedding {config.embedding}" if config.embedding else "one-hot"
    inputs = f"frames of {config.features}" if config.features else "tied " * config.tied + inputs
    both = " in both directions" * (config.bidirectional or config.kind == "bilm")
    parts = [inputs, f"{config.layers} x {config.hidden} LSTM{both}"]
    if config.kind == "seq2seq":
        parts[1] = f"{config.encoder_layers} x {config.hidden} LSTM{both} read, {config.layers} x {config.hidden} write"
        parts.append(f"{config.attention} attention" + " and copying" * config.copy)
    if config.kind == "classifier":
        parts.append(f"{config.pool} pool")
    if config.projection:
        parts.append(f"projection {config.projection}")
    if config.labels:
        parts.append(f"{config.labels} labels")
    return ("" if config.kind == "lm" else f"{config.kind}: ") + ", ".join(parts)
