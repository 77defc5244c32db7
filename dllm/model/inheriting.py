"""What a model takes of another one as its beginning: all of one of its own shape; embedding and layers of a model of text.

Layers that read a whole input have two directions side by side. The onward one is that of a language model, and of one of both
directions (Peters et al. 2018) each has its own; in layers above the first, whose inputs are both directions, what a direction
takes of the other begins at zero.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from ..config import TEXT, ModelConfig
from ..errors import UserError
from ..kernels.types import Array
from .layout import Layout

SHARED = "embedding", "hidden", "biases"  # what a model has in common with the model of text that it begins with


class Taken(NamedTuple):
    """Rows of a tensor that are those of another one; rows beside them are zero."""

    name: str
    theirs: str
    first: int = 0


def shape(parent: ModelConfig, kind: str | None, whole: dict[str, Any]) -> dict[str, Any]:
    """What a parent decides of the settings `model` of a new one. Raises UserError where one of `kind` cannot begin with it.

    kind : that was asked for; None: as the parent is
    whole : of one of the same kind
    """
    if kind in (None, parent.kind):
        return whole
    if parent.kind not in TEXT or kind in TEXT:
        raise UserError(
            f"a model of kind {kind} cannot begin with one of kind {parent.kind}: choose another preset or --init-from"
        )
    layers = "encoder_layers" if kind == "seq2seq" else "layers"
    return {name: getattr(parent, name) for name in SHARED} | {layers: parent.layers}


def inherit(layout: Layout, vector: Array, theirs: Layout, parent: Array, name: str) -> None:
    """Fill what there is of the flat vector (size,) from that of a parent, called `name`. Raises UserError."""
    if layout.config.kind == theirs.config.kind:
        found = [Taken(one, one) for one in layout.tensors]
        for left in theirs.tensors.keys() - layout.tensors.keys():
            raise UserError(f"--init-from {name} is of another shape: it has {left}, which is not here")
    else:
        found = list(_of_text(layout, theirs.config))
    for one in found:
        _take(layout, vector, theirs, parent, one, name)


def _of_text(layout: Layout, parent: ModelConfig) -> Iterator[Taken]:
    """Of a model of text."""
    yield Taken("embedding.weight", "embedding.weight")
    ways = {"forward": "lstm"} if parent.kind == "lm" else {"forward": "forward", "backward": "backward"}
    for name in layout.tensors:
        part, _, rest = name.partition(".")
        if part == "encoder":
            layer, way, tensor = rest.split(".")
            above = int(layer) > 0 and tensor == "weight_x"
            first = parent.hidden if above and way == "backward" else 0
            if way in ways:
                yield Taken(name, f"{ways[way]}.{layer}.{tensor}", first)


def _take(layout: Layout, vector: Array, theirs: Layout, parent: Array, one: Taken, name: str) -> None:
    ours, there = (found.tensors.get(key) for found, key in ((layout, one.name), (theirs, one.theirs)))
    rows = 0 if there is None else there.shape[0]
    fits = there is not None and ours is not None and ours.shape[1:] == there.shape[1:] and ours.shape[0] >= one.first + rows
    if not fits or ours is None or (ours.shape[0] != rows and ".weight_x" not in one.name):
        what = f"{one.theirs} is {there and there.shape} there, {one.name} {ours and ours.shape} here"
        raise UserError(f"--init-from {name} is of another shape: {what}")
    tensor = np.zeros(ours.shape, layout.dtype)
    tensor[one.first : one.first + rows] = theirs.read(parent, one.theirs)
    layout.write(vector, one.name, tensor)


def stages(layout: Layout) -> dict[str, int]:
    """When each block learns as layers are freed: what is above all layers first, the embedding last."""
    layers = [layer_of(name) for name in layout.blocks]
    order = sorted(set(layers), reverse=True)
    return {name: order.index(layer) for name, layer in zip(layout.blocks, layers, strict=True)}


def layer_of(block: str) -> float:
    """The number of the layer, in all its directions, that a block belongs to; above all of them infinity, below them -1."""
    name, *rest = block.split(".")
    if name == "decoder" or not rest:
        return -1 if block == "embedding" else math.inf
    return int(rest[0])
