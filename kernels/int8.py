r"""Products of int8: whole numbers inside, float32 outside. For trained models at work; nothing here has a gradient.

Symmetric quantisation (Wu et al. 2020, "Integer quantization for deep learning inference", section 3; a scale for each row of
the left factor and each column of the right one, as Dettmers et al. 2022, "LLM.int8()", have it):

    s = max |x| / 127        q = round(x / s), to nearest even, from -127 to 127        x ~ s q

    out[m,n] = sum_k a[m,k] b[k,n]  ~  s_m s_n sum_k q[m,k] q[k,n]

The sum is one of whole numbers and has no error, so it is the same by any instruction, in any order. A row's result depends on
that row alone. A row with NaN or infinity has s = NaN, and so has its result; one below TINY counts as zeros.

Processors multiply unsigned bytes by signed ones. So the left factor holds q + 128, and 128 sum_k q[k,n], an offset that each
column has once and for all, is taken off each sum.

    words (ceil(K/64),M,16) int32     the left factor: row m of a panel is 64 bytes along k, q + 128; beyond K anything
    quads (ceil(N/16),K',16) int32    the right factor: row k is 16 columns of four bytes, rows 4k to 4k + 3, zeros beyond K;
                                      K' is K / 4, up to a multiple of 16
    sums  (ceil(N/16),M,16) int32

These are Intel's tiles of AMX, too (amx.py): 16 rows of a panel are one kilobyte. K is below 2^17, so that sums fit.

In the recurrence h is between -1 and 1, so its scale is 1 / 127, and no thread waits for the largest unit of another. In
trained models some unit of each row comes near 1 anyway. Perplexities with max |h| / 127 were the same to 0.001 %: of a short
run of the default preset 81.775 both (fp32 81.772), of wlm-200 within its first epoch 221.999 and 222.001 (fp32 222.008).
"""

from typing import NamedTuple, no_type_check

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic, overload

from .amx import multiply_by_tiles, release_tiles
from .compile import OPTIONS, kernel
from .gemm import aligned, multiply_by_vectors
from .lstm import cell_forward
from .processor import AMX_INT8, VNNI
from .team import meet, share_in_pairs
from .tiles import ROW
from .types import Array
from .vectors import FLOATS, load, splat, store

HOW = "AMX tiles" if AMX_INT8 else "AVX512_VNNI" if VNNI else ""  # what multiplies here; "": nothing does
LEVELS = 127
TINY = 1e-30  # where 127 / max |x| is far from the end of float32
QUADS = 64  # columns of a panel of words, and rows of the span that quads are padded to
PANELS, HEIGHT = 4, 224  # of sums that are there at a time: panels of columns, and rows

_I8, _I32, _I64 = ir.IntType(8), ir.IntType(32), ir.IntType(64)
_INTS, _BYTES = ir.VectorType(_I32, 16), ir.VectorType(_I8, 16)
_AS_WRITTEN = ("nsz",)  # for LLVM: instructions that have a flag do not get those of compile.py, by which sums are reordered


class Left(NamedTuple):
    """The left factor."""

    words: Array  # (ceil(K/64),M,16) int32
    scales: Array  # (M,) float32


class Right(NamedTuple):
    """The right factor."""

    quads: Array  # (N/16,K',16) int32
    scales: Array  # (N/16,16) float32
    offsets: Array  # (N/16,16) int32
    depth: int  # words along k that count, K / 4


def quantised_columns(x: Array, K: int) -> Right:
    """The first K rows of x (N/16,:,16) float32 as the right factor."""
    P, R = len(x), x.shape[2]
    spans = -(-K // QUADS)
    right = Right(aligned((P, spans * 16, R), np.int32), np.zeros((P, R), np.float32), np.zeros((P, R), np.int32), -(-K // 4))
    for panel, block in enumerate(x[:, :K]):
        largest = np.abs(block).max(axis=0)
        usable = (largest >= TINY) & np.isfinite(largest)
        factor = LEVELS / np.where(usable, largest, np.float32(1))
        q = np.zeros((spans * QUADS, R), np.int8)
        q[:K] = np.rint(np.where(usable, block, 0) * factor.astype(np.float64))
        right.quads[panel] = np.ascontiguousarray(q.reshape(-1, 4, R).transpose(0, 2, 1)).view(np.int32)[..., 0]
        right.scales[panel] = np.where(np.isfinite(largest), largest * np.float32(1 / LEVELS), np.nan)
        right.offsets[panel] = 128 * q.sum(axis=0, dtype=np.int32)
    return right


@kernel
def quantise_rows(left: Left, row: int, x: Array, x_row: int, rows: int) -> None:
    """Rows of left from `row` on = rows of x (K/16,:,16) float32 from x_row on."""
    for m in range(rows):
        source = x.ctypes.data + (x_row + m) * ROW
        target = left.words.ctypes.data + (row + m) * ROW
        largest = largest_of_row(source, x.strides[0], x.shape[0])
        left.scales[row + m] = quantise_row(target, left.words.strides[0], source, x.strides[0], 0, x.shape[0], largest)


@kernel
def multiply(out: Array, out_row: int, left: Left, row: int, right: Right, panel: int, sums: Array, M: int, add: bool) -> None:
    """out = a @ b, or out += a @ b where `add`: M rows of out (P,:,16) float32, from out_row on, and of left, from `row` on.

    The columns are those of P panels of right, from `panel` on. sums (PANELS,HEIGHT,16) int32 is scratch.
    """
    multiply_on(0, out, out_row, left, row, right, panel, sums, M, add)
    leave_tiles()


@kernel
def multiply_on(
    current: int, out: Array, out_row: int, left: Left, row: int, right: Right, panel: int, sums: Array, M: int, add: bool
) -> int:
    """`multiply` in a loop of products, as gemm.multiply_on has it. Returns the next `current`."""
    for start in range(0, M, HEIGHT):
        height = min(HEIGHT, M - start)
        for first in range(0, out.shape[0], PANELS):
            count = min(PANELS, out.shape[0] - first)
            quads = right.quads[panel + first : panel + first + count]
            current = add_up(current, sums[:count], left.words, row + start, quads, height, right.depth)
            for p in range(count):
                column = (panel + first + p) * ROW
                source = sums.ctypes.data + p * sums.strides[0]
                target = out.ctypes.data + (first + p) * out.strides[0] + (out_row + start) * ROW
                for m in range(height):
                    dequantise_row(
                        add, target + m * ROW, source + m * ROW, right.offsets.ctypes.data + column,
                        right.scales.ctypes.data + column, left.scales[row + start + m],
                    )  # fmt: skip
    return current


def add_up(current: int, sums: Array, words: Array, row: int, quads: Array, M: int, depth: int) -> int:
    """sums (P,:,16) = M rows of words, from `row` on, times quads (P,:,16). Returns the next `current`."""
    raise NotImplementedError("for kernels only")


@overload(add_up, jit_options=OPTIONS)
@no_type_check
def _add_up(current, sums, words, row, quads, M, depth):
    def by_tiles(current, sums, words, row, quads, M, depth):
        return multiply_by_tiles(current, sums, 0, words, row, quads, M, depth, False)

    def by_vectors(current, sums, words, row, quads, M, depth):
        multiply_by_vectors(sums, 0, words, row, quads, M, depth, False)
        return current

    return by_tiles if AMX_INT8 else by_vectors


def leave_tiles() -> None:
    """The end of a loop of products."""


@overload(leave_tiles, jit_options=OPTIONS)
@no_type_check
def _leave_tiles():
    return (lambda: release_tiles()) if AMX_INT8 else (lambda: None)


@kernel
def forward_steps(
    h: Array,
    c: Array,
    gates: Array,
    left: Left,
    Wh: Right,
    sums: Array,
    b: Array,
    T: int,
    B: int,
    barrier: Array,
    threads: int,
    part: int,
) -> None:
    """The recurrence of lstm.py, of one thread's share of the units: gates holds x @ Wx.

    left has the rows of h, and is kept up with it. sums (threads,PANELS,HEIGHT,16) int32 is scratch. The units are taken to and
    fro, as there.
    """
    first, last = share_in_pairs(h.shape[0], threads, part)
    keep_left(left, h, 0, B, first, last)
    current = 0
    for t in range(T):
        meet(barrier, threads, t + 1)
        for n in range(first, last):
            u = n if t % 2 == 0 else first + last - 1 - n
            block = gates[4 * u : 4 * u + 4]
            current = multiply_on(current, block, t * B, left, t * B, Wh, 4 * u, sums[part], B, True)
            cell_forward(h[u], c[u], block, b[4 * u : 4 * u + 4], t, B)
        keep_left(left, h, (t + 1) * B, B, first, last)
    leave_tiles()


@kernel
def keep_left(left: Left, h: Array, row: int, rows: int, first: int, last: int) -> None:
    """Bring panels of rows of left up to date with those of h.

    NaN is lost here, but stays in its cell, so h has it again; the next product of whole rows spreads it.
    """
    for m in range(row, row + rows):
        source, target = h.ctypes.data + m * ROW, left.words.ctypes.data + m * ROW
        left.scales[m] = quantise_row(target, left.words.strides[0], source, h.strides[0], first, last, np.float32(1))


@intrinsic
@no_type_check
def largest_of_row(typingctx, x, jump, panels):
    """max |x| of a row of `panels` panels at address x, `jump` apart; NaN where one is NaN."""

    def generate(context, builder, signature, arguments):
        x, jump, panels = arguments
        largest = cgutils.alloca_once_value(builder, ir.Constant(_INTS, None))
        magnitude = ir.Constant(_INTS, [0x7FFFFFFF] * 16)  # whose order is that of the numbers: NaN, infinity, the rest
        with cgutils.for_range(builder, panels) as loop:
            bits = load(builder, builder.add(x, builder.mul(jump, loop.index)), 0, _INTS)
            bits, before = builder.and_(bits, magnitude), builder.load(largest)
            builder.store(builder.select(builder.icmp_unsigned(">", bits, before), bits, before), largest)
        reduce = builder.module.declare_intrinsic("llvm.vector.reduce.umax.v16i32", (), ir.FunctionType(_I32, [_INTS]))
        return builder.bitcast(builder.call(reduce, [builder.load(largest)]), ir.FloatType())

    return types.float32(types.int64, types.int64, types.int64), generate


@intrinsic
@no_type_check
def quantise_row(typingctx, words, words_jump, x, jump, first, last, largest):
    """Panels [first, last) of a row at address x become bytes of the row `words`. Returns the scale; `largest` gives it."""

    def generate(context, builder, signature, arguments):
        words, words_jump, x, jump, first, last, largest = arguments
        number = lambda value: ir.Constant(ir.FloatType(), float(np.float32(value)))
        finite = builder.fcmp_ordered("<", largest, number(np.inf))
        usable = builder.and_(finite, builder.fcmp_ordered(">=", largest, number(TINY)))
        factor = builder.select(usable, builder.fdiv(number(LEVELS), largest, flags=_AS_WRITTEN), number(0))
        scale = builder.fmul(largest, number(np.float32(1 / LEVELS)), flags=_AS_WRITTEN)
        # Behind 1.5 * 2^23 no bits are left for fractions, so this rounds, and the lowest byte is q.
        rounding, every = ir.Constant(FLOATS, [1.5 * 2**23] * 16), splat(builder, factor)
        fma = builder.module.declare_intrinsic("llvm.fma.v16f32", (), ir.FunctionType(FLOATS, [FLOATS] * 3))
        with cgutils.for_range(builder, last, start=first) as loop:
            value = load(builder, builder.add(x, builder.mul(jump, loop.index)))
            whole = builder.bitcast(builder.call(fma, [value, every, rounding]), _INTS)
            q = builder.xor(builder.trunc(whole, _BYTES), ir.Constant(_BYTES, [128] * 16))  # q + 128
            panel, quarter = builder.ashr(loop.index, _I64(2)), builder.and_(loop.index, _I64(3))
            place = builder.add(builder.mul(panel, words_jump), builder.mul(quarter, _I64(16)))
            builder.store(q, builder.inttoptr(builder.add(words, place), _BYTES.as_pointer()), align=4)
        return builder.select(finite, scale, number(np.nan))

    return types.float32(*[types.int64] * 6, types.float32), generate


@intrinsic
@no_type_check
def dequantise_row(typingctx, add, out, sums, offsets, scales, scale):
    """16 float32 at `out` = (sums - offsets) (scale scales), added to what is there where `add`. All but scale: addresses."""

    def generate(context, builder, signature, arguments):
        add, out, sums, offsets, scales, scale = arguments
        whole = builder.sub(load(builder, sums, 0, _INTS), load(builder, offsets, 0, _INTS))
        factor = builder.fmul(splat(builder, scale), load(builder, scales), flags=_AS_WRITTEN)
        value = builder.fmul(builder.sitofp(whole, FLOATS), factor, flags=_AS_WRITTEN)
        with builder.if_else(add) as (adding, fresh):
            with adding:
                store(builder, out, 0, builder.fadd(load(builder, out), value, flags=_AS_WRITTEN))
            with fresh:
                store(builder, out, 0, value)
        return context.get_dummy_value()

    return types.void(types.boolean, *[types.int64] * 4, types.float32), generate


def quantised_rows_reference(x: Array) -> tuple[Array, Array]:
    """q (M,K) int64 and s (M,) float32 of x (M,K) float32, by NumPy; rows that are not finite have zeros and NaN."""
    largest = np.abs(x).max(axis=1)
    usable = (largest >= TINY) & np.isfinite(largest)
    factor = np.float32(LEVELS) / np.where(usable, largest, np.float32(1))
    q = np.rint(np.where(usable[:, None], x, 0).astype(np.float64) * factor[:, None])
    return q.astype(np.int64), np.where(np.isfinite(largest), largest * np.float32(1 / LEVELS), np.float32(np.nan))


def multiply_reference(a: Array, b: Array) -> Array:
    """a (M,K) @ b (K,N), both float32, by plain products of whole numbers."""
    (qa, sa), (qb, sb) = quantised_rows_reference(a), quantised_rows_reference(np.ascontiguousarray(b.T))
    return (qa @ qb.T).astype(np.float32) * (sa[:, None] * sb)
