"""What is done to rows of 64 bytes of a panel but multiplying them: transposes and rounding to bfloat16.

In LLVM's own language, like tiles.py and for the same reason: shuffles and conversions that Numba does not find.
Addresses are plain integers: nothing here knows where an array ends.

`stream`: True for targets that begin at lines of the cache and are not read soon. They are written past the caches, so that
memory need not be read first. Who lets another thread read them calls `fence` (reduce.py) before.
"""

from typing import no_type_check

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from .processor import BF16_INSTRUCTIONS
from .tiles import ROW, BFloat

_I32, _I64 = ir.IntType(32), ir.IntType(64)
FLOATS, HALVES = ir.VectorType(ir.FloatType(), 16), ir.VectorType(BFloat(), 16)
BEHIND = ir.Constant(ir.VectorType(_I32, 32), [*range(32)])  # one vector of 16 behind another
IN_TURNS = ir.Constant(ir.VectorType(_I32, 32), [n // 2 + n % 2 * 16 for n in range(32)])


@intrinsic
@no_type_check
def transpose_block(typingctx, kind, source, target, stream):
    """R rows of 64 bytes, R words of `kind` each, at `source` become the columns of R rows at `target`."""

    def generate(context, builder, signature, arguments):
        size = 8 if kind == types.float64 else 4
        vector = ir.VectorType(ir.DoubleType() if size == 8 else ir.FloatType(), ROW // size)
        rows = [load(builder, arguments[1], i, vector) for i in range(vector.count)]
        _store_rows(builder, arguments[2], _transposed(builder, rows), arguments[3])
        return context.get_dummy_value()

    return types.void(kind, types.int64, types.int64, types.boolean), generate


@intrinsic
@no_type_check
def round_rows(typingctx, interleave, one, other, target, stream):
    """16 float32 at `one` and 16 at `other` become 64 bytes of bfloat16 at `target`: one behind the other, or where
    `interleave` is True in turns. `other` = 0: zeros.
    """

    def generate(context, builder, signature, arguments):
        interleave, one, other, target, stream = arguments
        convert = lambda address: builder.fptrunc(load(builder, address, 0, FLOATS), HALVES)
        first = convert(one)
        with builder.if_else(builder.icmp_signed("!=", other, _I64(0))) as (there, missing):
            with there:
                second, origin = convert(other), builder.block
            with missing:
                nothing, nowhere = ir.Constant(HALVES, None), builder.block
        rest = builder.phi(HALVES)
        rest.add_incoming(second, origin)
        rest.add_incoming(nothing, nowhere)
        behind, in_turns = (builder.shuffle_vector(first, rest, order) for order in (BEHIND, IN_TURNS))
        _store_rows(builder, target, [builder.select(interleave, in_turns, behind)], stream)
        return context.get_dummy_value()

    return types.void(types.boolean, types.int64, types.int64, types.int64, types.boolean), generate


@intrinsic
@no_type_check
def round_to_bf16(typingctx, x):
    """The bits (uint32) of a float32 rounded to bfloat16, to nearest even. One instruction where the processor has it."""

    def generate(context, builder, signature, arguments):
        if BF16_INSTRUCTIONS:
            half = builder.bitcast(builder.fptrunc(arguments[0], BFloat()), ir.IntType(16))
            return builder.zext(half, _I32)
        bits = builder.bitcast(arguments[0], _I32)
        odd = builder.and_(builder.lshr(bits, _I32(16)), _I32(1))
        return builder.lshr(builder.add(bits, builder.add(odd, _I32(0x7FFF))), _I32(16))

    return types.uint32(types.float32), generate


def load(builder: ir.IRBuilder, address: ir.Value, row: int = 0, vector: ir.Type = FLOATS) -> ir.Value:
    """Row number `row` behind `address`."""
    return builder.load(builder.inttoptr(builder.add(address, _I64(ROW * row)), vector.as_pointer()), align=4)


def store(builder: ir.IRBuilder, address: ir.Value, row: int, value: ir.Value) -> None:
    """Row number `row` behind `address` becomes value."""
    builder.store(value, builder.inttoptr(builder.add(address, _I64(ROW * row)), value.type.as_pointer()), align=4)


def splat(builder: ir.IRBuilder, scalar: ir.Value) -> ir.Value:
    """A float32 16 times."""
    one = builder.insert_element(ir.Constant(FLOATS, ir.Undefined), scalar, _I32(0))
    return builder.shuffle_vector(one, ir.Constant(FLOATS, ir.Undefined), ir.Constant(ir.VectorType(_I32, 16), [0] * 16))


def _store_rows(builder: ir.IRBuilder, target: ir.Value, rows: list[ir.Value], stream: ir.Value) -> None:
    """Rows of 64 bytes, one behind the other from `target` on."""
    with builder.if_else(stream) as (past, plain):
        with past:
            hint = builder.module.add_metadata([_I32(1)])
            for i, row in enumerate(rows):
                pointer = builder.inttoptr(builder.add(target, _I64(ROW * i)), row.type.as_pointer())
                builder.store(row, pointer, align=ROW).set_metadata("nontemporal", hint)
        with plain:
            for i, row in enumerate(rows):
                store(builder, target, i, row)


def _transposed(builder: ir.IRBuilder, rows: list[ir.Value]) -> list[ir.Value]:
    """n rows of n words, turned: in log2 n rounds, halves of neighbours at distance 1, 2, 4, ... change places."""
    rows, n, distance = list(rows), len(rows), 1
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
    return rows
