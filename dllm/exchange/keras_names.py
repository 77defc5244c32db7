"""How Keras 3 calls what is in its files: groups of model.weights.h5, and the values that stand for padding."""

from __future__ import annotations

import re
from collections import Counter

CONFIG, WEIGHTS = "config.json", "model.weights.h5"
METADATA = "metadata.json"
CELLS = {  # the groups of a layer that have the weights of an LSTM, by class
    "LSTM": ("cell",),
    "Bidirectional": ("forward_layer/cell", "backward_layer/cell"),
}
NOTHING = -1000.0  # a frame all of which is this is padding: frames are of deviation 1, and of silence 0
BELOW = -2.0  # is added to what padding gives, before the largest is taken: an LSTM's output lies between -1 and 1


class Groups:
    """The groups of layers, asked for in the order of layers: a number tells those of one class apart."""

    def __init__(self) -> None:
        self._seen = Counter[str]()

    def of(self, kind: str) -> str:
        """The group of the next layer of a class."""
        name, number = snake(kind), self._seen[kind]
        self._seen[kind] += 1
        return f"layers/{name}_{number}" if number else f"layers/{name}"


def snake(kind: str) -> str:
    """The name of a class as Keras writes it in groups."""
    return re.sub("([a-z])([A-Z])", r"\1_\2", re.sub("(.)([A-Z][a-z]+)", r"\1_\2", kind)).lower()
