r"""The innermost loop of every matrix product: a tile of C stays in registers while one pass over k adds to it.

                 b0   b1            row k of two panels of B: vectors, read once for all rows of the tile
      a[0,k] ->  c00  c01
      a[1,k] ->  c10  c11           each c a vector of sums, one multiply-add a step
       ...        ...

Numba cannot promise that the sums stay in registers, so the loop is written in LLVM's own language, once for each
number of rows and panels, for the vectors of the machine it runs on. What panels are stands in gemm.py. Addresses are
plain integers: nothing here knows where an array ends.

A step of k is one word: a float32, a float64, a pair of bfloat16, whose products are added up in float32, or four bytes
(int8.py), whose products are added up in int32.
"""

from typing import no_type_check

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from .processor import REGISTERS, TWICE, VECTOR

ROW = 64  # bytes of a row of a panel
PANELS = 2 if VECTOR == 64 else 1  # of a tile
# Of a tile: with two vectors (four of 16 bytes) a row this fills the registers, beside a row of B and a word of A.
ROWS = {64: 14, 32: 6, 16: 6 if REGISTERS == 32 else 3}[VECTOR]
TALLEST = 2 * ROWS if TWICE else ROWS  # of a tile of one panel
AHEAD = 24  # rows of B that are fetched ahead


class BFloat(ir.types._BaseFloatType):  # type: ignore[misc]
    """llvmlite knows no bfloat."""

    null = "0.0"
    intrinsic_name = "bf16"

    def __str__(self) -> str:
        return "bfloat"


BFloat._create_instance()
_I32, _I64 = ir.IntType(32), ir.IntType(64)


@intrinsic
@no_type_check
def multiply_tile(typingctx, kind, rows, panels, add, K, a, a_jump, b, b_jump, c, c_jump):
    """c (rows, panels) = a @ b, added to what c holds where `add` is not 0, over K words.

    Word (row,k) of a is at a + 64 row + size (k mod R) + a_jump (k div R), R = 64 / size; vector (k,panel) of b at
    b + 64 k + b_jump panel; vector (row,panel) of c at c + 64 row + c_jump panel. `kind` is a word of a: a float, a uint32
    for a pair of bfloat16, an int32 for four bytes.
    """
    return types.void(kind, *[types.int64] * 10), _generator(kind, False)


@intrinsic
@no_type_check
def multiply_tile_transposed(typingctx, kind, rows, panels, add, K, a, a_jump, b, b_jump, c, c_jump):
    """The same with word (row,k) of a at a + size row + 64 k: the transpose of a panel. a_jump is not used."""
    return types.void(kind, *[types.int64] * 10), _generator(kind, True)


@no_type_check
def _generator(kind, transposed):
    def generate(context, builder, signature, arguments):
        _Tiles(builder, kind, transposed, *arguments[1:])
        return context.get_dummy_value()

    return generate


class _Tiles:
    """Emits a switch over the sizes of a tile, with a loop of its own for each."""

    def __init__(
        self,
        builder: ir.IRBuilder,
        kind: types.Type,
        transposed: bool,
        rows: ir.Value,
        panels: ir.Value,
        add: ir.Value,
        K: ir.Value,
        a: ir.Value,
        a_jump: ir.Value,
        b: ir.Value,
        b_jump: ir.Value,
        c: ir.Value,
        c_jump: ir.Value,
    ) -> None:
        self.builder, self.transposed, self.kind = builder, transposed, kind
        self.element = ir.DoubleType() if kind == types.float64 else _I32 if kind == types.int32 else ir.FloatType()
        self.size = 8 if kind == types.float64 else 4
        self.lanes = VECTOR // self.size
        self.vector = ir.VectorType(self.element, self.lanes)
        self.K, self.a, self.a_jump, self.b, self.b_jump, self.c, self.c_jump = K, a, a_jump, b, b_jump, c, c_jump
        self.mask = self.splat(builder.icmp_signed("!=", add, add.type(0)))
        end = builder.append_basic_block("end")
        switch = builder.switch(builder.add(builder.mul(panels, _I64(TALLEST + 1)), rows), end)
        for width in range(1, PANELS + 1):
            most = TALLEST if width == 1 and isinstance(kind, types.Float) else ROWS
            for height in range(1, min(most, 8 if transposed else most) + 1):
                block = builder.append_basic_block(f"tile{height}x{width}")
                switch.add_case(_I64(width * (TALLEST + 1) + height), block)
                builder.position_at_end(block)
                self.emit(height, width)
                builder.branch(end)
        builder.position_at_end(end)

    def emit(self, height: int, width: int) -> None:
        """The loop of a tile of `height` rows and `width` panels."""
        builder, per_panel = self.builder, ROW // VECTOR
        columns = [(panel, part) for panel in range(width) for part in range(per_panel)]
        places = [
            self.at(self.c, self.c_jump, panel, ROW * row + VECTOR * part) for row in range(height) for panel, part in columns
        ]
        begin = [self.load_if_adding(place) for place in places]

        before, loop, behind = builder.block, builder.append_basic_block("k"), builder.append_basic_block("behind")
        builder.branch(loop)
        builder.position_at_end(loop)
        k, left, right = (builder.phi(_I64) for _ in range(3))
        for variable, start in ((k, _I64(0)), (left, self.a), (right, self.b)):
            variable.add_incoming(start, before)
        sums = [builder.phi(self.vector) for _ in places]
        b = []
        for panel, part in columns:
            b.append(self.load(self.at(right, self.b_jump, panel, VECTOR * part), self.vector))
            if part == 0:
                self.prefetch(self.at(right, self.b_jump, panel, ROW * AHEAD))
        next_k, ahead = builder.add(k, _I64(1)), _I64(ROW)
        if not self.transposed:
            words = ROW // self.size
            within = builder.and_(k, _I64(words - 1))
            # Row k mod R of the next panel of A, so that all rows of the tile are there when it is reached.
            self.prefetch(builder.add(builder.add(left, self.a_jump), builder.mul(within, _I64(ROW - self.size))))
            last = builder.icmp_signed("==", within, _I64(words - 1))
            ahead = builder.select(last, builder.sub(self.a_jump, _I64(ROW - self.size)), _I64(self.size))
        new: list[ir.Value] = []
        for row in range(height):
            word = self.load(builder.add(left, _I64(row * (self.size if self.transposed else ROW))), self.element)
            word = self.splat(word)
            new += [self.multiply_add(word, vector, sums[len(new) + i]) for i, vector in enumerate(b)]
        for variable, value in ((k, next_k), (left, builder.add(left, ahead)), (right, builder.add(right, _I64(ROW)))):
            variable.add_incoming(value, loop)
        for total, start, value in zip(sums, begin, new, strict=True):
            total.add_incoming(start, before)
            total.add_incoming(value, loop)
        builder.cbranch(builder.icmp_signed("<", next_k, self.K), loop, behind)
        builder.position_at_end(behind)
        for place, value in zip(places, new, strict=True):
            builder.store(value, builder.inttoptr(place, self.vector.as_pointer()), align=4)

    def at(self, address: ir.Value, jump: ir.Value, panel: int, offset: int) -> ir.Value:
        return self.builder.add(self.builder.add(address, self.builder.mul(jump, _I64(panel))), _I64(offset))

    def load(self, address: ir.Value, kind: ir.Type) -> ir.Value:
        return self.builder.load(self.builder.inttoptr(address, kind.as_pointer()), align=4)

    def load_if_adding(self, address: ir.Value) -> ir.Value:
        """What c holds, or zeros: not by a masked load, of which LLVM makes a branch a lane where vectors have 16 bytes."""
        return self.builder.select(self.mask, self.load(address, self.vector), ir.Constant(self.vector, None))

    def prefetch(self, address: ir.Value) -> None:
        pointer = self.vector.as_pointer()
        function = self.function("llvm.prefetch.p0", ir.VoidType(), pointer, _I32, _I32, _I32)
        self.builder.call(function, [self.builder.inttoptr(address, pointer), _I32(0), _I32(3), _I32(1)])

    def splat(self, scalar: ir.Value) -> ir.Value:
        undefined, places = ir.Constant(ir.VectorType(scalar.type, self.lanes), ir.Undefined), ir.VectorType(_I32, self.lanes)
        one = self.builder.insert_element(undefined, scalar, _I32(0))
        return self.builder.shuffle_vector(one, undefined, ir.Constant(places, [0] * self.lanes))

    def multiply_add(self, a: ir.Value, b: ir.Value, c: ir.Value) -> ir.Value:
        if self.kind == types.int32:
            function = self.function(f"llvm.x86.avx512.vpdpbusd.{8 * VECTOR}", *[self.vector] * 4)
            return self.builder.call(function, [c, a, b])
        if self.kind == types.uint32:
            halves = ir.VectorType(BFloat(), 2 * self.lanes)
            function = self.function("llvm.x86.avx512bf16.dpbf16ps.512", self.vector, self.vector, halves, halves)
            return self.builder.call(function, [c, self.builder.bitcast(a, halves), self.builder.bitcast(b, halves)])
        function = self.function(f"llvm.fma.v{self.lanes}f{8 * self.size}", *[self.vector] * 4)
        return self.builder.call(function, [a, b, c])

    def function(self, name: str, result: ir.Type, *kinds: ir.Type) -> ir.Value:
        return self.builder.module.declare_intrinsic(name, (), ir.FunctionType(result, kinds))
