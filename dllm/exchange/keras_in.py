"""Models of Keras 3: .keras, whose config.json names the layers, and .weights.h5, where groups and shapes say enough.

    lm           Embedding, or one-hot inputs, LSTM ..., Dense of as many units as there are tokens
    tagger       Embedding or frames, LSTM or Bidirectional(LSTM) ..., Dense at each step
    classifier   the same, and a pool or the end of the last layer before the Dense; a Dense of one unit is of two classes

A Dense before the last one is a projection: tanh, no bias. A Bidirectional of a number of units that no layer here has is made
wider by units that stay zero. What is padding in Keras is not there here: where the tokenizer has one token fewer than the
Embedding, it lacks the row that is skipped, with mask_zero the first, before Masking the last.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from .. import config
from ..config.together import SIDE_BY_SIDE
from ..errors import UserError, shown
from ..files import archive, safetensors, storage
from ..files.plain_hdf5 import Dataset, PlainHdf5
from ..kernels.types import Array
from ..model import torch_weights
from ..model.torch_weights import Tensors
from ..remote.locate import local_copy
from . import keras_layers
from .imports import Asked, Imported
from .keras_layers import Chain, Part
from .keras_names import BELOW, CELLS, CONFIG, WEIGHTS

MOST_CONFIG = 1 << 22  # bytes of a config.json, of which a layer has 2 kB
LONGEST_INPUT = 1 << 16  # steps that an Input may say
WINDOW = 256  # tokens of a text where the model does not say
POOLS = {"GlobalMaxPooling1D": "max", "GlobalAveragePooling1D": "mean"}
LEAST_WIDENED = 4  # units of a direction: so arrays become at most four times as large
WAYS = "", "_reverse"


def read(asked: Asked) -> Imported:
    """The model of a .keras or .weights.h5. Raises UserError."""
    path = local_copy(asked.file)
    if asked.file.endswith(".keras"):
        members = archive.read_members(path, {CONFIG: MOST_CONFIG, WEIGHTS: None})
        described = storage.parse_json(f"{asked.file}: {CONFIG}", members[CONFIG], [], MOST_CONFIG)
        chain = keras_layers.of_config(described, asked.file)
        file = PlainHdf5(members[WEIGHTS], f"{asked.file}: {WEIGHTS}")
    else:
        file = PlainHdf5(safetensors.read_bytes(path), asked.file)
        if not file.has("layers"):
            older = " of Keras's older format" * file.has("model_weights")
            raise UserError(f"{asked.file} is no .weights.h5 of Keras 3, but a file{older}: save the model as .keras")
        chain = keras_layers.of_groups(file.names("layers"), asked.file)
    return _Model(asked, chain, _Weights(file)).imported()


class _Weights:
    """Arrays of layers, of which each byte is taken once."""

    def __init__(self, file: PlainHdf5) -> None:
        self.file, self.taken = file, list[Dataset]()

    def of(self, part: Part, place: str, most: int) -> list[Dataset]:
        """The arrays of a group below that of a layer: a bias fewer than `most`, or not. Raises UserError."""
        group = "/".join(filter(None, (part.group, place, "vars")))
        names = self.file.names(group)
        if names not in ([str(number) for number in range(count)] for count in (most - 1, most)):
            raise UserError(f"{self.file.path}: {part} has {len(names)} arrays in '{group}', it should be {most}, or one fewer")
        found = [self.file.dataset(f"{group}/{name}") for name in names]
        for number, one in enumerate(found):
            axes = 1 if number == most - 1 else 2
            if len(one.shape) != axes:
                raise UserError(f"{self.file.path}: array {number} of {part} is {list(one.shape)}, of {axes} axes it should be")
            if any(one.start < other.stop and other.start < one.stop for other in self.taken):
                raise UserError(f"{self.file.path}: an array of {part} is another's too")
            self.taken.append(one)
        return found


class _Shape(NamedTuple):
    """What the layers and their shapes say."""

    kind: str
    inputs: int  # rows of the Embedding, or numbers of a frame
    embedding: int  # 0: there is none
    hidden: int
    classes: int  # of the last Dense


class _Model:
    """A model whose layers are known; its arrays are found, compared, and then read."""

    def __init__(self, asked: Asked, chain: Chain, weights: _Weights) -> None:
        self.asked, self.chain, self.file, self.notes = asked, chain, weights.file, list[str]()
        self.embedding, self.masking, self.pool = self._first("Embedding"), self._first("Masking"), self._first(*POOLS)
        self.layers, self.dense = ([part for part in chain.parts if part.kind in kinds] for kinds in (CELLS, ("Dense",)))
        if len(self.dense) > 2:
            raise UserError(f"{asked.file}: {self.dense[1]} is one too many: a model here has one Dense before the last")
        self.ways = len(CELLS[self.layers[0].kind])
        self.table = weights.of(self.embedding, "", 2) if self.embedding else []
        self.cells = [[weights.of(part, place, 3) for place in CELLS[part.kind]] for part in self.layers]
        self.denses = [weights.of(part, "", 2) for part in self.dense]
        self.there = weights.of(chain.there, "cell", 3) if chain.there else []

    def _first(self, *kinds: str) -> Part | None:
        return next((part for part in self.chain.parts if part.kind in kinds), None)

    def imported(self) -> Imported:
        """Raises UserError."""
        shape = self._shape()
        self._check_ends(shape)
        labels = self._labels(shape) if shape.kind != "lm" else ()
        tensors = self._tensors(shape, labels)
        settings = self._settings(shape, tensors, labels)
        if settings.model.tied:
            del tensors["output.weight"]
        vocabulary = len(tensors["output.bias"]) if shape.kind == "lm" else len(tensors.get("embedding.weight", ()))
        wanted = torch_weights.shapes(settings.model, vocabulary)
        if {name: tensor.shape for name, tensor in tensors.items()} != wanted:
            raise UserError(f"{self.asked.file} has arrays of other shapes than such a model has")
        ordered = {name: np.ascontiguousarray(tensors[name], np.float32) for name in wanted}
        return Imported(settings, ordered, vocabulary, tuple(sorted(labels)), tuple(self.notes))

    def _shape(self) -> _Shape:
        """Raises UserError where arrays do not fit each other."""
        first = self.cells[0][0][0].shape[0]
        inputs, E = self.table[0].shape if self.table else (first, 0)
        width, H = E or inputs, self.cells[0][0][1].shape[0]
        if len(self.table) > 1:
            raise UserError(f"{self.asked.file}: {self.embedding} has two arrays")
        for part, cells in zip(self.layers, self.cells, strict=True):
            known = keras_layers.lstm_config(part)
            for cell in cells:
                self._compare(part, [one.shape for one in cell], [(width, 4 * H), (H, 4 * H), (4 * H,)][: len(cell)])
            if known is not None and known.get("units") != H:
                raise UserError(f"{self.asked.file}: {part} has units = {shown(known.get('units'))}, its arrays have {H}")
            width = self.ways * H
        for part, arrays in zip(self.dense, self.denses, strict=True):
            units = arrays[0].shape[1]
            self._compare(part, [one.shape for one in arrays], [(width, units), (units,)][: len(arrays)])
            width = units
        if self.there:
            self._compare(self.chain.there, [one.shape for one in self.there], [(self.ways * H, 1), (1, 1), (1,)])
        return _Shape(self._kind(inputs, width), inputs, E, H, width)

    def _compare(self, part: Part | None, found: list[tuple[int, ...]], wanted: list[tuple[int, ...]]) -> None:
        if found != wanted:
            there, here = (", ".join(str(list(shape)) for shape in shapes) for shapes in (found, wanted))
            raise UserError(f"{self.asked.file}: {part} has arrays {there}, by the others they are {here}")

    def _each_step(self) -> bool | None:
        """Whether the last LSTM gives something at each step, and no pool follows; None: it is not known."""
        steps = list[bool]()
        for part in self.layers:
            known = keras_layers.lstm_config(part)
            if known is not None:
                steps.append(known.get("return_sequences") is True)
        if not all(steps[:-1]) or (self.pool and steps and not steps[-1]):
            raise UserError(
                f"{self.asked.file}: {self.layers[steps.index(False)]} gives its end alone, and a layer behind it reads steps"
            )
        return False if self.pool else (steps[-1] if steps else None)

    def _kind(self, inputs: int, classes: int) -> str:
        """The kind of the model. Raises UserError where the file does not say it."""
        steps, labels = self._each_step(), self.asked.labels or self.asked.tokenizer.labels
        plain = self.ways == 1 and self.pool is None and len(self.dense) == 1
        if plain and classes == inputs and len(labels) != classes and not self.asked.tokenizer.bands:
            return "lm"
        if self.ways == 2 and not labels and classes == inputs:
            raise UserError(f"{self.asked.file}: {self.layers[0]} sees what comes next, it cannot predict a token")
        if classes == 1 and steps is not True:
            return "classifier"
        if steps is None:
            raise UserError(f"{self.asked.file} does not say whether words or texts have the labels: save the model as .keras")
        return "tagger" if steps else "classifier"

    def _labels(self, shape: _Shape) -> tuple[str, ...]:
        """The names of the classes in the order of their numbers. Raises UserError."""
        labels, classes = self.asked.labels or self.asked.tokenizer.labels, max(2, shape.classes)
        if len(labels) != classes:
            raise UserError(
                f"{self.asked.file} has {classes} classes, and {len(labels)} labels are named: --labels A,B names them in "
                "the order of their numbers"
            )
        return labels

    def _check_ends(self, shape: _Shape) -> None:
        """Raise UserError where the last layers give none of classes that exclude each other."""
        one = shape.classes == 1 and shape.kind != "lm"
        allowed, bent = ("linear", "sigmoid" if one else "softmax"), 0
        for part in self.chain.parts:
            if part.kind not in ("Dense", "Activation", "Softmax") or part in self.dense[:-1]:
                continue
            activation = (part.config or {}).get("activation", "softmax" if part.kind == "Softmax" else "linear")
            bent += activation != "linear"
            if activation not in allowed or bent > 1:
                fits = f"{' or '.join(allowed)}, once"
                raise UserError(f"{self.asked.file}: {part} has activation = {activation}, an output of its kind has {fits}")

    def _settings(self, shape: _Shape, tensors: Tensors, labels: tuple[str, ...]) -> config.Config:
        E, H = shape.embedding, shape.hidden
        model: dict[str, Any] = {"kind": shape.kind, "hidden": shape.hidden + self._added(shape), "layers": len(self.layers)}
        if shape.kind == "lm":
            table = tensors.get("embedding.weight")
            model["embedding"] = 0 if table is None else E
            model["tied"] = table is not None and E == H and np.array_equal(table, tensors["output.weight"])
        else:
            model |= {"bidirectional": self.ways == 2, "labels": len(labels)}
            model |= {"embedding": E} if E else {"features": shape.inputs}
            model["projection"] = self.denses[0][0].shape[1] if len(self.denses) == 2 else 0
        if shape.kind == "classifier":
            model["pool"] = POOLS[self.pool.kind] if self.pool else "last"
        window = self._window() or (0 if shape.kind == "lm" else WINDOW)
        return config.from_dict({"model": model} | ({"train": {"window": window}} if window else {}))

    def _window(self) -> int:
        """The steps that the Input says; 0: any number."""
        first = self.chain.parts[0].config or {}
        shape = first.get("batch_shape", first.get("batch_input_shape"))
        steps = shape[1] if isinstance(shape, list) and len(shape) > 1 else None
        return steps if type(steps) is int and 0 < steps <= LONGEST_INPUT else 0

    def _added(self, shape: _Shape) -> int:
        """Units that a direction has here and not there."""
        return -shape.hidden % SIDE_BY_SIDE if self.ways == 2 and shape.hidden >= LEAST_WIDENED else 0

    def _tensors(self, shape: _Shape, labels: tuple[str, ...]) -> Tensors:
        """Under PyTorch's names."""
        self._check_there()
        H, added, lm, found = shape.hidden, self._added(shape), shape.kind == "lm", Tensors()
        if self.table:
            table = self.file.read(self.table[0])
            identity = lm and table.shape[0] == table.shape[1] and np.array_equal(table, np.eye(len(table), dtype=np.float32))
            if not identity:
                found["embedding.weight"] = self._rows(table, lm)
        for number, cells in enumerate(self.cells):
            for way, cell in zip(WAYS, cells, strict=False):
                W, U, *bias = [_wider(self.file.read(one), -1, 4, H, added) for one in cell]
                place = f"{'lstm' if lm else 'encoder'}.{{}}_l{number}{way}"
                found[place.format("weight_ih")] = (_wider(W, 0, self.ways, H, added) if number else W).T
                found[place.format("weight_hh")] = _wider(U, 0, 1, H, added).T
                found[place.format("bias_ih")] = bias[0] if bias else np.zeros(4 * (H + added), np.float32)
                found[place.format("bias_hh")] = np.zeros(4 * (H + added), np.float32)
        if added:
            self.notes.append(f"an LSTM of {H} units in each direction has {H + added} here, of which {added} stay zero")
        *before, last = [[self.file.read(one) for one in arrays] for arrays in self.denses]
        if before:
            found["projection.weight"] = _wider(self._projection(before[0]), 0, self.ways, H, added).T
        W = (last[0] if before else _wider(last[0], 0, self.ways, H, added)).T
        b = last[1] if len(last) > 1 else np.zeros(len(W), np.float32)
        if not lm and shape.classes == 1:  # softmax of (0, z) is (1 - s, s), s the sigmoid of z
            W, b = np.concatenate([np.zeros_like(W), W]), np.concatenate([np.zeros_like(b), b])
        order = sorted(range(len(b)), key=labels.__getitem__) if labels else [*range(len(b))]
        found["output.weight"], found["output.bias"] = W[order], b[order]
        return found

    def _rows(self, table: Array, lm: bool) -> Array:
        """The rows of an Embedding (V,E) that stand for tokens here. Raises UserError where Keras skips some of them."""
        fewer = self.asked.tokenizer.size == len(table) - 1
        if self.embedding and (self.embedding.config or {}).get("mask_zero"):
            if fewer and not lm:
                return table[1:]
            self.notes.append(f"{self.embedding} skips token 0 (mask_zero), which is read here: no text should have it")
        if self.masking:
            known = self.masking.config
            value = table[-1, 0] if known is None else known.get("mask_value", 0)
            if isinstance(value, bool) or not isinstance(value, int | float | np.floating):
                raise UserError(f"{self.asked.file}: {self.masking} has mask_value = {shown(value)}")
            skipped = np.flatnonzero((table == np.float32(value)).all(axis=1)).tolist()
            if fewer and skipped == [len(table) - 1]:
                return table[:-1]
            if skipped and known is not None:
                raise UserError(f"{self.asked.file}: {self.masking} skips token {skipped[0]}, which a text here may have")
        return table

    def _projection(self, arrays: list[Array]) -> Array:
        """The matrix of the Dense before the last one. Raises UserError where it is more than that and tanh."""
        part = self.dense[0]
        activation = "tanh" if part.config is None else part.config.get("activation", "linear")
        if activation != "tanh" or (len(arrays) > 1 and arrays[1].any()):
            bias = " and a bias" * (len(arrays) > 1)
            raise UserError(
                f"{self.asked.file}: {part} has {activation}{bias}; before the last Dense one has tanh and no bias here"
            )
        return arrays[0]

    def _check_there(self) -> None:
        """Raise UserError where the layer that tells padding apart says something of what is none."""
        wanted = 0, 0, -BELOW
        if self.there and any((self.file.read(one) != value).any() for one, value in zip(self.there, wanted, strict=False)):
            raise UserError(f"{self.asked.file}: {self.chain.there} does more than tell padding apart")


def _wider(x: Array, axis: int, parts: int, H: int, added: int) -> Array:
    """x with `added` zeros behind each H of an axis, parts H long."""
    if not added:
        return x
    axis %= x.ndim
    cut = x.reshape(*x.shape[:axis], parts, H, *x.shape[axis + 1 :])
    room = [(0, 0)] * cut.ndim
    room[axis + 1] = 0, added
    return np.pad(cut, room).reshape(*x.shape[:axis], parts * (H + added), *x.shape[axis + 1 :])
