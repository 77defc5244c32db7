"""model.keras: what keras.saving.load_model opens, without objects of ours, and `fit` goes on with.

    lm           tokens, Embedding, LSTM ..., Dense: logits of the next token at each step
    tagger       tokens or frames, Masking, LSTM or Bidirectional(LSTM) ..., Dense: probabilities of labels at each step
    classifier   the same with a pool before the Dense: probabilities of labels of the text

Texts of different lengths are padded on either side. Keras's mask_zero would skip 0, which is a token like others here. So the
padding is the number behind the last token, whose row of the Embedding Masking knows; of frames it is one all of NOTHING. The
largest of all steps takes no mask in Keras: to what padding gives, BELOW is added there.

Weights are float32 of what is stored. Two biases are added up, a tied matrix is there twice. One-hot inputs are an Embedding
that is the identity and does not learn. A dropout is not there.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np

from ..config import ModelConfig
from ..errors import UserError
from ..files import archive, hdf5
from ..kernels.types import Array
from ..model import blocks
from ..model.torch_weights import Tensors
from .formats import Stored
from .keras_names import BELOW, CONFIG, METADATA, NOTHING, WEIGHTS, Groups

KINDS = "lm", "tagger", "classifier"
MOST_ONE_HOT = 1 << 13  # tokens of one-hot inputs: the identity of so many has 256 MB
POOLS = {"max": "GlobalMaxPooling1D", "mean": "GlobalAveragePooling1D"}
Config = dict[str, Any]
WRITTEN_BY = {"keras_version": "3.0.0", "date_saved": "1980-01-01@00:00:00"}  # the same for a model whenever it is written


class Layer(NamedTuple):
    """A layer of Keras."""

    kind: str  # its class
    config: Config
    weights: Mapping[str, list[Array]] = MappingProxyType({})  # group below its own -> arrays in Keras's order; "": its own
    width: int = 0  # of what it gives; 0: that of what it reads
    of: tuple[str, ...] = ()  # the names of the layers that it reads; (): the one before it


def pack(stored: Stored) -> bytes:
    """The bytes of model.keras. Raises UserError where Keras has no layers for such a model."""
    config = stored.settings.model
    if config.kind not in KINDS:
        raise UserError(f"--also keras: Keras has no layers for a model of kind {config.kind}, only for {', '.join(KINDS)}")
    layers = [*(_lm if config.kind == "lm" else _labels)(config, stored.tokenizer.size, stored.tensors)]
    branches = any(layer.of for layer in layers)
    described = json.dumps(_functional(layers) if branches else _sequential(layers), indent=1).encode()
    arrays, groups = _weights(layers)
    return archive.pack_members(
        {METADATA: json.dumps(WRITTEN_BY).encode(), CONFIG: described, WEIGHTS: hdf5.pack_plain(arrays, groups)}
    )


def _lm(config: ModelConfig, V: int, tensors: Tensors) -> Iterator[Layer]:
    yield Layer("InputLayer", {"name": "tokens", "batch_shape": [None, None], "dtype": "int32"})
    if config.embedding:
        table = tensors["embedding.weight"]
    elif V > MOST_ONE_HOT:
        raise UserError(f"--also keras: one-hot inputs of {V:,} tokens would take a matrix of {V:,} x {V:,} there")
    else:
        table = np.eye(V, dtype=np.float32)
    yield _embedding(table, trainable=config.embedding > 0)
    for number in range(config.layers):
        weights = {"cell": _cell(tensors, f"lstm.{{}}_l{number}")}
        yield Layer("LSTM", _lstm(f"lstm_{number}", config.hidden, True), weights, config.hidden)
    matrix = tensors["embedding.weight" if config.tied else "output.weight"]
    yield _dense("output", matrix, tensors["output.bias"], "linear")


def _labels(config: ModelConfig, V: int, tensors: Tensors) -> Iterator[Layer]:
    if config.features:
        yield Layer("InputLayer", {"name": "frames", "batch_shape": [None, None, config.features], "dtype": "float32"})
        yield Layer("Masking", {"name": "masking", "mask_value": NOTHING}, width=config.features)
    else:
        table = tensors["embedding.weight"]
        value = next(value for value in itertools.count(0.0) if not (table == value).all(axis=1).any())
        padded = np.concatenate([table, np.full((1, table.shape[1]), value, np.float32)])
        yield Layer("InputLayer", {"name": "tokens", "batch_shape": [None, None], "dtype": "int32"})
        yield _embedding(padded)
        yield Layer("Masking", {"name": "masking", "mask_value": value})
    whole, M = config.kind == "classifier" and config.pool == "last", blocks.memory(config)
    for number in range(config.layers):
        yield _recurrent(config, tensors, number, not (whole and number == config.layers - 1))
    if config.kind == "classifier" and config.pool != "last":
        name = "bidirectional" if config.bidirectional else "lstm"
        yield from _pool(config.pool, f"{name}_{config.layers - 1}", M)
    if config.projection:
        yield _dense("projection", tensors["projection.weight"], None, "tanh")
    yield _dense("labels", tensors["output.weight"], tensors["output.bias"], "softmax")


def _embedding(table: Array, trainable: bool = True) -> Layer:
    V, E = table.shape
    config = {"name": "embedding", "input_dim": V, "output_dim": E, "mask_zero": False, "trainable": trainable}
    return Layer("Embedding", config, {"": [table]}, E)


def _dense(name: str, matrix: Array, bias: Array | None, activation: str) -> Layer:
    config = {"name": name, "units": len(matrix), "activation": activation, "use_bias": bias is not None}
    return Layer("Dense", config, {"": [matrix.T, *([] if bias is None else [bias])]}, len(matrix))


def _lstm(name: str, units: int, sequences: bool) -> Config:
    gates = {"activation": "tanh", "recurrent_activation": "sigmoid", "use_bias": True}
    return {"name": name, "units": units, **gates, "return_sequences": sequences}


def _cell(tensors: Tensors, name: str) -> list[Array]:
    """Keras's arrays of an LSTM, whose tensors have `name`, where {} is what of it."""
    bias = tensors[name.format("bias_ih")] + tensors[name.format("bias_hh")]
    return [tensors[name.format("weight_ih")].T, tensors[name.format("weight_hh")].T, bias]


def _recurrent(config: ModelConfig, tensors: Tensors, number: int, sequences: bool) -> Layer:
    """A layer that reads what is there as a whole."""
    forward = _cell(tensors, f"encoder.{{}}_l{number}")
    if not config.bidirectional:
        return Layer("LSTM", _lstm(f"lstm_{number}", config.hidden, sequences), {"cell": forward}, config.hidden)
    inner = _serialized("LSTM", _lstm(f"lstm_{number}", config.hidden, sequences))
    weights = {"forward_layer/cell": forward, "backward_layer/cell": _cell(tensors, f"encoder.{{}}_l{number}_reverse")}
    outer = {"name": f"bidirectional_{number}", "merge_mode": "concat", "layer": inner}
    return Layer("Bidirectional", outer, weights, 2 * config.hidden)


def _pool(how: str, below: str, M: int) -> Iterator[Layer]:
    """What of all steps is looked at; below: the name of the last layer, which gives M numbers a step."""
    if how == "max":
        there = {"name": "there", "units": 1, "activation": "linear", "return_sequences": True, "zero_output_for_mask": True}
        weights = [np.zeros((M, 1), np.float32), np.zeros((1, 1), np.float32), np.full(1, -BELOW, np.float32)]
        yield Layer("SimpleRNN", there | {"trainable": False}, {"cell": weights}, 1)
        yield Layer("Rescaling", {"name": "below_padding", "scale": 1.0, "offset": BELOW}, width=1)
        yield Layer("Add", {"name": "without_padding"}, width=M, of=(below, "below_padding"))
    yield Layer(POOLS[how], {"name": "pool"})


def _serialized(kind: str, config: Config) -> Config:
    return {"module": "keras.layers", "class_name": kind, "config": config, "registered_name": None}


def _model(kind: str, module: str, config: Config) -> Config:
    config = {"name": "dllm", "trainable": True} | config
    return {"module": module, "class_name": kind, "config": config, "registered_name": kind if kind == "Functional" else None}


def _sequential(layers: list[Layer]) -> Config:
    return _model("Sequential", "keras", {"layers": [_serialized(layer.kind, layer.config) for layer in layers]})


def _functional(layers: list[Layer]) -> Config:
    """Layers of which some read others than the one before."""
    found, shapes, before = list[Config](), dict[str, list[int | None]](), ""
    for layer in layers:
        name, nodes = layer.config["name"], list[Config]()
        shape = list(layer.config.get("batch_shape", [None, None, layer.width]))
        if before:
            read = [_tensor(one, shapes[one]) for one in layer.of or (before,)]
            nodes = [{"args": [read if layer.of else read[0]], "kwargs": {}}]
            shape = shape if layer.width else shapes[before]
        if before and (layer.kind in POOLS.values() or (len(shapes[before]) == 2 and layer.kind == "Dense")):
            shape = [None, shape[-1]]
        shapes[name] = shape
        found.append(_serialized(layer.kind, layer.config) | {"name": name, "inbound_nodes": nodes})
        before = name
    ends = {"input_layers": [layers[0].config["name"], 0, 0], "output_layers": [before, 0, 0]}
    return _model("Functional", "keras.src.models.functional", {"layers": found} | ends)


def _tensor(layer: str, shape: list[int | None]) -> Config:
    config = {"shape": shape, "dtype": "float32", "keras_history": [layer, 0, 0]}
    return {"class_name": "__keras_tensor__", "config": config}


def _weights(layers: list[Layer]) -> tuple[dict[str, Array], list[str]]:
    """Path -> array of model.weights.h5, and the groups that are there whether or not they hold one."""
    arrays, groups, numbers = dict[str, Array](), ["vars"], Groups()
    for layer in layers:
        own = numbers.of(layer.kind)
        groups.append(f"{own}/vars")
        for place, some in layer.weights.items():
            parts = place.split("/") if place else []
            below = ["/".join([own, *parts[: depth + 1]]) for depth in range(len(parts))]
            groups += [f"{one}/vars" for one in below]
            arrays |= {f"{'/'.join([own, *parts])}/vars/{number}": array for number, array in enumerate(some)}
    return arrays, groups
