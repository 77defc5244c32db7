"""Keccak, the hash of Ethereum, and the addresses that Swarm gives to chunks of a file.

    keccak-f[1600]  24 rounds of theta, rho, pi, chi and iota over 5 x 5 words of 64 bits      (Bertoni et al. 2011; FIPS 202)
    keccak256(m)    the first 4 words, after all 136 bytes of m 0x01 0 ... 0 0x80 in turn were added (as before FIPS 202)
    root(x)         keccak256(x) of 64 bytes, else keccak256(root(left half) root(right half)) (binary Merkle tree, BMT)
    address(x, n)   keccak256(n root(x)), n in 8 bytes: how many bytes of the file lie below   (The Book of Swarm, 2.2)

x has 4,096 bytes: what a chunk holds, then zeros. Words are little-endian. Hashes are made LANES at a time, side by side in
vectors: state[i, k] is word x + 5 y = i of hash k. Numba does not find these vectors, so a round is in LLVM's language.
"""

from typing import Any, no_type_check

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from .compile import kernel
from .types import Array

CHUNK = 4096  # bytes that a chunk holds at most
LANES = 8  # hashes side by side: words of a register of AVX-512, of two of AVX2
RATE = 17  # words of a message that are added between two permutations
WORDS = CHUNK // 8


def _round_constants() -> Array:
    """(24,) uint64: bits of a shift register with the polynomial x^8 + x^6 + x^5 + x^4 + 1."""
    constants, register = [0] * 24, 1
    for r in range(24):
        for j in range(7):
            constants[r] |= (register & 1) << ((1 << j) - 1)
            register = register << 1 ^ (0x171 if register >> 7 else 0)
    return np.array(constants, np.uint64)


def _path() -> list[tuple[int, int, int]]:
    """Of each word but the first: from where rho and pi take it, where they put it, and by how many bits they turn it."""
    path, x, y = [], 1, 0
    for t in range(24):
        path.append((x + 5 * y, y + 5 * ((2 * x + 3 * y) % 5), (t + 1) * (t + 2) // 2 % 64))
        x, y = y, (2 * x + 3 * y) % 5
    return path


CONSTANTS, PATH = _round_constants(), _path()


@intrinsic
@no_type_check
def _round(typingctx, state, constant):
    """One round of all lanes of the state (25, LANES) uint64 at an address."""

    def generate(context, builder, signature, arguments):
        kind = ir.VectorType(ir.IntType(64), LANES)
        shift = builder.module.declare_intrinsic(f"llvm.fshl.v{LANES}i64", (), ir.FunctionType(kind, [kind] * 3))
        turned = lambda word, bits: builder.call(shift, [word, word, ir.Constant(kind, [bits] * LANES)])
        start = builder.inttoptr(arguments[0], kind.as_pointer())
        places = [builder.gep(start, [ir.IntType(64)(i)]) for i in range(25)]
        s = [builder.load(place, align=8) for place in places]
        columns = [_sum(builder, s[x::5]) for x in range(5)]
        theta = [builder.xor(columns[x - 1], turned(columns[(x + 1) % 5], 1)) for x in range(5)]
        s = [builder.xor(word, theta[i % 5]) for i, word in enumerate(s)]
        moved = s[:1] * 25
        for source, target, bits in PATH:
            moved[target] = turned(s[source], bits)
        for i, place in enumerate(places):
            y, x = i - i % 5, i % 5
            word = builder.xor(moved[i], builder.and_(builder.not_(moved[y + (x + 1) % 5]), moved[y + (x + 2) % 5]))
            if i == 0:
                splat = ir.Constant(kind, ir.Undefined)
                for k in range(LANES):
                    splat = builder.insert_element(splat, arguments[1], ir.IntType(32)(k))
                word = builder.xor(word, splat)
            builder.store(word, place, align=8)
        return context.get_dummy_value()

    return types.void(types.int64, types.uint64), generate


@no_type_check
def _sum(builder, words):
    total = words[0]
    for word in words[1:]:
        total = builder.xor(total, word)
    return total


@kernel
def permute(state: Array) -> None:
    """state (25, LANES) uint64 = keccak-f[1600] of each lane."""
    start: Any = state.ctypes.data
    for r in range(24):
        _round(start, CONSTANTS[r])


@kernel
def addresses(out: Array, chunks: Array, spans: Array) -> None:
    """out (n,4) uint64 = the addresses of chunks (n,512) uint64 with spans (n,) uint64, the bytes that lie below each."""
    state, level = np.empty((25, LANES), np.uint64), np.empty((WORDS, LANES), np.uint64)
    for first in range(0, spans.size, LANES):
        lanes = min(LANES, spans.size - first)  # what is in the others goes nowhere
        for k in range(lanes):
            for i in range(WORDS):
                level[i, k] = chunks[first + k, i]
        words = WORDS
        while words > 4:
            for i in range(0, words, 8):
                keccak256(state, level, i, 8)
                for j in range(4):
                    for k in range(LANES):
                        level[i // 2 + j, k] = state[j, k]
            words //= 2
        for j in range(4):
            for k in range(LANES):
                level[j + 1, k] = state[j, k]
        for k in range(lanes):
            level[0, k] = spans[first + k]
        keccak256(state, level, 0, 5)
        for k in range(lanes):
            for j in range(4):
                out[first + k, j] = state[j, k]


@kernel
def keccak256(state: Array, words: Array, first: int, n: int) -> None:
    """state (25, LANES)[:4] = keccak256 of each lane of words (m, LANES)[first : first + n] uint64, n < RATE - 1."""
    for j in range(25):
        for k in range(LANES):
            state[j, k] = words[first + j, k] if j < n else np.uint64(0)
    for k in range(LANES):
        state[n, k] = np.uint64(1)
        state[RATE - 1, k] = np.uint64(1 << 63)
    permute(state)


def keccak256_reference(message: bytes) -> bytes:
    """keccak256 of bytes, 32 of them, in Python's own numbers and as the specification has it."""
    message += b"\1" + bytes(-(len(message) + 1) % (8 * RATE))
    message = message[:-1] + bytes([message[-1] | 0x80])
    A = {(x, y): 0 for x in range(5) for y in range(5)}
    for start in range(0, len(message), 8 * RATE):
        for i in range(RATE):
            A[i % 5, i // 5] ^= int.from_bytes(message[start + 8 * i : start + 8 * i + 8], "little")
        for r in range(24):
            A = _round_reference(A, int(CONSTANTS[r]))
    return b"".join(A[x, 0].to_bytes(8, "little") for x in range(4))


def _round_reference(A: dict[tuple[int, int], int], constant: int) -> dict[tuple[int, int], int]:
    C = [A[x, 0] ^ A[x, 1] ^ A[x, 2] ^ A[x, 3] ^ A[x, 4] for x in range(5)]
    A = {(x, y): word ^ C[x - 1] ^ _turned(C[(x + 1) % 5], 1) for (x, y), word in A.items()}
    B, x, y = {(0, 0): A[0, 0]}, 1, 0
    for t in range(24):
        B[y, (2 * x + 3 * y) % 5] = _turned(A[x, y], (t + 1) * (t + 2) // 2 % 64)
        x, y = y, (2 * x + 3 * y) % 5
    A = {(x, y): B[x, y] ^ (~B[(x + 1) % 5, y] & B[(x + 2) % 5, y]) for x, y in B}
    A[0, 0] ^= constant
    return A


def _turned(word: int, bits: int) -> int:
    return (word << bits | word >> (64 - bits)) & ((1 << 64) - 1)


def address_reference(payload: bytes, span: int) -> bytes:
    """The address of a chunk of at most 4,096 bytes, 32 bytes."""
    level = payload + bytes(CHUNK - len(payload))
    while len(level) > 32:
        level = b"".join(keccak256_reference(level[i : i + 64]) for i in range(0, len(level), 64))
    return keccak256_reference(span.to_bytes(8, "little") + level)
