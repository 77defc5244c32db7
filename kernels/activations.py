"""Non-linear functions of rows of 16 float32, and what the LSTM's cell and the softmax do with them in one go.

Written in LLVM's own language, so that a row stays in registers from its products to its results; a function here takes and
gives vectors. In float64 the kernels use the C library's functions, in loops that say the same plainly.

- exp(x) = 2^n e^r, n = round(x / ln 2), r = x - n ln 2 in two parts (Cody and Waite 1980), e^r a polynomial of degree 6.
  Relative error at most 2e-7; what is beyond float32 becomes zero or infinity, or stays at e^-87 and e^88 without AVX-512.
- tanh(x) = x P(x^2) / Q(x^2), degrees 13 / 6 (the coefficients of Eigen's `ptanh_float`), constant beyond |x| = 7.9.
  Absolute error at most 4e-7.
- sigma(x) = (1 + tanh(x / 2)) / 2. Absolute error at most 2e-7.

NaN goes through all of them. Addresses are plain integers, as in vectors.py.
"""

from collections.abc import Callable, Sequence
from typing import no_type_check

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from .processor import AVX512
from .tiles import ROW
from .vectors import BEHIND, FLOATS, HALVES, IN_TURNS, load, splat, store

_I16, _I32, _I64 = ir.IntType(16), ir.IntType(32), ir.IntType(64)
_LOG2E, _LN2_HIGH, _LN2_LOW = 1.4426950408889634, 0.693359375, -2.12194440e-4
_EXP = (0.0013836793368682265, 0.008374856784939766, 0.041668228805065155, 0.16666419804096222, 0.49999991059303284, 1, 1)
_TANH_LIMIT = 7.90531110763549805
_TANH_P = (
    -2.76076847742355e-16,
    2.00018790482477e-13,
    -8.60467152213735e-11,
    5.12229709037114e-08,
    1.48572235717979e-05,
    6.37261928875436e-04,
    4.89352455891786e-03,
)
_TANH_Q = (1.19825839466702e-06, 1.18534705686654e-04, 2.26843463243900e-03, 4.89352518554385e-03)


@intrinsic
@no_type_check
def exp_rows(typingctx, pair, z, b, shift, sums):
    """A row of 16 float32 at z, where `pair` two, becomes exp(z_vn + b_v - shift_n), which is added to sums_n.

    b (a number a row), shift (16,) and sums (16,) are addresses.
    """

    def generate(context, builder, signature, arguments):
        pair, z, *others = arguments

        def rows(count):
            for row, value in enumerate(_exp_rows(builder, z, count, *others)):
                store(builder, z, row, value)

        _branch(builder, pair, lambda: rows(2), lambda: rows(1))
        return context.get_dummy_value()

    return types.void(types.boolean, *[types.int64] * 4), generate


@intrinsic
@no_type_check
def exp_rows_to_bf16(typingctx, pair, z, other, b, shift, sums, words, pairs, other_pairs):
    """The same for a row, or a pair, of two panels, z and `other` (0: there is none), as bfloat16: words and pairs of both.

    Both are what `round_rows` makes of it, words in one or two rows, pairs in one. z stays. shift and sums are (32,).
    """

    def generate(context, builder, signature, arguments):
        pair, z, other, b, shift, sums, words, pairs, other_pairs = arguments
        nothing = ir.Constant(HALVES, None)
        second = lambda address: builder.add(address, _I64(ROW))

        def rows(count, panels):
            found = [_exp_rows(builder, z, count, b, shift, sums)]
            if panels == 2:
                found.append(_exp_rows(builder, other, count, b, second(shift), second(sums)))
            halves = [[builder.fptrunc(row, HALVES) for row in panel] for panel in found]
            left, right = halves[0], halves[1] if panels == 2 else [nothing] * count
            for row in range(count):
                store(builder, words, row, builder.shuffle_vector(left[row], right[row], BEHIND))
            for target, panel in zip((pairs, other_pairs), halves, strict=False):
                store(builder, target, 0, builder.shuffle_vector(panel[0], panel[1] if count == 2 else nothing, IN_TURNS))

        def one_or_two(count):
            there = builder.icmp_signed("!=", other, _I64(0))
            _branch(builder, there, lambda: rows(count, 2), lambda: rows(count, 1))

        _branch(builder, pair, lambda: one_or_two(2), lambda: one_or_two(1))
        return context.get_dummy_value()

    return types.void(types.boolean, *[types.int64] * 8), generate


@intrinsic
@no_type_check
def cell_forward_row(typingctx, gates, jump, b, c, c_next, h):
    """16 units of one lane, one step of the LSTM (lstm.py): four rows at gates, `jump` apart, plus four at b become i, f, g, o;
    the row c gives c_next and h.
    """

    def generate(context, builder, signature, arguments):
        gates, jump, b, c, c_next, h = arguments
        places = [builder.add(gates, builder.mul(jump, _I64(q))) for q in range(4)]
        a = [builder.fadd(load(builder, place), load(builder, b, q)) for q, place in enumerate(places)]
        i, f, g, o = (tanh(builder, x) if q == 2 else sigmoid(builder, x) for q, x in enumerate(a))
        after = _multiply_add(builder, f, load(builder, c), builder.fmul(i, g))
        for place, value in zip((*places, c_next, h), (i, f, g, o, after, builder.fmul(o, tanh(builder, after))), strict=True):
            store(builder, place, 0, value)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 6), generate


@intrinsic
@no_type_check
def cell_backward_row(typingctx, gates, jump, db, c, c_next, dc, dh_next, dh):
    """The same row one step back: the gates become da, which is added to four rows at db; dc becomes dc_{t-1}."""

    def generate(context, builder, signature, arguments):
        gates, jump, db, c, c_next, dc, dh_next, dh = arguments
        multiply, one = builder.fmul, _vector(1.0)
        less_square = lambda x: _multiply_add(builder, builder.fneg(x), x, one)
        rest_of = lambda x: builder.fsub(one, x)
        places = [builder.add(gates, builder.mul(jump, _I64(q))) for q in range(4)]
        i, f, g, o = (load(builder, place) for place in places)
        tanh_c = tanh(builder, load(builder, c_next))
        do = multiply(builder.fadd(load(builder, dh_next), load(builder, dh)), o)
        dc_t = _multiply_add(builder, do, less_square(tanh_c), load(builder, dc))
        dc_i, dc_f = multiply(dc_t, i), multiply(dc_t, f)
        da = (
            multiply(multiply(dc_i, g), rest_of(i)),
            multiply(multiply(dc_f, load(builder, c)), rest_of(f)),
            multiply(dc_i, less_square(g)),
            multiply(multiply(do, tanh_c), rest_of(o)),
        )
        for q, value in enumerate(da):
            store(builder, places[q], 0, value)
            store(builder, db, q, builder.fadd(load(builder, db, q), value))
        store(builder, dc, 0, dc_f)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 8), generate


@intrinsic
@no_type_check
def tanh_row(typingctx, y):
    """16 float32 at y become their tanh."""

    def generate(context, builder, signature, arguments):
        store(builder, arguments[0], 0, tanh(builder, load(builder, arguments[0])))
        return context.get_dummy_value()

    return types.void(types.int64), generate


def exp(builder: ir.IRBuilder, x: ir.Value) -> ir.Value:
    """e^x."""
    # Far out r would be rounding errors; without AVX-512 the power of two is put together by hand and must be one.
    x = _clamp(builder, x, -150.0, 150.0) if AVX512 else _clamp(builder, x, -87.0, 88.0)
    n = _call(builder, "llvm.rint.v16f32", builder.fmul(x, _vector(_LOG2E)))
    r = _multiply_add(builder, n, _vector(-_LN2_LOW), _multiply_add(builder, n, _vector(-_LN2_HIGH), x))
    power = _polynomial(builder, r, _EXP)
    if AVX512:
        undefined, everywhere, nearest = ir.Constant(FLOATS, ir.Undefined), _I16(-1), _I32(4)
        return _call(builder, "llvm.x86.avx512.mask.scalef.ps.512", power, n, undefined, everywhere, nearest)
    whole = ir.VectorType(_I32, 16)
    bits = builder.add(builder.fptosi(n, whole), ir.Constant(whole, [127] * 16))
    return builder.fmul(power, builder.bitcast(builder.shl(bits, ir.Constant(whole, [23] * 16)), FLOATS))


def tanh(builder: ir.IRBuilder, x: ir.Value) -> ir.Value:
    """tanh(x)."""
    x = _clamp(builder, x, -_TANH_LIMIT, _TANH_LIMIT)
    square = builder.fmul(x, x)
    p, q = builder.fmul(x, _polynomial(builder, square, _TANH_P)), _polynomial(builder, square, _TANH_Q)
    if not AVX512:
        return builder.fdiv(p, q)
    # An estimate of 1 / q to 14 bits and one step of Newton's: a third of the time of a division.
    estimate = _call(builder, "llvm.x86.avx512.rcp14.ps.512", q, ir.Constant(FLOATS, ir.Undefined), _I16(-1))
    error = _multiply_add(builder, builder.fneg(q), estimate, _vector(1.0))
    return builder.fmul(p, _multiply_add(builder, estimate, error, estimate))


def sigmoid(builder: ir.IRBuilder, x: ir.Value) -> ir.Value:
    """The logistic sigma(x) = 1 / (1 + e^-x)."""
    half = _vector(0.5)
    return _multiply_add(builder, half, tanh(builder, builder.fmul(half, x)), half)


def _exp_rows(builder: ir.IRBuilder, z: ir.Value, count: int, b: ir.Value, shift: ir.Value, sums: ir.Value) -> list[ir.Value]:
    """The exponentials of `count` rows, which are added to sums."""
    offset, rows, total = load(builder, shift), [], load(builder, sums)
    for row in range(count):
        b_v = builder.load(builder.inttoptr(builder.add(b, _I64(4 * row)), ir.FloatType().as_pointer()))
        value = builder.fsub(builder.fadd(load(builder, z, row), splat(builder, b_v)), offset)
        rows.append(exp(builder, value))
    store(builder, sums, 0, builder.fadd(total, builder.fadd(*rows) if count == 2 else rows[0]))
    return rows


def _branch(builder: ir.IRBuilder, condition: ir.Value, then: Callable[[], object], otherwise: Callable[[], object]) -> None:
    with builder.if_else(condition) as (yes, no):
        with yes:
            then()
        with no:
            otherwise()


def _vector(number: float) -> ir.Value:
    return ir.Constant(FLOATS, [float(np.float32(number))] * 16)


def _call(builder: ir.IRBuilder, name: str, *arguments: ir.Value) -> ir.Value:
    kind = ir.FunctionType(FLOATS, [argument.type for argument in arguments])
    return builder.call(builder.module.declare_intrinsic(name, (), kind), arguments)


def _multiply_add(builder: ir.IRBuilder, a: ir.Value, b: ir.Value, c: ir.Value) -> ir.Value:
    return _call(builder, "llvm.fma.v16f32", a, b, c)


def _polynomial(builder: ir.IRBuilder, x: ir.Value, coefficients: Sequence[float]) -> ir.Value:
    """By Horner's rule, the highest power first."""
    value = _vector(coefficients[0])
    for coefficient in coefficients[1:]:
        value = _multiply_add(builder, value, x, _vector(coefficient))
    return value


def _clamp(builder: ir.IRBuilder, x: ir.Value, low: float, high: float) -> ir.Value:
    low, high = _vector(low), _vector(high)  # compared this way round, NaN stays NaN in one instruction each
    x = builder.select(builder.fcmp_ordered(">", low, x), low, x)
    return builder.select(builder.fcmp_ordered("<", high, x), high, x)
