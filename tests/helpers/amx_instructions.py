"""The tile instructions of amx_emulator.py: decoded and executed by a native function that Numba makes.

Source: "Intel 64 and IA-32 Architectures Software Developer's Manual", volume 2, the pages of LDTILECFG, TILELOADD, TILESTORED,
TILEZERO, TILERELEASE, TDPBF16PS and TDPBSSD. The manual's letters: C (m,n) += A (m,k) B (k,n); `colsb` are bytes of a row.
Where the processor raises #UD or #GP, `_execute` refuses, and SIGILL ends the process. A start_row that is not 0 is refused
too: only an interrupted load has one.
"""

import ctypes
from typing import no_type_check

import numpy as np
from numba import carray, cfunc, njit, types
from numba.core import cgutils
from numba.extending import intrinsic

SIGILL, SA_SIGINFO = 4, 4
REGISTERS = np.array([13, 14, 12, 11, 15, 10, 9, 8, 0, 1, 2, 3, 4, 5, 6, 7])  # rax rcx rdx rbx ... in Linux's order
RIP = 16
GREGS = 40  # where the registers begin in ucontext_t
LONGEST = 15  # bytes of an instruction

# What a thread has: eight tiles of 16 rows of 64 bytes, behind them the configuration, behind that scratch.
TILES, ROWS, ROW, TILE = 8, 16, 64, 1024
CONFIG = TILES * TILE
COLSB, HEIGHTS = 16, 48  # of the configuration: bytes of the rows of each tile in two bytes, rows in one
SCRATCH = CONFIG + ROW
STATE = SCRATCH + 4 * ROW

# VEX.128.0F38.W0 with an opcode and one of the prefixes none, 66, F3, F2.
CONFIGURE_OR_ZERO, MOVE, DOT_BF16, DOT_INT8 = 0x49, 0x4B, 0x5C, 0x5E
NONE, P66, PF3, PF2 = 0, 1, 2, 3
TINY = np.float32(2.0**-126)  # below it is zero: DAZ and FTZ

KINDS = ("configurations", "loads", "stores", "zeros", "releases", "bf16 products", "int8 products")
CONFIGURED, LOADED, STORED, ZEROED, RELEASED, BF16, INT8 = range(len(KINDS))
counts = np.zeros(len(KINDS), np.int64)  # of executed instructions; two threads at once may count as one

_key = types.ExternalFunction("pthread_getspecific", types.uintp(types.uint32))
_set_key = types.ExternalFunction("pthread_setspecific", types.int32(types.uint32, types.uintp))
_calloc = types.ExternalFunction("calloc", types.uintp(types.uintp, types.uintp))
_signal = types.ExternalFunction("signal", types.uintp(types.int32, types.uintp))


@intrinsic
@no_type_check
def _pointer(typingctx, address):
    def generate(context, builder, signature, arguments):
        return builder.inttoptr(arguments[0], cgutils.voidptr_t)

    return types.voidptr(types.uintp), generate


@njit
def _bytes(address, count):
    return carray(_pointer(np.uintp(address)), count, np.uint8)


@njit
def _words(address, count):
    return carray(_pointer(np.uintp(address)), count, np.uint32)


@njit
def _floats(address, count):
    return carray(_pointer(np.uintp(address)), count, np.float32)


@njit
def _row(state, tile, row):
    """The address of a row of a tile."""
    return state + tile * TILE + row * ROW


@njit
def _size(state, tile):
    """Rows and bytes of a row of a tile as it is configured, 0 of both where it is not."""
    config = _bytes(state + CONFIG, ROW)
    return np.int64(config[HEIGHTS + tile]), np.int64(config[COLSB + 2 * tile]) + 256 * np.int64(config[COLSB + 2 * tile + 1])


@njit
def _configure(state, memory):
    """LDTILECFG of 64 bytes, which zeroes all tiles; palette 0 leaves them. Returns whether the processor takes it."""
    palette, used, reserved = memory[0], 0, 0
    if palette > 1:
        return False
    for n in range(1, ROW):
        tile = COLSB <= n < COLSB + 2 * TILES or HEIGHTS <= n < HEIGHTS + TILES
        reserved |= 0 if tile else memory[n]  # start_row among them
    for n in range(TILES):
        rows, colsb = memory[HEIGHTS + n], np.int64(memory[COLSB + 2 * n]) + 256 * np.int64(memory[COLSB + 2 * n + 1])
        if rows > ROWS or colsb > ROW or (rows == 0) != (colsb == 0):
            return False
        used += rows
    if palette == 1 and reserved:
        return False
    _bytes(state, CONFIG + ROW)[:] = 0
    if palette == 1:
        _bytes(state + CONFIG, ROW)[:] = memory
    return True


@njit
def _flushed(x):
    """A float32 or float64 as float32, zero of the same sign where that is subnormal."""
    near = np.float32(x)
    return np.copysign(np.float32(0), near) if abs(near) < TINY else near


@njit
def _widened(half):
    """The float32 of 16 bits of bfloat16, in a word; subnormals are zero of the same sign."""
    return np.uint32((half if half & np.uint32(0x7F80) else half & np.uint32(0x8000)) << np.uint32(16))


@njit
def _dot_bf16(state, c, a, b):
    """TDPBF16PS: sums of the even and of the odd products apart, multiplied and added in one rounding each.

    A product of two bfloat16 is exact in float64, and so is the rounding to float32 of its sum with a float32.
    """
    rows, columns = _size(state, c)
    sums, factors = _floats(state + SCRATCH, 32), _words(state + SCRATCH + 2 * ROW, 32)  # even ones, odd ones
    values = _floats(state + SCRATCH + 2 * ROW, 32)
    for m in range(rows):
        sums[:] = 0
        left, out = _words(_row(state, a, m), ROWS), _floats(_row(state, c, m), ROWS)
        for k in range(_size(state, a)[1] // 4):
            right = _words(_row(state, b, k), ROWS)
            for odd in range(2):
                shift = np.uint32(16 * odd)
                factors[0] = _widened(left[k] >> shift & np.uint32(0xFFFF))
                one = np.float64(values[0])
                for n in range(16):
                    factors[16 + n] = _widened(right[n] >> shift & np.uint32(0xFFFF))
                for n in range(16):
                    sums[16 * odd + n] = _flushed(np.float64(sums[16 * odd + n]) + one * np.float64(values[16 + n]))
        for n in range(columns // 4):
            out[n] = _flushed(_flushed(out[n]) + _flushed(sums[n] + sums[16 + n]))


@njit
def _dot_int8(state, c, a, b, unsigned_a, unsigned_b):
    """TDPBSSD, TDPBSUD, TDPBUSD and TDPBUUD: int32 that wraps around."""
    rows, columns = _size(state, c)
    for m in range(rows):
        left, out = _bytes(_row(state, a, m), ROW), _words(_row(state, c, m), ROWS)
        for n in range(columns // 4):
            total = np.int64(np.int32(out[n]))
            for k in range(_size(state, a)[1]):
                one, other = left[k], _bytes(_row(state, b, k // 4) + 4 * n + k % 4, 1)[0]
                factors = (
                    np.int64(one) if unsigned_a else np.int64(np.int8(one)),
                    np.int64(other) if unsigned_b else np.int64(np.int8(other)),
                )
                total += factors[0] * factors[1]
            out[n] = np.uint32(total & 0xFFFFFFFF)


@njit
def _dot(state, counts, prefix, opcode, c, a, b):
    """A product of tiles. Returns whether the processor has and takes it."""
    (rows, columns), (a_rows, depth), (b_rows, b_columns) = _size(state, c), _size(state, a), _size(state, b)
    fit = rows == a_rows and depth == 4 * b_rows and columns == b_columns and columns % 4 == 0
    if a == b or b == c or c == a or not (rows and a_rows and b_rows and fit):
        return False
    if opcode == DOT_BF16:
        if prefix != PF3:  # 66: of complex float16, which no processor with bfloat16 alone has
            return False
        _dot_bf16(state, c, a, b)
    else:
        _dot_int8(state, c, a, b, prefix in (NONE, P66), prefix in (NONE, PF3))
    counts[BF16 if opcode == DOT_BF16 else INT8] += 1
    return True


@njit
def _address(registers, code):
    """What ModRM, SIB and displacement of an instruction name: base + displacement, index << scale, its length."""
    extended, index_extended = np.int64(8 * (code[1] & 0x20 == 0)), np.int64(8 * (code[1] & 0x40 == 0))
    mode, rm, length = code[4] >> 6, code[4] & 7, 5
    base, stride = rm + extended, np.int64(0)
    if rm == 4:
        sib, length = code[5], 6
        base, index = (sib & 7) + extended, ((sib >> 3) & 7) + index_extended
        stride = np.int64(registers[REGISTERS[index]]) << np.int64(sib >> 6) if index != 4 else np.int64(0)
    far = mode == 2 or (mode == 0 and base & 7 == 5)
    shift = np.int64(0)
    if mode == 1:
        shift, length = np.int64(np.int8(code[length])), length + 1
    elif far:
        for i in range(4):
            shift |= np.int64(code[length + i]) << (8 * i)
        shift, length = (shift ^ 0x80000000) - 0x80000000, length + 4
    if mode == 0 and base & 7 == 5:  # no base, or without SIB the address of the next instruction
        return shift if rm == 4 else shift + np.int64(registers[RIP]) + length, stride, length
    return np.int64(registers[REGISTERS[base]]) + shift, stride, length


@njit
def _move(state, counts, prefix, tile, address, stride):
    """TILESTORED, TILELOADD or TILELOADDT1. Returns whether the processor takes it."""
    rows, columns = _size(state, tile)
    if rows == 0 or prefix == NONE:
        return False
    if prefix != PF3:
        _bytes(_row(state, tile, 0), TILE)[:] = 0  # the rest of each row, and the rows below
    for m in range(rows):
        here, memory = _bytes(_row(state, tile, m), columns), _bytes(address + m * stride, columns)
        if prefix == PF3:
            memory[:] = here
        else:
            here[:] = memory
    counts[STORED if prefix == PF3 else LOADED] += 1
    return True


@njit
def _execute(state, counts, registers, code):
    """Execute what stands at `code`. Returns its length, 0 where it is no tile instruction or the processor refuses it."""
    if code[0] != 0xC4 or code[1] & 0x9F != 0x82 or code[2] & 0x84:  # VEX, 0F38, a tile below 8; W = 0, 128 bits
        return 0
    other = np.int64(~code[2] >> 3 & 0xF)  # the third register, 0 where there is none
    prefix, opcode, modrm = code[2] & 3, code[3], code[4]
    mode, register, rm = modrm >> 6, np.int64(modrm >> 3 & 7), np.int64(modrm & 7)
    if opcode in (DOT_BF16, DOT_INT8):
        return 5 if mode == 3 and other < TILES and _dot(state, counts, prefix, opcode, register, rm, other) else 0
    if opcode not in (CONFIGURE_OR_ZERO, MOVE) or other:
        return 0
    if opcode == CONFIGURE_OR_ZERO and mode == 3:
        if prefix == NONE and modrm == 0xC0:  # TILERELEASE
            _bytes(state, CONFIG + ROW)[:] = 0
            counts[RELEASED] += 1
            return 5
        if prefix != PF2 or rm or _size(state, register)[0] == 0:  # else TILEZERO
            return 0
        _bytes(_row(state, register, 0), TILE)[:] = 0
        counts[ZEROED] += 1
        return 5
    if mode == 3:
        return 0
    address, stride, length = _address(registers, code)
    if opcode == MOVE:
        return length if rm == 4 and _move(state, counts, prefix, register, address, stride) else 0
    if prefix != NONE or register or not _configure(state, _bytes(address + stride, ROW)):
        return 0
    counts[CONFIGURED] += 1
    return length


def handle_illegal_instructions(libc: ctypes.CDLL) -> None:
    """Let SIGILL execute tile instructions, and end the process at others."""
    key = ctypes.c_uint32()
    if libc.pthread_key_create(ctypes.byref(key), None):
        raise OSError("no key for the threads' tiles")
    number, at_counts, kinds = key.value, counts.ctypes.data, len(KINDS)

    @cfunc(types.void(types.int32, types.uintp, types.uintp), nopython=True)
    def handler(signal, information, context):
        state = _key(np.uint32(number))
        if state == 0:
            state = _calloc(np.uintp(1), np.uintp(STATE))
            _set_key(np.uint32(number), state)
        registers = carray(_pointer(context + np.uintp(GREGS)), 23, np.uint64)
        executed = carray(_pointer(np.uintp(at_counts)), kinds, np.int64)
        length = _execute(np.int64(state), executed, registers, _bytes(registers[RIP], LONGEST))
        registers[RIP] += np.uint64(length)
        if length == 0:
            _signal(np.int32(SIGILL), np.uintp(0))  # the default, which ends the process at the same instruction

    class Action(ctypes.Structure):
        _fields_ = (
            ("handler", ctypes.c_void_p), ("mask", ctypes.c_ulong * 16), ("flags", ctypes.c_int), ("restorer", ctypes.c_void_p),
        )  # fmt: skip

    action = Action(handler.address, (ctypes.c_ulong * 16)(), SA_SIGINFO, None)
    if libc.sigaction(SIGILL, ctypes.byref(action), None):
        raise OSError("SIGILL cannot be handled")
    _kept.append(handler)


_kept: list[object] = []  # the handler's machine code lives as long as this
