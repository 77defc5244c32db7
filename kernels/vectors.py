"""What is done to rows of 64 bytes of a panel but multiplying them: transposes, rounding to bfloat16, exponentials.

In LLVM's own language, like tiles.py and for the same reason: shuffles, conversions and powers of two that Numba does not find.
Addresses are plain integers: nothing here knows where an array ends.
"""

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from .tiles import AVX512, BF16, ROW, BFloat

_I16, _I32, _I64 = ir.IntType(16), ir.IntType(32), ir.IntType(64)
_FLOATS, _HALVES = ir.VectorType(ir.FloatType(), 16), ir.VectorType(BFloat(), 16)
_BEHIND = ir.Constant(ir.VectorType(_I32, 32), [*range(32)])  # one vector of 16 behind another
_IN_TURNS = ir.Constant(ir.VectorType(_I32, 32), [n // 2 + n % 2 * 16 for n in range(32)])

# e^r for |r| <= ln 2 / 2 to 2e-8, the largest error made small; ln 2 in two parts, the first of few bits.
_LOG2E, _LN2_HIGH, _LN2_LOW = 1.4426950408889634, 0.693359375, -2.12194440e-4
_EXP = (0.0013836793368682265, 0.008374856784939766, 0.041668228805065155, 0.16666419804096222, 0.49999991059303284, 1, 1)


@intrinsic
def transpose_block(typingctx, kind, source, target):
    """R rows of 64 bytes, R words of `kind` each, at `source` become the columns of R rows at `target`."""

    def generate(context, builder, signature, arguments):
        size = 8 if kind == types.float64 else 4
        vector = ir.VectorType(ir.DoubleType() if size == 8 else ir.FloatType(), ROW // size)
        rows = [_load(builder, arguments[1], i, vector) for i in range(vector.count)]
        _store_transpose(builder, rows, arguments[2])
        return context.get_dummy_value()

    return types.void(kind, types.int64, types.int64), generate


@intrinsic
def round_rows(typingctx, interleave, one, other, target):
    """16 float32 at `one` and 16 at `other` become 64 bytes of bfloat16 at `target`: one behind the other, or where
    `interleave` is True in turns. `other` = 0: zeros.
    """

    def generate(context, builder, signature, arguments):
        interleave, one, other, target = arguments
        convert = lambda address: builder.fptrunc(_load(builder, address, 0, _FLOATS), _HALVES)
        first = convert(one)
        with builder.if_else(builder.icmp_signed("!=", other, _I64(0))) as (there, missing):
            with there:
                second, origin = convert(other), builder.block
            with missing:
                nothing, nowhere = ir.Constant(_HALVES, None), builder.block
        rest = builder.phi(_HALVES)
        rest.add_incoming(second, origin)
        rest.add_incoming(nothing, nowhere)
        behind, in_turns = (builder.shuffle_vector(first, rest, order) for order in (_BEHIND, _IN_TURNS))
        _store(builder, target, 0, builder.select(interleave, in_turns, behind))
        return context.get_dummy_value()

    return types.void(types.boolean, types.int64, types.int64, types.int64), generate


@intrinsic
def transpose_block_of_pairs(typingctx, first, second, target):
    """16 rows of 16 float32 at `first`, and 16 at `second`, become the columns of 16 rows of pairs of bfloat16 at `target`."""

    def generate(context, builder, signature, arguments):
        rows = []
        for i in range(16):
            one, other = (builder.fptrunc(_load(builder, address, i, _FLOATS), _HALVES) for address in arguments[:2])
            rows.append(builder.bitcast(builder.shuffle_vector(one, other, _BEHIND), ir.VectorType(_I32, 16)))
        _store_transpose(builder, rows, arguments[2])
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), generate


@intrinsic
def round_to_bf16(typingctx, x):
    """The bits (uint32) of a float32 rounded to bfloat16, to nearest even. One instruction where the processor has it."""

    def generate(context, builder, signature, arguments):
        if BF16:
            half = builder.bitcast(builder.fptrunc(arguments[0], BFloat()), ir.IntType(16))
            return builder.zext(half, _I32)
        bits = builder.bitcast(arguments[0], _I32)
        odd = builder.and_(builder.lshr(bits, _I32(16)), _I32(1))
        return builder.lshr(builder.add(bits, builder.add(odd, _I32(0x7FFF))), _I32(16))

    return types.uint32(types.float32), generate


@intrinsic
def exp_rows(typingctx, pair, z, b, shift, sums):
    """A row of 16 float32 at z, where `pair` two, becomes exp(z_vn + b_v - shift_n), which is added to sums_n.

    b (a number a row), shift (16,) and sums (16,) are addresses. Relative error at most 2e-7; what is beyond float32 becomes
    zero or infinity.
    """

    def generate(context, builder, signature, arguments):
        pair, z, *others = arguments

        def rows(count):
            for row, value in enumerate(_exp_rows(builder, z, count, *others)):
                _store(builder, z, row, value)

        _branch(builder, pair, lambda: rows(2), lambda: rows(1))
        return context.get_dummy_value()

    return types.void(types.boolean, *[types.int64] * 4), generate


@intrinsic
def exp_rows_to_bf16(typingctx, pair, z, other, b, shift, sums, words, pairs, other_pairs):
    """The same for a row, or a pair, of two panels, z and `other` (0: there is none), as bfloat16: words and pairs of both.

    Both are what `round_rows` makes of it, words in one or two rows, pairs in one. z stays. shift and sums are (32,).
    """

    def generate(context, builder, signature, arguments):
        pair, z, other, b, shift, sums, words, pairs, other_pairs = arguments
        nothing = ir.Constant(_HALVES, None)
        second = lambda address: builder.add(address, _I64(ROW))

        def rows(count, panels):
            found = [_exp_rows(builder, z, count, b, shift, sums)]
            if panels == 2:
                found.append(_exp_rows(builder, other, count, b, second(shift), second(sums)))
            halves = [[builder.fptrunc(row, _HALVES) for row in panel] for panel in found]
            left, right = halves[0], halves[1] if panels == 2 else [nothing] * count
            for row in range(count):
                _store(builder, words, row, builder.shuffle_vector(left[row], right[row], _BEHIND))
            for target, panel in zip((pairs, other_pairs), halves, strict=False):
                _store(builder, target, 0, builder.shuffle_vector(panel[0], panel[1] if count == 2 else nothing, _IN_TURNS))

        def one_or_two(count):
            there = builder.icmp_signed("!=", other, _I64(0))
            _branch(builder, there, lambda: rows(count, 2), lambda: rows(count, 1))

        _branch(builder, pair, lambda: one_or_two(2), lambda: one_or_two(1))
        return context.get_dummy_value()

    return types.void(types.boolean, *[types.int64] * 8), generate


def _branch(builder, condition, then, otherwise):
    with builder.if_else(condition) as (yes, no):
        with yes:
            then()
        with no:
            otherwise()


def _exp_rows(builder, z, count, b, shift, sums):
    """The exponentials of `count` rows, which are added to sums."""
    offset, rows, total = _load(builder, shift, 0, _FLOATS), [], _load(builder, sums, 0, _FLOATS)
    for row in range(count):
        b_v = builder.load(builder.inttoptr(builder.add(b, _I64(4 * row)), ir.FloatType().as_pointer()))
        value = builder.fsub(builder.fadd(_load(builder, z, row, _FLOATS), _splat(builder, b_v)), offset)
        rows.append(_exp(builder, value))
    _store(builder, sums, 0, builder.fadd(total, builder.fadd(*rows) if count == 2 else rows[0]))
    return rows


def _exp(builder, x):
    """e^x = 2^n e^r with n = round(x / ln 2) and r = x - n ln 2 in two parts (Cody and Waite 1980)."""
    vector = lambda number: ir.Constant(_FLOATS, [number] * 16)

    def function(name, *arguments):
        kind = ir.FunctionType(_FLOATS, [argument.type for argument in arguments])
        return builder.call(builder.module.declare_intrinsic(name, (), kind), arguments)

    multiply_add = lambda a, b, c: function("llvm.fma.v16f32", a, b, c)
    if not AVX512:  # the power of two is put together by hand there, and must be one
        x = function("llvm.minimum.v16f32", function("llvm.maximum.v16f32", x, vector(-87.0)), vector(88.0))
    n = function("llvm.rint.v16f32", builder.fmul(x, vector(_LOG2E)))
    r = multiply_add(n, vector(-_LN2_LOW), multiply_add(n, vector(-_LN2_HIGH), x))
    power = vector(_EXP[0])
    for coefficient in _EXP[1:]:
        power = multiply_add(power, r, vector(coefficient))
    if AVX512:
        everywhere, nearest = ir.Constant(_I16, -1), _I32(4)
        return function("llvm.x86.avx512.mask.scalef.ps.512", power, n, ir.Constant(_FLOATS, ir.Undefined), everywhere, nearest)
    whole = ir.VectorType(_I32, 16)
    bits = builder.add(builder.fptosi(n, whole), ir.Constant(whole, [127] * 16))
    return builder.fmul(power, builder.bitcast(builder.shl(bits, ir.Constant(whole, [23] * 16)), _FLOATS))


def _splat(builder, scalar):
    one = builder.insert_element(ir.Constant(_FLOATS, ir.Undefined), scalar, _I32(0))
    return builder.shuffle_vector(one, ir.Constant(_FLOATS, ir.Undefined), ir.Constant(ir.VectorType(_I32, 16), [0] * 16))


def _store(builder, address, row, value):
    builder.store(value, builder.inttoptr(builder.add(address, _I64(ROW * row)), value.type.as_pointer()), align=4)


def _load(builder, address, row, vector):
    return builder.load(builder.inttoptr(builder.add(address, _I64(ROW * row)), vector.as_pointer()), align=4)


def _store_transpose(builder, rows, target):
    """n rows of n words: in log2 n rounds, halves of neighbours at distance 1, 2, 4, ... change places."""
    n, distance = len(rows), 1
    while distance < n:
        for i in range(n):
            if i & distance:
                continue
            one, other = rows[i], rows[i + distance]
            low = [k if not k & distance else n + k - distance for k in range(n)]
            high = [k + distance if not k & distance else n + k for k in range(n)]
            for place, order in ((i, low), (i + distance, high)):
                rows[place] = builder.shuffle_vector(one, other, ir.Constant(ir.VectorType(_I32, n), order))
        distance *= 2
    for i, row in enumerate(rows):
        _store(builder, target, i, row)
