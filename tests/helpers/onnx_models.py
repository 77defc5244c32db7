"""Small models of all kinds, what they are given, and what dllm says of it: for tests of their ONNX files."""

import numpy as np
import pytest

from dllm.exchange import formats
from dllm.files import safetensors
from dllm.inference.loaded_model import LoadedModel
from dllm.kernels.softmax import IGNORE
from dllm.model import blocks
from dllm.model.batch import Batch
from helpers import model_kinds
from helpers.model_folders import make_kind

SHAPES = {
    "lm": {"kind": "lm"},
    "lm, 1 x 384": {"kind": "lm", "embedding": 64, "hidden": 384},
    "lm, one-hot": {"kind": "lm", "embedding": 0},
    "lm, tied, two layers": {"kind": "lm", "embedding": 16, "tied": True, "layers": 2, "biases": 2},
    "lm, three layers": {"kind": "lm", "layers": 3},
    **{name: shape for name, shape in model_kinds.SHAPES.items() if shape["kind"] != "bilm"},
}
EVERY_SHAPE = pytest.mark.parametrize("shape", SHAPES)
S, T, B = 7, 5, 4  # steps of what is read and of a target, and lanes
LENGTHS = np.array([7, 3, 0, 1])


def stored(folder, weights):
    """The Stored of a model folder."""
    opened, arrays = LoadedModel.open(folder), safetensors.read(folder / "model.safetensors")
    return formats.Stored(opened.settings, opened.tokenizer, {name: array for name, (_, array) in arrays.items()}, weights)


def write(folder, shape, weights):
    """A folder with a model of random parameters and its ONNX files. Returns the Model, as it is read back."""
    make_kind(folder / "model", {"hidden": 16, **SHAPES[shape]}, weights)
    for name, data in formats.pack(["onnx"], stored(folder / "model", weights)).items():
        (folder / name).write_bytes(data)
    return LoadedModel.open(folder / "model").network(S, B)


def given(config, vocabulary):
    """A Batch without targets, and states h, c of layers that carry theirs on."""
    rng = np.random.default_rng(4)
    inputs, before = (rng.integers(0, vocabulary or 1, (steps, B)) for steps in (S, T))
    if config.features:
        inputs = rng.standard_normal((S, B, config.features)).astype(np.float32)
    lengths = np.maximum(LENGTHS, config.kind == "seq2seq")  # which refuses a source of nothing
    state = rng.uniform(-1, 1, (2, blocks.carried(config), B, config.hidden)).astype(np.float32)
    return Batch(inputs, np.empty((0, 0)), lengths, before), state


def said(model, batch, state):
    """log P (T,B,classes) of every class, float64, and the states afterwards: losses of targets that are it, or of `logits`."""
    config, classes, found = model.config, blocks.outputs(model.config, model.vocabulary), []
    rows = {"seq2seq": T, "classifier": 1}.get(config.kind, S)
    if config.kind in blocks.LABELLED:
        nothing = np.where(batch.lengths > 0, np.zeros((1 if config.kind == "ctc" else rows, B), np.int64), IGNORE)
        model.forward(batch._replace(targets=nothing), *state)
        return log_softmax(model.logits()), state
    for number in range(classes):
        after = state.copy()
        found.append(model.forward(batch._replace(targets=np.full((rows, B), number)), *after).copy())
    return -np.moveaxis(np.array(found, np.float64), 0, -1), after


def log_softmax(x):
    """Over the last axis, float64."""
    x = x.astype(np.float64) - x.max(axis=-1, keepdims=True)
    return x - np.log(np.exp(x).sum(axis=-1, keepdims=True))


def by_onnx(run, folder, config, batch, state, together=True):
    """The same by a model's files. run(path, {name: array}): what they say; together: all steps of a target at once"""
    inputs = {"frames" if config.features else "tokens": batch.inputs}
    if config.kind == "lm":
        there = run(folder / "model.onnx", inputs | {"h": state[0], "c": state[1]})
        return log_softmax(there["logits"]), np.stack([there["h_next"], there["c_next"]])
    lengths = {"lengths": batch.lengths}
    if config.kind != "seq2seq":
        found = log_softmax(run(folder / "model.onnx", inputs | lengths)["logits"])
        return found.reshape(-1, *found.shape[-2:]), state
    read = run(folder / "encoder.onnx", inputs | lengths)
    source = {name: read[name] for name in ("memory", "keys") if name in read}
    source |= lengths | ({"source": batch.inputs} if config.copy else {})
    h, c, found = read["h"], read["c"], []
    for tokens in [batch.before] if together else batch.before[:, None]:
        there = run(folder / "decoder.onnx", {"tokens": tokens, "h": h, "c": c, **source})
        h, c = there["h_next"], there["c_next"]
        found.append(log_softmax(there["logits"]))
    return np.concatenate(found), state
