r"""Two innermost loops for products of few rows of panels (gemm.py), which need not lie beside each other: attention's.

    dots_tile        SIDE rows of x by SIDE rows of y: the products of each with each, over all panels
    sums_tile        SIDE rows by SIDE panels of out = w x: each a sum of rows of x, with the weights of w

All sums of a tile stay in registers, and each row that is loaded serves SIDE of them. Numba does not promise that: so both are
written in LLVM's own language, as tiles.py is. A sum is added up in one order, whichever tile it falls into. Addresses are
plain integers, and steps and jumps are bytes: nothing here knows where an array ends.
"""

from collections.abc import Callable
from typing import no_type_check

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from .processor import VECTOR
from .tiles import ROW
from .vectors import load, store

SIDE = 4 if VECTOR == 64 else 2  # of a tile
_I32, _I64 = ir.IntType(32), ir.IntType(64)


@intrinsic
@no_type_check
def dots_tile(typingctx, kind, rows, columns, panels, x, x_step, x_jump, y, y_step, y_jump, out):
    """Number i SIDE + j of `out` = row i of x times row j of y, for i below `rows`, j below `columns`, each 1 to SIDE.

    Row i of panel p is at x + x_step i + x_jump p, alike of y. `kind` is a number of the panels' type. out has room for whole
    rows of panels, SIDE^2 numbers at least.
    """

    def generate(context, builder, signature, arguments):
        _, rows, columns, panels, x, x_step, x_jump, y, y_step, y_jump, out = arguments
        vector, numbers = _vector(kind), ROW // _size(kind)
        others = _places(builder, y, y_step, columns)

        def emit(height):
            places = [_at(builder, x, x_step, i) for i in range(height)]

            def step(panel, sums):
                left = [load(builder, _at(builder, place, x_jump, panel), 0, vector) for place in places]
                right = [load(builder, _at(builder, place, y_jump, panel), 0, vector) for place in others]
                products = ((a, b) for a in left for b in right)
                return [_multiply_add(builder, a, b, total) for (a, b), total in zip(products, sums, strict=True)]

            sums = _loop(builder, panels, [ir.Constant(vector, None)] * (height * SIDE), step)
            sums += [ir.Constant(vector, None)] * (-len(sums) % numbers)
            for row in range(len(sums) // numbers):
                store(builder, out, row, _add_up(builder, sums[row * numbers : (row + 1) * numbers]))

        _switch(builder, rows, emit)
        return context.get_dummy_value()

    return types.void(kind, *[types.int64] * 10), generate


@intrinsic
@no_type_check
def sums_tile(typingctx, kind, rows, panels, count, w, w_step, w_jump, x, x_step, x_jump, out, out_step, out_jump):
    """Row i of panel p of out = the sum over j below `count` of w_ij times row j of panel p of x.

    `rows` and `panels` are 1 to SIDE. w_ij is at w + w_step i + w_jump j, row j of panel p at x + x_step j + x_jump p, alike of
    out. `kind` as above.
    """

    def generate(context, builder, signature, arguments):
        _, rows, panels, count, w, w_step, w_jump, x, x_step, x_jump, out, out_step, out_jump = arguments
        vector = _vector(kind)
        sources, targets = (_places(builder, place, jump, panels) for place, jump in ((x, x_jump), (out, out_jump)))

        def emit(height):
            weights = [_at(builder, w, w_step, i) for i in range(height)]

            def step(j, sums):
                values = [load(builder, _at(builder, place, x_step, j), 0, vector) for place in sources]
                factors = [_splat(builder, _at(builder, place, w_jump, j), vector) for place in weights]
                products = ((a, b) for a in factors for b in values)
                return [_multiply_add(builder, a, b, total) for (a, b), total in zip(products, sums, strict=True)]

            sums = _loop(builder, count, [ir.Constant(vector, None)] * (height * SIDE), step)
            for i in range(height):  # the last panel again where there are fewer, with the same sums
                for panel in range(SIDE):
                    store(builder, _at(builder, targets[panel], out_step, i), 0, sums[i * SIDE + panel])

        _switch(builder, rows, emit)
        return context.get_dummy_value()

    return types.void(kind, *[types.int64] * 12), generate


def _size(kind: types.Type) -> int:
    return 8 if kind == types.float64 else 4


def _vector(kind: types.Type) -> ir.VectorType:
    return ir.VectorType(ir.DoubleType() if _size(kind) == 8 else ir.FloatType(), ROW // _size(kind))


def _at(builder: ir.IRBuilder, address: ir.Value, step: ir.Value, i: ir.Value | int) -> ir.Value:
    return builder.add(address, builder.mul(step, _I64(i) if isinstance(i, int) else i))


def _places(builder: ir.IRBuilder, address: ir.Value, step: ir.Value, count: ir.Value) -> list[ir.Value]:
    """Addresses of SIDE rows or panels, of which there are `count`: then the last one again."""
    last, places = builder.sub(count, _I64(1)), []
    for i in range(SIDE):
        place = builder.select(builder.icmp_signed("<", _I64(i), last), _I64(i), last)
        places.append(_at(builder, address, step, place))
    return places


def _switch(builder: ir.IRBuilder, rows: ir.Value, emit: Callable[[int], None]) -> None:
    """emit(height) for each number of rows, of which one is run."""
    end = builder.append_basic_block("end")
    switch = builder.switch(rows, end)
    for height in range(1, SIDE + 1):
        block = builder.append_basic_block(f"rows{height}")
        switch.add_case(_I64(height), block)
        builder.position_at_end(block)
        emit(height)
        builder.branch(end)
    builder.position_at_end(end)


def _loop(
    builder: ir.IRBuilder,
    count: ir.Value,
    start: list[ir.Value],
    step: Callable[[ir.Value, list[ir.Value]], list[ir.Value]],
) -> list[ir.Value]:
    """values = step(i, values) for i from 0 to count - 1, which may be none."""
    before, head, body, end = builder.block, *(builder.append_basic_block(name) for name in ("head", "body", "behind"))
    builder.branch(head)
    builder.position_at_end(head)
    i = builder.phi(_I64)
    values = [builder.phi(value.type) for value in start]
    builder.cbranch(builder.icmp_signed("<", i, count), body, end)
    builder.position_at_end(body)
    new = step(i, values)
    for variable, first, value in zip([i, *values], [_I64(0), *start], [builder.add(i, _I64(1)), *new], strict=True):
        variable.add_incoming(first, before)
        variable.add_incoming(value, builder.block)
    builder.branch(head)
    builder.position_at_end(end)
    return values


def _add_up(builder: ir.IRBuilder, rows: list[ir.Value]) -> ir.Value:
    """The sums of n vectors of n numbers, in one vector: neighbours are added, until one number of each is left."""
    n = len(rows)
    even, odd = (ir.Constant(ir.VectorType(_I32, n), [*range(first, 2 * n, 2)]) for first in (0, 1))
    while len(rows) > 1:
        pairs = zip(rows[::2], rows[1::2], strict=True)
        rows = [builder.fadd(builder.shuffle_vector(a, b, even), builder.shuffle_vector(a, b, odd)) for a, b in pairs]
    return rows[0]


def _splat(builder: ir.IRBuilder, address: ir.Value, vector: ir.Type) -> ir.Value:
    """The number at an address, in all places of a vector."""
    undefined = ir.Constant(vector, ir.Undefined)
    number = builder.load(builder.inttoptr(address, vector.element.as_pointer()))
    one = builder.insert_element(undefined, number, _I32(0))
    return builder.shuffle_vector(one, undefined, ir.Constant(ir.VectorType(_I32, vector.count), [0] * vector.count))


def _multiply_add(builder: ir.IRBuilder, a: ir.Value, b: ir.Value, c: ir.Value) -> ir.Value:
    name = f"llvm.fma.v{a.type.count}f{512 // a.type.count}"
    return builder.call(builder.module.declare_intrinsic(name, (), ir.FunctionType(a.type, [a.type] * 3)), [a, b, c])
