r"""Compressors: what a vector looks like on the wire. A payload is the bytes that MPI sends, with nothing around them.

    name       payload                                                      bytes, of P values of w bytes
    none       the values                                                   w P
    bf16       bfloat16                                                     2 P
    qsgd       int8 and a float32 norm for each 2048 values                 P + P/512
    sign       a bit a value and a float32 mean magnitude for each tensor   P/8
    top-k      k values and their indices, int32                            (w + 4) k,   k = fraction P
    random-k   k values and the step, from which the indices follow         w k + 8

rounded up to whole 8 bytes, so that payloads may lie one behind the other. The formulas stand in kernels/compress.py.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar, TypeAlias

import numpy as np

from ..errors import UserError
from ..kernels import compress
from ..kernels.types import Array, Bytes, DType

Dtype: TypeAlias = np.dtype[Any]


def make_compressor(
    name: str, shapes: Sequence[tuple[int, ...]], dtype: DType, fraction: float = 0.01, seed: int = 1, feedback: bool = False
) -> Compressor:
    """A Compressor.

    Parameters
    ----------
    name : str
        One of NAMES.
    shapes : list of tuples
        The tensors that lie one after the other in the vector (P,).
    dtype : float32 or float64
    fraction : float
        Of the values, how many top-k and random-k send.
    seed : int
        The same on all ranks; qsgd rounds by (seed, step, rank, position), random-k chooses by (seed, step).
    feedback : bool
        For use with a memory of errors: random-k sends the values as they are, which is biased but a contraction.

    Raises UserError.
    """
    if name not in KINDS:
        raise UserError(f"there is no compression called {name!r}; there are {', '.join(NAMES)}")
    if not 0 < fraction <= 1:
        raise UserError(f"the fraction of values that compression sends must be above 0 and at most 1, not {fraction}")
    sizes = [math.prod(shape) for shape in shapes]
    if sum(sizes) >= 2**31:
        raise UserError(f"compression counts values in 31 bits, and this model has {sum(sizes):,}")
    return KINDS[name](sizes, np.dtype(dtype), fraction, seed, feedback)


class Compressor(ABC):
    """Encodes a vector into a payload, and a payload into the same values on every rank.

    Parameters
    ----------
    sizes : list of int
        Of the tensors that lie one after the other in the vector (P,).
    dtype : numpy.dtype
        Of the vector.
    fraction, seed, feedback
        As in `make_compressor`.

    Attributes
    ----------
    name : str
    parameters : int
        P.
    size : int
        Bytes of a payload.
    unbiased : bool
        Whether E[decoded] = x, so that errors average out without being remembered.
    contraction : float
        c of E|decoded - x|^2 <= (1 - c) |x|^2 for the worst x; error feedback needs c > 0.
    """

    name: ClassVar[str]
    unbiased: bool = True
    contraction: float

    def __init__(self, sizes: list[int], dtype: Dtype, fraction: float, seed: int, feedback: bool) -> None:
        self.sizes, self.parameters, self.dtype, self.seed = sizes, sum(sizes), dtype, seed
        self.fields: list[tuple[slice, DType]] = []
        start = 0
        for kind, length in self._layout():
            stop = start + np.dtype(kind).itemsize * length
            self.fields.append((slice(start, stop), kind))
            start = stop
        self.used, self.size = start, -(-start // 8) * 8

    def encode(self, vector: Array, payload: Bytes, step: int, rank: int) -> None:
        """payload (size,) uint8 = vector (P,) in short, which stays what it is."""
        payload[self.used :] = 0
        self._encode(vector, self._views(payload), step, rank)

    def decode(self, payload: Bytes, out: Array) -> None:
        """out (P,) = what the receiver makes of it."""
        self._decode(out, self._views(payload), 1.0, False)

    def add(self, payload: Bytes, out: Array, weight: float = 1.0) -> None:
        """out (P,) += weight times what the receiver makes of it."""
        self._decode(out, self._views(payload), float(weight), True)

    def _views(self, payload: Bytes) -> list[Array]:
        return [payload[part].view(kind) for part, kind in self.fields]

    @abstractmethod
    def _layout(self) -> list[tuple[DType, int]]:
        """dtype and length of the arrays of a payload, wide ones first, so that all are aligned."""

    @abstractmethod
    def _encode(self, vector: Array, fields: list[Array], step: int, rank: int) -> None:
        """Fill the arrays of a payload."""

    @abstractmethod
    def _decode(self, out: Array, fields: list[Array], weight: float, add: bool) -> None:
        """out (P,) = weight times what the arrays of a payload say, or += it where `add`."""


class Dense(Compressor):
    """All values as they are."""

    name, contraction = "none", 1.0

    def _layout(self) -> list[tuple[DType, int]]:
        return [(self.dtype, self.parameters)]

    def _encode(self, vector: Array, fields: list[Array], step: int, rank: int) -> None:
        (values,) = fields
        values[:] = vector

    def _decode(self, out: Array, fields: list[Array], weight: float, add: bool) -> None:
        (values,) = fields
        compress.add_values(out, values, weight, add)


class BFloat16(Compressor):
    """All values in half the bytes of float32, with its range and 8 significant bits."""

    name, unbiased, contraction = "bf16", False, 1 - 2.0**-16

    def _layout(self) -> list[tuple[DType, int]]:
        return [(np.uint16, self.parameters)]

    def _encode(self, vector: Array, fields: list[Array], step: int, rank: int) -> None:
        (halves,) = fields
        compress.round_bf16(halves, vector)

    def _decode(self, out: Array, fields: list[Array], weight: float, add: bool) -> None:
        (halves,) = fields
        compress.widen_bf16(out, halves, weight, add)


class QSGD(Compressor):
    """Whole levels between plus and minus the largest magnitude of a block, rounded at random (Alistarh et al. 2017)."""

    name = "qsgd"
    contraction = 1 - compress.BLOCK / (2 * compress.LEVELS) ** 2  # rounding has a variance of at most a quarter of a level^2

    def _layout(self) -> list[tuple[DType, int]]:
        return [(np.float32, -(-self.parameters // compress.BLOCK)), (np.int8, self.parameters)]

    def _encode(self, vector: Array, fields: list[Array], step: int, rank: int) -> None:
        norms, q = fields
        compress.quantise(q, norms, vector, self.seed, step, rank)

    def _decode(self, out: Array, fields: list[Array], weight: float, add: bool) -> None:
        norms, q = fields
        compress.dequantise(out, q, norms, weight, add)


class Sign(Compressor):
    """Signs, times the mean magnitude of their tensor (Bernstein et al. 2018, with the scale of Karimireddy et al. 2019)."""

    name, unbiased = "sign", False

    def __init__(self, sizes: list[int], dtype: Dtype, fraction: float, seed: int, feedback: bool) -> None:
        super().__init__(sizes, dtype, fraction, seed, feedback)
        ends = np.cumsum(sizes, dtype=np.int64).tolist()
        self.tensors = [slice(end - size, end) for size, end in zip(sizes, ends, strict=True)]
        self.contraction = 1 / max([1, *sizes])  # of a tensor with one value that is not zero

    def _layout(self) -> list[tuple[DType, int]]:
        return [(np.float32, len(self.sizes)), (np.uint8, -(-self.parameters // 8))]

    def _encode(self, vector: Array, fields: list[Array], step: int, rank: int) -> None:
        scales, bits = fields
        compress.pack_signs(bits, vector)
        for n, tensor in enumerate(self.tensors):
            scales[n] = compress.sum_of_magnitudes(vector[tensor]) / max(1, tensor.stop - tensor.start)

    def _decode(self, out: Array, fields: list[Array], weight: float, add: bool) -> None:
        scales, bits = fields
        kernel = compress.add_signs if add else compress.unpack_signs
        for scale, tensor in zip(scales, self.tensors, strict=True):
            kernel(out[tensor], bits, weight * float(scale), tensor.start)


class Sparse(Compressor):
    """Some values, k of P, and zero for the others."""

    def __init__(self, sizes: list[int], dtype: Dtype, fraction: float, seed: int, feedback: bool) -> None:
        P = sum(sizes)
        self.k = min(P, max(1, round(fraction * P)))
        self.share = self.k / P if P else 1.0
        super().__init__(sizes, dtype, fraction, seed, feedback)

    def _scatter(self, out: Array, indices: Array, values: Array, weight: float, add: bool) -> None:
        if not add:
            out[:] = 0
        compress.scatter_add(out, indices, values, weight)


class TopK(Sparse):
    """The largest magnitudes; of equal ones the first (Stich et al. 2018)."""

    name, unbiased = "top-k", False

    def __init__(self, sizes: list[int], dtype: Dtype, fraction: float, seed: int, feedback: bool) -> None:
        super().__init__(sizes, dtype, fraction, seed, feedback)
        self.contraction, self.words = self.share, np.dtype(f"u{dtype.itemsize}")
        self.counts = np.empty(1 << compress.DIGIT, np.int64)

    def _layout(self) -> list[tuple[DType, int]]:
        return [(self.dtype, self.k), (np.int32, self.k)]

    def _encode(self, vector: Array, fields: list[Array], step: int, rank: int) -> None:
        values, indices = fields
        compress.select_largest(indices, values, vector, vector.view(self.words), self.counts)

    def _decode(self, out: Array, fields: list[Array], weight: float, add: bool) -> None:
        values, indices = fields
        self._scatter(out, indices, values, weight, add)


class RandomK(Sparse):
    """Values at random places, the same on every rank, times P / k, which makes them unbiased; with feedback as they are."""

    name = "random-k"

    def __init__(self, sizes: list[int], dtype: Dtype, fraction: float, seed: int, feedback: bool) -> None:
        super().__init__(sizes, dtype, fraction, seed, feedback)
        self.unbiased = not feedback
        self.scale = 1.0 if feedback else 1 / self.share
        self.contraction = self.share if feedback else 2 - 1 / self.share
        self.indices = np.empty(self.k, np.int32)
        self.step: int | None = None  # that they are for

    def _layout(self) -> list[tuple[DType, int]]:
        return [(np.int64, 1), (self.dtype, self.k)]

    def _encode(self, vector: Array, fields: list[Array], step: int, rank: int) -> None:
        steps, values = fields
        steps[0] = step
        compress.gather(values, self._places(step), vector, self.scale)

    def _decode(self, out: Array, fields: list[Array], weight: float, add: bool) -> None:
        steps, values = fields
        self._scatter(out, self._places(int(steps[0])), values, weight, add)

    def _places(self, step: int) -> Array:
        """Computed once a step, however many ranks send."""
        if step != self.step:
            compress.random_indices(self.indices, self.parameters, self.seed, step)
            self.step = step
        return self.indices


KINDS: dict[str, type[Compressor]] = {kind.name: kind for kind in (TopK, RandomK, Sign, QSGD, BFloat16, Dense)}
NAMES = tuple(KINDS)
LOSSY = tuple(name for name in NAMES if name != "none")


class ErrorFeedback:
    """What was not sent is remembered and added to the next vector (Stich et al. 2018, Karimireddy et al. 2019).

        p = x + e;   send C(p);   e = p - C(p):   all that was sent, plus e, is all that was to be sent

    `memory` (P,) is e, for checkpoints to hold. A vector that is not finite is encoded without it and leaves it alone.
    Where a step is left out by all ranks, `compressor.add(payload, memory)` takes back what was sent for nothing.
    """

    def __init__(self, compressor: Compressor) -> None:
        if compressor.contraction <= 0:
            raise ValueError(f"errors of {compressor.name} would grow from step to step; make it with feedback=True")
        self.compressor = compressor
        self.memory = np.zeros(compressor.parameters, compressor.dtype)

    def encode(self, vector: Array, payload: Bytes, step: int, rank: int) -> None:
        """payload (size,) uint8 = vector (P,) and what was left of those before."""
        if not np.isfinite(compress.sum_of_magnitudes(vector)):
            self.compressor.encode(vector, payload, step, rank)
            return
        self.memory += vector
        self.compressor.encode(self.memory, payload, step, rank)
        self.compressor.add(payload, self.memory, -1.0)


def warm_up(name: str, dtype: DType) -> None:
    """Run the kernels of an `averaging.compression` once: all are compiled then, or loaded from the cache."""
    if name == "signum":
        compress.warm_up_signs(dtype)
    if name not in NAMES:  # powersgd has none
        return
    compressor = make_compressor(name, [(8,)], dtype, 1.0, feedback=True)
    vector, payload = np.zeros(8, dtype), np.zeros(compressor.size, np.uint8)
    ErrorFeedback(compressor).encode(vector, payload, 0, 0)
    compressor.decode(payload, vector)
    compressor.add(payload, vector)
