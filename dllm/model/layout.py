"""Where the tensors of a model lie: in the flat vectors of the kernels, in panels, and in the standard vector of files.

The flat vectors are laid out in the order in which the backward finishes them (output layer first, embedding last), so that
what is final is always a prefix and can leave while the rest is still computed. Their blocks are arrays for the kernels:

    output       (ceil((W+1)/R),O,R)    of O classes, with the bias as column W; tied: the embedding too, and last
    NAME.x       (4H/R,D,R)             of an LSTM, in panels of gates (kernels/lstm.py); not with one-hot inputs
    NAME.h       (4H/R,H,R)
    NAME.b       (4H/R,biases,R)
    NAME         (N/R,D,R)              of a dense layer
    embedding    (V,E)                  row-major; one-hot inputs: Wx of layer 0, (V,4H)

Which tensors a kind of model has stands in blocks.py.

Panels (kernels/gemm.py) are padded with zeros, which no gradient touches. Outside, a tensor has its usual shape and order
under its name, and the standard vector holds one after the other.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np

from ..config import ModelConfig
from ..kernels.gemm import width
from ..kernels.types import Array, DType
from . import blocks

PART = 1 << 18  # elements, or a row, that are converted at a time


@dataclass(frozen=True)
class Extent:
    """Elements [start, stop) of a vector, and the shape they have, row-major."""

    start: int
    stop: int
    shape: tuple[int, ...]


Cut: TypeAlias = tuple[str, int, Array]  # name, first row, view of the block with the tensor's rows from there on


def _append(extents: dict[str, Extent], name: str, *shape: int) -> str:
    start = next(reversed(extents.values())).stop if extents else 0
    extents[name] = Extent(start, start + math.prod(shape), shape)
    return name


class Layout:
    """The layout of a model.

    Parameters
    ----------
    config : ModelConfig
    vocabulary : int
        V, an attribute too.
    dtype : numpy.float32 or numpy.float64
        Of the flat vectors; decides R.

    Attributes
    ----------
    tensors, blocks : dict
        name -> Extent, in the standard vector and in the flat vectors.
    parameters, size : int
        Length of the standard vector and of the flat vectors.
    table : Extent or None
        The embedding (V,E) at the end of the flat vectors, of which a step may use few rows; None where it is tied, and where
        frames are read.
    factors : list of str
        Blocks that are right factors of products.
    carried : int
        LSTM layers whose state goes on from window to window.
    """

    def __init__(self, config: ModelConfig, vocabulary: int, dtype: DType) -> None:
        self.config, self.vocabulary = config, vocabulary
        self.dtype: np.dtype[Any] = np.dtype(dtype)
        self.R: int = width(dtype)
        self.tensors: dict[str, Extent] = {}
        self.blocks: dict[str, Extent] = {}
        self._where: dict[str, tuple[str, str, int]] = {}
        self.factors: list[str] = []
        self.carried = blocks.carried(config)
        R = self.R
        if not config.tied:
            self._output(blocks.outputs(config, vocabulary), blocks.top(config))
        else:
            self._tensor("output.bias", (vocabulary,), "output", "last column", blocks.top(config))
        for block in blocks.between(config):
            if isinstance(block, blocks.Gates):
                for kind, rows in (("x", block.inputs), ("h", block.units), ("b", config.biases)):
                    if rows:
                        name = _append(self.blocks, f"{block.name}.{kind}", 4 * -(-block.units // R), rows, R)
                        tensor = "bias" if kind == "b" else f"weight_{kind}"
                        self._tensor(f"{block.name}.{tensor}", (rows, 4 * block.units), name, "gates", block.units)
                        self.factors += [name] * (kind != "b")
            else:
                self.factors.append(_append(self.blocks, block.name, -(-block.units // R), block.inputs, R))
                shape = block.inputs, block.units
                self._tensor(f"{block.name}.weight", shape, block.name, "columns", block.units)
        self.table: Extent | None = None
        if config.tied:
            _append(self.blocks, "output", -(-(config.embedding + 1) // R), vocabulary, R)
            self._tensor("embedding.weight", (vocabulary, config.embedding), "output", "columns", config.embedding)
        elif not config.features:
            columns = config.embedding or 4 * config.hidden
            _append(self.blocks, "embedding", vocabulary, columns)
            self._tensor("embedding.weight", (vocabulary, columns), "embedding", "whole", columns)
            self.table = self.blocks["embedding"]
        self.parameters = next(reversed(self.tensors.values())).stop
        self.size = next(reversed(self.blocks.values())).stop

    def _output(self, classes: int, columns: int) -> None:
        _append(self.blocks, "output", -(-(columns + 1) // self.R), classes, self.R)
        self._tensor("output.weight", (classes, columns), "output", "columns", columns)
        self._tensor("output.bias", (classes,), "output", "last column", columns)

    def _tensor(self, name: str, shape: tuple[int, ...], block: str, kind: str, columns: int) -> None:
        """columns : of a gate, or of the block"""
        _append(self.tensors, name, *shape)
        self._where[name] = block, kind, columns

    def arrays(self, vector: Array) -> dict[str, Array]:
        """name -> view of the flat vector (size,) as a block."""
        return {name: vector[block.start : block.stop].reshape(block.shape) for name, block in self.blocks.items()}

    def read(self, vector: Array, name: str) -> Array:
        """A copy of the tensor `name` of the flat vector (size,), in its usual shape."""
        return self._read(self._block(vector, name), name)

    def write(self, vector: Array, name: str, tensor: Array) -> None:
        """Put a tensor of the usual shape into the flat vector (size,)."""
        for piece, place in self._pieces(self._block(vector, name), name):
            piece[...] = tensor[place]

    def cut(self, vector: Array, start: int, stop: int) -> list[Cut]:
        """What of the flat vector (size,) holds elements [start, stop) of the standard vector.

        A list of Cuts; a copy of their views is all it takes to read those elements later.
        """
        cuts = []
        for name, first, last in self._overlapping(start, stop):
            offset, width = self.tensors[name].start, math.prod(self.tensors[name].shape[1:])
            rows = slice((first - offset) // width, -(-(last - offset) // width))
            block = self._block(vector, name)
            cuts.append((name, rows.start, block[rows] if block.ndim == 2 else block[:, rows]))
        return cuts

    def parts(self, cuts: list[Cut], start: int, stop: int) -> Iterator[Array]:
        """Elements [start, stop) of the standard vector, of what `cut` gave for them, in arrays one after the other."""
        for name, row, block in cuts:
            width, offset, rows = math.prod(self.tensors[name].shape[1:]), self.tensors[name].start, block.shape[-2]
            some = max(1, PART // width)
            for first in range(0, rows, some):
                at = offset + (row + first) * width  # where these rows begin in the standard vector
                here = np.s_[..., first : first + some, :]
                yield self._read(block[here], name).reshape(-1)[max(0, start - at) : stop - at]

    def export(self, vector: Array, start: int, stop: int) -> Array:
        """The same of the flat vector (size,), in one array."""
        return np.concatenate([np.empty(0, vector.dtype), *self.parts(self.cut(vector, start, stop), start, stop)])

    def load(self, vector: Array, start: int, part: Array) -> None:
        """Put elements from `start` on of the standard vector into the flat vector (size,)."""
        for name, first, last in self._overlapping(start, start + len(part)):
            offset, tensor = self.tensors[name].start, self.read(vector, name)
            tensor.reshape(-1)[first - offset : last - offset] = part[first - start : last - start]
            self.write(vector, name, tensor)

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        """Of the tensors that lie one after the other in the standard vector, as compression sees them: biases one by one."""
        shapes: list[tuple[int, ...]] = []
        for name, tensor in self.tensors.items():
            shapes += (
                [tensor.shape[1:]] * tensor.shape[0] if name.endswith(".bias") and len(tensor.shape) > 1 else [tensor.shape]
            )
        return shapes

    def pack(self, vector: Array) -> Array:
        """The standard vector (parameters,) of the flat vector (size,)."""
        return self.export(vector, 0, self.parameters)

    def unpack(self, standard: Array, vector: Array) -> None:
        """Put all of the standard vector into the flat vector (size,)."""
        self.load(vector, 0, standard)

    def _overlapping(self, start: int, stop: int) -> Iterator[tuple[str, int, int]]:
        for name, tensor in self.tensors.items():
            first, last = max(start, tensor.start), min(stop, tensor.stop)
            if first < last:
                yield name, first, last

    def _block(self, vector: Array, name: str) -> Array:
        extent = self.blocks[self._where[name][0]]
        return vector[extent.start : extent.stop].reshape(extent.shape)

    def _read(self, block: Array, name: str) -> Array:
        """Rows of the tensor `name` from as many rows of its block."""
        tensor = np.empty((block.shape[-2], *self.tensors[name].shape[1:]), block.dtype)
        for piece, place in self._pieces(block, name):
            tensor[place] = piece
        return tensor

    def _pieces(self, block: Array, name: str) -> Iterator[tuple[Array, Any]]:
        """(view of a block, or of some of its rows, its place in the tensor) for all that the tensor consists of."""
        (_, kind, H), R = self._where[name], self.R
        if kind == "whole":
            yield block, np.s_[:]
        elif kind == "last column":
            yield block[H // R, :, H % R], np.s_[:]
        else:
            gates = 4 if kind == "gates" else 1
            for first in range(0, H, R):
                columns = min(R, H - first)
                for gate in range(gates):
                    place = gate * H + first
                    yield block[gates * (first // R) + gate, :, :columns], np.s_[:, place : place + columns]

    def weights(self) -> dict[str, int]:
        """Numbers in matrices of products, by the part of the model, the first word of a name; what GFLOP/s are counted by.

        A table that is looked up is none of them; a tied one is that of the output.
        """
        found: dict[str, int] = {}
        for name, tensor in self.tensors.items():
            part = name.partition(".")[0]
            if len(tensor.shape) == 2 and not name.endswith("bias") and (part != "embedding" or self.config.tied):
                part = "output" if part == "embedding" else part
                found[part] = found.get(part, 0) + math.prod(tensor.shape)
        return found
