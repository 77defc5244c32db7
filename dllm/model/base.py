"""What all kinds of models share: a flat vector of parameters and one of gradients, and how these become ready in order.

A kind is a class that wires layers (layers.py) in `forward` and `backward`; kinds.py has their table. No MPI and no files.
"""

from __future__ import annotations

import math
import os
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import numpy as np

from ..errors import UserError
from ..kernels.dropout import dropout
from ..kernels.gemm import aligned
from ..kernels.operands import Operands
from ..kernels.team import Team
from ..kernels.types import Array
from . import blocks
from .batch import Batch
from .factors import Factors
from .inheriting import stages
from .layers import Layer, Plan
from .layout import Extent, Layout

Mask: TypeAlias = tuple[int, int, Array]  # seed, step, lanes (B,) int64: what names dropout masks
Ready: TypeAlias = Callable[[slice], object]
Between: TypeAlias = Callable[[], object]


class Learning(NamedTuple):
    """How a model learns, beyond following the gradient of its losses."""

    smoothing: float = 0.0  # the part of a target that all classes share alike; the losses are without it
    unfreeze: int = 0  # not 0: so many steps only what is above all layers learns, then a layer more each time


PLAIN = Learning()


class Model(ABC):
    """One rank's model over windows of at most T steps and B lanes.

    Parameters
    ----------
    layout : Layout
        Of the parameters; names the model's shape, its vocabulary V and its dtype.
    window, lanes : int
        T and B.
    theta : (size,) array, optional
        The parameters; see `bind`.
    training : bool
        False: no gradients and one layer's activations only.
    bf16 : bool
        Products of bfloat16, with float32 for all else.
    team : kernels.team.Team, optional
        Threads that share the work.
    learning : Learning, optional
        What else there is to how it learns.

    Attributes
    ----------
    layers : list of Layer
        Whoever has parameters, to be bound.
    memory : int
        Bytes that it takes beside its parameters; not of one that is trained.
    """

    theta: Array
    factors: Factors
    memory: int

    def __init__(
        self,
        layout: Layout,
        window: int,
        lanes: int,
        *,
        theta: Array | None = None,
        training: bool = True,
        bf16: bool = False,
        team: Team | None = None,
        learning: Learning = PLAIN,
    ) -> None:
        self.layout, self.window, self.lanes, self.training = layout, window, lanes, training
        self.config, self.vocabulary, self.dtype = layout.config, layout.vocabulary, layout.dtype
        self.operands, self.learning = Operands(self.dtype, bf16, team), learning
        self._mask: Mask | None = None
        self._weights = layout.weights()
        self._stages = stages(layout) if learning.unfreeze else {}
        self._frozen: list[Extent] = []  # what of the gradient is zero
        self._final = 0  # elements of the gradient that the backward has finished
        self._on_ready: Ready | None = None
        self.layers: list[Layer] = []
        plan = Plan(layout, self.operands, window * lanes, training)
        if not training:
            self._check_memory(plan)
        self._make(plan)
        if training:
            self.bind_gradient(aligned((layout.size,), self.dtype))
        if theta is not None:
            self.bind(theta)

    def _check_memory(self, plan: Plan) -> None:
        """Raise UserError where a model for inference, with the states of its lanes, takes more than this machine's memory."""
        taken: list[int] = []
        self._make(plan._replace(operands=Operands(self.dtype, False), taken=taken))  # counted, not made
        states = 2 * self.layout.carried * self.lanes * self.config.hidden * self.dtype.itemsize
        self.memory = sum(taken) + states
        there = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        if self.memory > there:
            raise UserError(
                f"windows of {self.window:,} {blocks.units(self.config).read} in {self.lanes:,} lanes take "
                f"{self.memory >> 20:,} MB; this machine's memory has {there >> 20:,}"
            )

    @abstractmethod
    def _make(self, plan: Plan) -> None:
        """Make the layers, and memory for what is between them."""

    @abstractmethod
    def forward(
        self, batch: Batch, h: Array, c: Array, scale: float = 0.0, mask: Mask | None = None, between: Between | None = None
    ) -> Array:
        """Losses of a window; when training, the output layer's gradients too, since they need the logits.

        Parameters
        ----------
        batch : Batch
        h, c : (layout.carried,B,H), in and out
            The state before and after the window.
        scale : float
            Factor on every gradient.
        mask : Mask, optional
            Names the dropout masks; None: no dropout.
        between : callable, optional
            Called now and then.

        Returns
        -------
        (T,B) losses in nats, valid until the next call.
        """

    @abstractmethod
    def _backward(self, between: Between | None) -> None:
        """Fill the gradients; `_ready` is called with the name of each block, or the last one of some, in order."""

    @abstractmethod
    def example(self) -> Batch:
        """Zeros of one lane that such a model takes, two steps of which one has no target; they reach every kernel."""

    @abstractmethod
    def _multiplied(self, batch: Batch) -> dict[str, int]:
        """Rows of a batch that weights are multiplied with, by the part of the model, as `Layout.weights` names them."""

    def flops(self, batch: Batch) -> int:
        """Operations of products with weights in a step of a batch: 2 a weight and row in the forward, 4 in the backward."""
        rows = self._multiplied(batch)
        return 6 * sum(count * rows[part] for part, count in self._weights.items())

    def backward(self, on_ready: Ready | None = None, between: Between | None = None) -> None:
        """The rest of the gradient of the last `forward`, into `self.gradient` (size,).

        on_ready(slice) is called as soon as a slice is final, in order, without gaps. Every tensor is overwritten, but
        for embedding rows: they are added to where embedding and output are not tied, and the caller zeroes those it used.
        """
        self._final, self._on_ready = 0, on_ready
        self._backward(between)

    def _ready(self, name: str) -> None:
        """The gradient of block `name` is final, and so are all before it."""
        start, self._final = self._final, self.layout.blocks[name].stop
        for block in self._frozen:
            if start <= block.start < self._final:
                self.gradient[block.start : block.stop] = 0
        if self._on_ready is not None and self._final > start:
            self._on_ready(slice(start, self._final))

    def bind_gradient(self, gradient: Array) -> None:
        """Let the gradients lie in the flat vector (size,), which is zeros."""
        self.gradient = gradient
        gradients = self.layout.arrays(gradient)
        for layer in self.layers:
            layer.bind_gradients(gradients)

    def bind(self, theta: Array, written: bool = False) -> None:
        """Use the flat vector theta (size,) as parameters from now on; it is not copied.

        written: since an optimiser that knew `factors` wrote it, nobody has changed it.
        """
        self.theta = theta
        if hasattr(self, "factors"):
            self.factors.bind(theta, written)
        else:
            self.factors = Factors(self.layout, self.operands, theta)
        parameters = self.layout.arrays(theta)
        for layer in self.layers:
            layer.bind(parameters, self.factors.weights)

    def initialise(self, seed: int) -> None:
        """Fill theta: uniform(+-a) as the config says; every rank gets the same values, in float32 those of float64 rounded."""
        config = self.config
        ranges = {"output.weight": config.init_output, "output.bias": config.init_output_bias}
        if config.embedding:
            ranges["embedding.weight"] = config.init_output
        for number, (name, extent) in enumerate(self.layout.tensors.items()):
            bound = ranges.get(name, config.init or 1 / math.sqrt(config.hidden))
            generator = np.random.Generator(np.random.Philox(key=[seed, number]))
            tensor = np.empty(extent.shape, self.dtype)
            flat = tensor.reshape(-1)
            for start in range(0, flat.size, 1 << 20):
                part = flat[start : start + (1 << 20)]
                part[:] = generator.uniform(-bound, bound, part.size)
            if name.endswith(".bias") and name != "output.bias" and config.forget_bias:
                tensor[0, config.hidden : 2 * config.hidden] = config.forget_bias
            self.layout.write(self.theta, name, tensor)

    def _take_mask(self, mask: Mask | None) -> None:
        self._mask = mask if self.config.dropout else None
        if self._stages and mask is not None:
            stage = mask[1] // self.learning.unfreeze
            self._frozen = [self.layout.blocks[name] for name, begins in self._stages.items() if begins > stage]

    def _drop(self, out: Array, x: Array, row: int, steps: int, place: int) -> None:
        """Dropout number `place` of this model, of `steps` time steps of x from `row` on."""
        if self._mask is not None:
            seed, step, lanes = self._mask
            arguments = self.config.dropout, lanes, seed, step, place
            self.operands.team.share(lambda first, last: dropout(out, x, row, first, last, *arguments), steps)
