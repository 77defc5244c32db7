"""Attention of a decoder's states to the memory of a source, as a layer (Luong et al. 2015; kernels/attention.py)."""

from __future__ import annotations

from collections.abc import Mapping

from ..kernels.attention import attend, attend_backward
from ..kernels.operands import Weight
from ..kernels.types import Array
from .layers import Dense, Layer, Plan


class Attention(Layer):
    """c = softmax(h k^T) m, with keys k = m Wk, or with m itself.

    Attributes
    ----------
    weights : (B,T,S) array
        The attention of the last forward; zeros behind a lane's length.
    """

    weights: Array

    def __init__(self, plan: Plan, columns: int, units: int, general: bool) -> None:
        """columns, units : of m, and of h."""
        self._plan, self._operands = plan, plan.operands
        self._dense = Dense(plan, "keys") if general else None
        self._keys = plan.panels(units) if general else None
        if plan.training:
            self._dkeys = plan.panels(units)

    def bind(self, parameters: Mapping[str, Array], factors: Mapping[str, Weight]) -> None:
        if self._dense:
            self._dense.bind(parameters, factors)

    def bind_gradients(self, gradients: Mapping[str, Array]) -> None:
        if self._dense:
            self._dense.bind_gradients(gradients)

    def keys(self, m: Array, rows: int) -> Array:
        """k (H/R,rows,R) of as many rows of m."""
        if self._dense is None or self._keys is None:
            return m
        self._dense.forward(self._keys, m, 0, rows)
        return self._keys

    def forward(self, c: Array, h: Array, row: int, m: Array, lengths: Array, S: int, T: int) -> None:
        """c (M/R,TB,R) of h (H/R,:,R), from `row` on, and m (M/R,SB,R), of whose lanes `lengths` (B,) steps count."""
        self._read, B = (h, row, m, lengths, S, T), len(lengths)
        self.weights = self._operands.empty("attention", (B, T, S), self._plan.layout.dtype)
        self._k = self.keys(m, S * B)
        attend(c, self.weights, h, row, self._k, m, lengths, S, T, B, self._operands.team)

    def backward(self, dh: Array, dm: Array, dc: Array, copied: Array | None = None) -> None:
        """The gradients of h and of m, which are written over. copied (B,T,S) : gradient of `weights` from elsewhere"""
        h, row, m, lengths, S, T = self._read
        B, operands = len(lengths), self._operands
        scratch = operands.empty("attention's gradient", (B, T, S), self._plan.layout.dtype) if copied is None else copied
        attend_backward(
            dh, self._dkeys, dm, self.weights, scratch, dc, h, row, self._k, m, lengths, S, T, B, operands.team,
            copied is not None,
        )  # fmt: skip
        if self._dense is None:
            dm[:, : S * B] += self._dkeys[:, : S * B]
        else:
            self._dense.backward(dm, self._dkeys, m, 0, S * B, add=True)
