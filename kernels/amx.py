r"""Products of panels by Intel's tiles (AMX), written with LLVM's intrinsics: neither a compiler nor a library is needed.

A tile is a register of 16 rows of 64 bytes. The operands of gemm.py happen to consist of tiles, each one contiguous kilobyte:

    words (K/32, M, 16) uint32     a left factor: row m of a panel is 32 bfloat16 along k        16 rows of it are an A tile
    pairs (N/16, K/2, 16) uint32   a right factor: row k is 16 pairs of rows 2k and 2k + 1       16 rows of it are a B tile
    c     (N/16, M, 16) float32                                                                  16 rows of it are a C tile

One instruction, TDPBF16PS, adds the product of an A and a B tile to a C tile. Up to four C tiles, two above each other by two
side by side, share two A and two B tiles. Tails along M are a matter of the configuration, which says how many rows a tile has.
There are none along N. Along k the right factor is padded with zeros to whole spans of 16 words; the left one has finite
numbers there.

- Loading a configuration takes as long as some ten instructions. It stays over a loop of small products: `current` is the
  number of rows that it is for, 0 where none is loaded. Threads that are switched keep their own.
- A row's result depends neither on the number of rows nor on where it lies, to the bit. It is not that of AVX512_BF16: even and
  odd k are added up apart. So all products of a process go by tiles, or none.
- Numbers below 2^-126 count as zero.
- A product takes 16 cycles where its B tile differs from that of the one before, else a cycle a row. So B tiles are used twice
  in a row.
- LLVM keeps tiles apart by the numbers that stand here. Its rules for AMD's processors would rename them; these have no tiles.
"""

from typing import no_type_check

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from .compile import kernel
from .processor import L2
from .tiles import ROW
from .types import Array

SPAN = 16  # words along k, the rows of a B tile
TALL = 32  # rows of two tiles above each other
DEPTH = 16  # spans of k, and HEIGHT rows of the left factor: a block that stays in the second-level cache beside B and C
HEIGHT = max(TALL, L2 * 3 // 8 // (DEPTH * ROW) // TALL * TALL)
FEW = 64  # rows: a left factor that stays in the caches anyway

_I8, _I64, _VOID = ir.IntType(8), ir.IntType(64), ir.VoidType()


def _configurations() -> Array:
    """(33, 64) bytes: for each number of rows of a pair of C tiles, 1 to 32, what LDTILECFG takes.

    Tiles 0 1 / 2 3 are C, 4 / 5 are A, above / below; 6 7 are B. Up to 16 rows the lower ones are not used.
    """
    table = np.zeros((TALL + 1, ROW), np.uint8)
    for rows in range(1, TALL + 1):
        config = table[rows]
        config[0] = 1  # palette
        config[16:32].view(np.uint16)[:] = ROW  # bytes of a row, eight tiles
        config[48:56] = 16  # rows
        above, below = min(rows, 16), max(rows - 16, 0) or 16
        config[[48, 49, 52]], config[[50, 51, 53]] = above, below
    return table


CONFIGURATIONS = _configurations()


@no_type_check
def _emit(builder, name, *arguments):
    kind = ir.FunctionType(_VOID, [argument.type for argument in arguments])
    builder.call(builder.module.declare_intrinsic("llvm.x86." + name, (), kind), arguments)


@no_type_check
def _pointer(builder, address):
    return builder.inttoptr(address, _I8.as_pointer())


@intrinsic
@no_type_check
def load_configuration(typingctx, address):
    """Configure this thread's tiles by the 64 bytes at an address."""

    def generate(context, builder, signature, arguments):
        _emit(builder, "ldtilecfg", _pointer(builder, arguments[0]))
        return context.get_dummy_value()

    return types.void(types.int64), generate


@intrinsic
@no_type_check
def release_tiles(typingctx):
    """Leave the tiles, so that a switch of threads has none to save."""

    def generate(context, builder, signature, arguments):
        _emit(builder, "tilerelease")
        return context.get_dummy_value()

    return types.void(), generate


INSTRUCTIONS = {types.uint32: "tdpbf16ps", types.int32: "tdpbusd"}  # by a word: of two bfloat16 or four bytes


@intrinsic
@no_type_check
def multiply_tiles(typingctx, kind, tall, wide, add, spans, a, a_jump, b, b_jump, c, c_jump):
    """Up to 32 rows by two panels of c = a @ b, added to what c holds where `add` is not 0, over `spans` spans of k.

    kind: a word of a. tall, wide: 1 for two tiles above each other, side by side, else 0; the rows are those of the
    configuration. a, b and c are addresses; the jumps lead from panel to panel, in bytes.
    """

    def generate(context, builder, signature, arguments):
        tall, wide, *others = arguments[1:]
        end = builder.append_basic_block("end")
        switch = builder.switch(builder.add(builder.mul(tall, _I64(2)), wide), end)
        for case in range(4):
            block = builder.append_basic_block(f"tiles{1 + case // 2}x{1 + case % 2}")
            switch.add_case(_I64(case), block)
            builder.position_at_end(block)
            _emit_product(builder, INSTRUCTIONS[kind], 1 + case // 2, 1 + case % 2, *others)
            builder.branch(end)
        builder.position_at_end(end)
        return context.get_dummy_value()

    return types.void(kind, *[types.int64] * 10), generate


@no_type_check
def _emit_product(builder, instruction, height, width, add, spans, a, a_jump, b, b_jump, c, c_jump):
    """The loop over k of `height` by `width` C tiles. No prefetches: none that was tried helped."""
    tiles = [(i, j) for j in range(width) for i in range(height)]  # those that share a B tile one behind the other
    at = lambda i, j: builder.add(builder.add(c, builder.mul(c_jump, _I64(j))), _I64(16 * ROW * i))
    load = lambda tile, address: _emit(builder, "tileloadd64", _I8(tile), _pointer(builder, address), _I64(ROW))
    with builder.if_else(builder.icmp_signed("!=", add, _I64(0))) as (adding, fresh):
        with adding:
            for i, j in tiles:
                load(2 * i + j, at(i, j))
        with fresh:
            for i, j in tiles:
                _emit(builder, "tilezero", _I8(2 * i + j))
    before, loop, behind = builder.block, builder.append_basic_block("k"), builder.append_basic_block("behind")
    builder.branch(loop)
    builder.position_at_end(loop)
    k, left, right = (builder.phi(_I64) for _ in range(3))
    for i, j in tiles:
        if j == 0:
            load(4 + i, builder.add(left, _I64(16 * ROW * i)))
        if i == 0:
            load(6 + j, builder.add(right, builder.mul(b_jump, _I64(j))))
        _emit(builder, instruction, _I8(2 * i + j), _I8(4 + i), _I8(6 + j))
    next_k = builder.add(k, _I64(1))
    following = next_k, builder.add(left, a_jump), builder.add(right, _I64(SPAN * ROW))
    for variable, start, value in zip((k, left, right), (_I64(0), a, b), following, strict=True):
        variable.add_incoming(start, before)
        variable.add_incoming(value, loop)
    builder.cbranch(builder.icmp_signed("<", next_k, spans), loop, behind)
    builder.position_at_end(behind)
    for i, j in tiles:
        _emit(builder, "tilestored64", _I8(2 * i + j), _pointer(builder, at(i, j)), _I64(ROW))


@kernel
def multiply_by_tiles(current: int, c: Array, c_row: int, a: Array, a_row: int, b: Array, M: int, K: int, add: bool) -> int:
    """c = a @ b, or c += a @ b where `add`: M rows of c and of a, from c_row and a_row on; K words.

    a (K/16,:,16) and b (N/16,:,16) uint32, pairs of bfloat16, for c (N/16,:,16) float32; or int32, four bytes, for int32. b is
    padded with rows of zeros to whole spans of 16. `current`: the rows of the configuration that is loaded, 0: none. Returns
    what it is then; `release_tiles` when all is done.
    """
    word = a.dtype.type(0)
    spans = (K + SPAN - 1) // SPAN
    blocks = (spans + DEPTH - 1) // DEPTH if M > FEW else min(spans, 1)  # the loop over k takes one span at least
    for block in range(blocks):
        front = spans * block // blocks
        steps = spans * (block + 1) // blocks - front
        for start in range(0, M, HEIGHT):
            stop = min(M, start + HEIGHT)
            for panel in range(0, c.shape[0], 2):
                wide = 1 if panel + 1 < c.shape[0] else 0
                for top in range(start, stop, TALL):
                    rows = min(TALL, stop - top)
                    if rows != current:
                        load_configuration(CONFIGURATIONS.ctypes.data + ROW * rows)
                        current = rows
                    multiply_tiles(
                        word,
                        1 if rows > 16 else 0,
                        wide,
                        1 if add or front > 0 else 0,
                        steps,
                        a.ctypes.data + front * a.strides[0] + (a_row + top) * ROW,
                        a.strides[0],
                        b.ctypes.data + panel * b.strides[0] + front * SPAN * ROW,
                        b.strides[0],
                        c.ctypes.data + panel * c.strides[0] + (c_row + top) * ROW,
                        c.strides[0],
                    )
    return current
