"""The tile instructions of amx_emulator.py: decoded and executed by a native function that Numba makes."""

import ctypes
from typing import no_type_check

import numpy as np
from numba import carray, cfunc, njit, types
from numba.core import cgutils
from numba.extending import intrinsic

SIGILL, SA_SIGINFO, SA_NODEFER = 4, 4, 0x40000000
REGISTERS = np.array([13, 14, 12, 11, 15, 10, 9, 8, 0, 1, 2, 3, 4, 5, 6, 7])  # rax rcx rdx rbx ... in Linux's order
RIP = 16
GREGS = 40  # where the registers begin in ucontext_t
TILE = 1024  # bytes
CONFIG = 8 * TILE  # where the configuration stands behind a thread's tiles
SUMS = CONFIG + 64  # and scratch behind that
STATE = SUMS + 2 * 64

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
def _size(state, tile):
    """Rows and bytes of a row of a tile as it is configured, 0 of both where it is not."""
    config = _bytes(state + CONFIG, 64)
    return np.int64(config[48 + tile]), np.int64(config[16 + 2 * tile]) + 256 * np.int64(config[17 + 2 * tile])


@njit
def _widened(half):
    """The float32 of 16 bits of bfloat16, subnormals as zero, in a word."""
    return np.uint32(0) if half & np.uint32(0x7F80) == 0 else np.uint32(half << np.uint32(16))


@njit
def _dot_bf16(state, c, a, b):
    """TDPBF16PS: even and odd products apart, each rounded; subnormals are zero."""
    rows, columns = _size(state, c)
    even, odd = _floats(state + SUMS, 16), _floats(state + SUMS + 64, 16)
    word = np.empty(2, np.uint32)
    value = word.view(np.float32)
    factors = np.empty((2, 16), np.uint32)
    for m in range(rows):
        even[:] = 0
        odd[:] = 0
        left = _words(state + a * TILE + 64 * m, 16)
        for k in range(_size(state, a)[1] // 4):
            right = _words(state + b * TILE + 64 * k, 16)
            word[0], word[1] = _widened(left[k] & np.uint32(0xFFFF)), _widened(left[k] >> np.uint32(16))
            for n in range(16):
                factors[0, n], factors[1, n] = _widened(right[n] & np.uint32(0xFFFF)), _widened(right[n] >> np.uint32(16))
            floats = factors.view(np.float32)
            for n in range(16):
                even[n] += value[0] * floats[0, n]
                odd[n] += value[1] * floats[1, n]
        out = _floats(state + c * TILE + 64 * m, 16)
        for n in range(columns // 4):
            total = out[n] + (even[n] + odd[n])
            out[n] = np.float32(0) if abs(total) < np.float32(2.0**-126) else total


@njit
def _dot_int8(state, c, a, b, unsigned_a, unsigned_b):
    """TDPBSSD, TDPBSUD, TDPBUSD and TDPBUUD."""
    rows, columns = _size(state, c)
    for m in range(rows):
        left, out = _bytes(state + a * TILE + 64 * m, 64), _words(state + c * TILE + 64 * m, 16)
        for n in range(columns // 4):
            total = np.int64(np.int32(out[n]))
            for k in range(_size(state, a)[1]):
                one, other = left[k], _bytes(state + b * TILE + 64 * (k // 4) + 4 * n + k % 4, 1)[0]
                total += (np.int64(one) if unsigned_a else np.int64(np.int8(one))) * (
                    np.int64(other) if unsigned_b else np.int64(np.int8(other))
                )
            out[n] = np.uint32(total & 0xFFFFFFFF)


@njit
def _execute(state, registers, code):
    """Execute what stands at `code`. Returns its length, 0 where it is no tile instruction or the processor refuses it."""
    if code[0] != 0xC4 or code[1] & 0x1F != 2:
        return 0
    prefix, opcode, modrm = code[2] & 3, code[3], code[4]
    mode, register, rm = modrm >> 6, (modrm >> 3) & 7, modrm & 7
    if opcode == 0x49 and mode == 3:
        if prefix == 0:  # TILERELEASE
            _bytes(state, CONFIG + 64)[:] = 0
            return 5
        if prefix != 3 or _size(state, register)[0] == 0:  # else TILEZERO
            return 0
        _bytes(state + register * TILE, TILE)[:] = 0
        return 5
    if opcode in (0x5C, 0x5E) and mode == 3:
        c, a, b = np.int64(register), np.int64(rm), np.int64(~(code[2] >> 3) & 0xF)
        (rows, columns), (a_rows, depth), (b_rows, b_columns) = _size(state, c), _size(state, a), _size(state, b)
        if rows == 0 or rows != a_rows or depth != 4 * b_rows or columns != b_columns or len({a, b, c}) < 3:
            return 0
        if opcode == 0x5C and prefix == 2:
            _dot_bf16(state, c, a, b)
        elif opcode == 0x5E:
            _dot_int8(state, c, a, b, prefix in (0, 1), prefix in (0, 2))
        else:
            return 0
        return 5
    if opcode not in (0x49, 0x4B) or mode == 3:
        return 0
    # An address: base + index << scale + displacement.
    length, base, index, scale = 5, np.int64(rm | (np.int64(~code[1] & 0x20) >> 2)), np.int64(4), np.int64(0)
    if rm == 4:
        sib, length = code[5], 6
        scale = np.int64(sib >> 6)
        index = np.int64(((sib >> 3) & 7) | (np.int64(~code[1] & 0x40) >> 3))
        base = np.int64((sib & 7) | (np.int64(~code[1] & 0x20) >> 2))
    shift = np.int64(0)
    if mode == 1:
        shift, length = np.int64(np.int8(code[length])), length + 1
    elif mode == 2:
        for i in range(4):
            shift |= np.int64(code[length + i]) << (8 * i)
        shift, length = (shift ^ 0x80000000) - 0x80000000, length + 4
    elif base & 7 == 5:
        return 0  # no base: LLVM does not write that here
    address = np.int64(registers[REGISTERS[base]]) + shift
    stride = np.int64(registers[REGISTERS[index]]) << scale if index != 4 else np.int64(0)
    if opcode == 0x49:  # LDTILECFG
        if prefix != 0:
            return 0
        if index != 4:
            address += stride
        _bytes(state, CONFIG)[:] = 0
        _bytes(state + CONFIG, 64)[:] = _bytes(address, 64)
        return length if _bytes(address, 1)[0] == 1 else 0
    rows, columns = _size(state, register)
    if rows == 0:
        return 0
    for m in range(rows):
        tile, memory = _bytes(state + register * TILE + 64 * m, 64), _bytes(address + m * stride, columns)
        if prefix == 2:  # TILESTORED
            memory[:] = tile[:columns]
        else:  # TILELOADD, TILELOADDT1
            tile[:] = 0
            tile[:columns] = memory
    return length


def handle_illegal_instructions(libc: ctypes.CDLL) -> None:
    """Let SIGILL execute tile instructions, and end the process at others."""
    key = ctypes.c_uint32()
    if libc.pthread_key_create(ctypes.byref(key), None):
        raise OSError("no key for the threads' tiles")
    number = key.value

    @cfunc(types.void(types.int32, types.uintp, types.uintp), nopython=True)
    def handler(signal, information, context):
        state = _key(np.uint32(number))
        if state == 0:
            state = _calloc(np.uintp(1), np.uintp(STATE))
            _set_key(np.uint32(number), state)
        registers = carray(_pointer(context + np.uintp(GREGS)), 23, np.uint64)
        length = _execute(np.int64(state), registers, _bytes(registers[RIP], 15))
        registers[RIP] += np.uint64(length)
        if length == 0:
            _signal(np.int32(SIGILL), np.uintp(0))  # the default, which ends the process

    class Action(ctypes.Structure):
        _fields_ = (
            ("handler", ctypes.c_void_p), ("mask", ctypes.c_ulong * 16), ("flags", ctypes.c_int), ("restorer", ctypes.c_void_p),
        )  # fmt: skip

    action = Action(handler.address, (ctypes.c_ulong * 16)(), SA_SIGINFO | SA_NODEFER, None)
    if libc.sigaction(SIGILL, ctypes.byref(action), None):
        raise OSError("SIGILL cannot be handled")
    _kept.append(handler)


_kept: list[object] = []  # the handler's machine code lives as long as this
