"""Layers that read a whole input, in one direction or in both side by side (Schuster and Paliwal 1997)."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from ..kernels.operands import Operands, Weight
from ..kernels.reverse import reverse_rows
from ..kernels.team import Team
from ..kernels.types import Array
from . import blocks
from .layers import Layer, Lstm, Plan, stack


class Encoder(Layer):
    """Layers that read a whole input, in one direction or in both side by side.

    Backwards a lane is read from its own last step, so that what fills up a window stays behind it in both directions: row
    (t, n) goes to (lengths[n] - 1 - t, n), and back the same way. So states never see it.
    """

    def __init__(self, plan: Plan, layers: int, lanes: int) -> None:
        config = plan.layout.config
        self.directions, H, R = blocks.directions(config), config.hidden, plan.layout.R
        self.columns, self._P = blocks.memory(config), -(-H // R)
        inputs = config.features or config.embedding
        both, team = len(self.directions) == 2, plan.operands.team
        self._pair = Team(2) if both and team.size > 1 else None  # a direction each, with their share of the threads
        teams = [Team(team.size - team.size // 2), Team(team.size // 2)] if self._pair else [team] * 2
        by_way = []
        for way, part in zip(self.directions, teams, strict=False):
            own = plan._replace(operands=Operands(plan.layout.dtype, plan.operands.bf16, part))
            by_way.append(stack(own, [f"encoder.{layer}.{way}" for layer in range(layers)], lanes))
        self.layers = [list(layer) for layer in zip(*by_way, strict=True)]
        copies = layers if plan.training else min(layers, 2)
        self._out = [plan.panels(self.columns) for _ in range(copies)]
        widest = max(inputs, self.columns if layers > 1 else 0)
        self._turned = [plan.panels(widest) for _ in range(copies)] if both else []
        if plan.training:
            self._dx, self._dx_turned = plan.panels(widest), plan.panels(widest if both else 1)
            self._dh = plan.panels(H if both else 1)

    def bind(self, parameters: Mapping[str, Array], factors: Mapping[str, Weight]) -> None:
        for layer in self.layers:
            for one in layer:
                one.bind(parameters, factors)

    def bind_gradients(self, gradients: Mapping[str, Array]) -> None:
        for layer in self.layers:
            for one in layer:
                one.bind_gradients(gradients)

    def forward(
        self,
        x: Array,
        lengths: Array,
        S: int,
        B: int,
        drop: Callable[[Array, int], None],
        between: Callable[[], object] | None = None,
    ) -> Array:
        """The top layer's output (columns/R,SB,R) of x (D/R,:,R); drop(array, l) is called with what layer l has given."""
        self._inputs: list[Array] = []
        for number, layer in enumerate(self.layers):
            out = self._out[number % len(self._out)]
            self._inputs.append(x)

            def read(part: int, layer: list[Lstm] = layer, number: int = number, x: Array = x, out: Array = out) -> None:
                memory, here = layer[part].memory, out[part * self._P : (part + 1) * self._P]
                memory.h[:, :B], memory.c[:, :B] = 0, 0
                if part:
                    turned = self._turned[number % len(self._turned)][: len(x)]
                    reverse_rows(turned, 0, x, 0, lengths, S, B, False)
                    layer[part].forward(turned, 0, S, B)
                    reverse_rows(here, 0, memory.h, B, lengths, S, B, False)
                else:
                    layer[part].forward(x, 0, S, B)
                    here[:, : S * B] = memory.h[:, B : (S + 1) * B]

            self._in_each_direction(read)
            if between is not None:
                between()
            drop(out, number)
            x = out
        return x

    def _in_each_direction(self, work: Callable[[int], object]) -> None:
        if self._pair is not None:
            self._pair.run(work)
        else:
            for part in range(len(self.directions)):
                work(part)

    def backward(
        self,
        dm: Array,
        lengths: Array,
        S: int,
        B: int,
        drop: Callable[[Array, int], None],
        ready: Callable[[str], None],
        between: Callable[[], object] | None = None,
    ) -> Array:
        """The gradient of x (D/R,SB,R) from that of the top layer's output, which is written over. drop as in the forward."""
        for number in reversed(range(len(self.layers))):
            drop(dm, number)
            layer, x, dx = self.layers[number], self._inputs[number], self._dx[: len(self._inputs[number])]

            def go_back(part: int, layer: list[Lstm] = layer, number: int = number, x: Array = x, dx: Array = dx) -> None:
                dh = dm[part * self._P : (part + 1) * self._P]
                if part:
                    reverse_rows(self._dh, 0, dh, 0, lengths, S, B, False)
                    turned, there = self._turned[number][: len(x)], self._dx_turned[: len(x)]
                    layer[part].backward(there, self._dh, turned, 0, S, B, None if self._pair else between)
                else:
                    layer[part].backward(dx, dh, x, 0, S, B, between)

            self._in_each_direction(go_back)
            if len(layer) == 2:
                reverse_rows(dx, 0, self._dx_turned[: len(x)], 0, lengths, S, B, True)
            for one in layer:
                ready(f"{one.name}.b")
            if number:
                dm[:, : S * B] = dx[:, : S * B]
        return dx
