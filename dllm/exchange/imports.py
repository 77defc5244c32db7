"""Models of other programs that become model folders: dllm import FILE.

To add a format: a file beside this with `read(Asked) -> Imported`, and its line in READERS. It is imported when it is used.
"""

from __future__ import annotations

import importlib
from typing import NamedTuple

from ..config import Config
from ..data.tokenizer import Tokenizer
from ..errors import UserError
from ..model.torch_weights import Tensors

READERS = {  # how the name of a file ends -> the file beside this that reads it; "": any other
    ".keras": "keras_in",
    ".h5": "keras_in",
    "": "torch_in",
}


class Asked(NamedTuple):
    """A file, and what its user says of it."""

    file: str  # a path or an URL, as messages call it
    tokenizer: Tokenizer
    labels: tuple[str, ...]  # in the order of the classes of the file; (): those of the tokenizer


class Imported(NamedTuple):
    """A model as its folder will have it."""

    settings: Config
    tensors: Tensors  # all that torch_weights.shapes says, in this order
    vocabulary: int  # tokens that it reads
    labels: tuple[str, ...] = ()  # in the order of the alphabet
    notes: tuple[str, ...] = ()  # what its user should know


def read(asked: Asked) -> Imported:
    """The model of a file. Raises UserError."""
    module = next(module for end, module in READERS.items() if asked.file.endswith(end))
    try:
        imported: Imported = importlib.import_module(f".{module}", __package__).read(asked)
    except MemoryError:
        raise UserError(f"{asked.file} does not fit into memory") from None
    return imported
