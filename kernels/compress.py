r"""Vectors made short for the wire, and read again: an encoder beside its decoder, for float32 and float64.

    signs     x ~ s sign(x), s >= 0                                      1 bit a value     (Bernstein et al. 2018)
    levels    x ~ m q / 127, m the largest |x| of a block, q int8        8 bits            (QSGD, Alistarh et al. 2017)
    bfloat16  x rounded to 8 significant bits                            16 bits
    sparse    some values and where they stand: the largest, or random ones                (Stich et al. 2018)

x (n,) are the values, `out` (n,) is what the receiver makes of them: decoded values times `weight`, added to `out` where `add`
is True, else instead of what was there. What is not finite in x is not finite in `out`, unless it was not sent.
"""

from typing import Any

import numpy as np

from .compile import kernel
from .dropout import philox
from .types import Array, DType, Int

BLOCK = 2048  # values that share a largest magnitude; larger: fewer bytes, coarser levels
LEVELS = 127  # on either side of zero
GROUP = 128  # values whose random numbers are made at a time: of 16 counters, 4 words each, 2 halves of a word
STREAM = 0xFF  # keeps random numbers apart from those of dropout with the same seed, where the layer's number stands
DIGIT = 16  # bits of the threshold that each pass over x finds

_WORD, _LOW = np.uint64(0xFFFFFFFF), np.uint64(0xFFFF)
_32, _16, _8 = np.uint64(32), np.uint64(16), np.uint64(8)


@kernel
def add_values(out: Array, x: Array, weight: float, add: bool) -> None:
    """out = x, in full."""
    weight, zero = out.dtype.type(weight), out.dtype.type(0)
    for i in range(out.size):
        out[i] = weight * x[i] + (out[i] if add else zero)


# signs


@kernel
def sum_of_magnitudes(x: Array) -> float:
    """sum_i |x_i|, added up in float64 by blocks of 4096."""
    total = 0.0
    for start in range(0, x.size, 4096):
        block = x[start : start + 4096]
        part = x.dtype.type(0)
        for i in range(block.size):
            part += abs(block[i])
        total += part
    return total


@kernel
def pack_signs(bits: Array, x: Array) -> None:
    """bits (ceil(n/8),) uint8: bit i mod 8, the lowest first, of byte i div 8 is 1 where x_i >= 0. Bits beyond n are 0."""
    whole = x.size // 8
    for i in range(whole):
        bits[i] = _byte(x[8 * i :], 8)
    if whole < bits.size:
        bits[whole] = _byte(x[8 * whole :], x.size % 8)


@kernel
def _byte(x: Array, length: int) -> int:
    byte: Any = 0
    for j in range(length):
        byte |= np.int64(x[j] >= 0) << j
    return byte


@kernel
def unpack_signs(out: Array, bits: Array, scale: float, first: int = 0) -> None:
    """out = scale where a bit is 1, -scale where it is 0, by n bits of which the first is number `first`."""
    _signs(out, bits, scale, first, False)


@kernel
def add_signs(out: Array, bits: Array, scale: float, first: int = 0) -> None:
    """out += scale where a bit is 1, -scale where it is 0."""
    _signs(out, bits, scale, first, True)


@kernel
def _signs(out: Array, bits: Array, scale: float, first: int, add: bool) -> None:
    high = out.dtype.type(scale)
    head = min(-first % 8, out.size)  # values before the first whole byte
    tail = out.size - (out.size - head) % 8
    _some_signs(out[:head], bits, first, high, add)
    _bytes_of_signs(out[head:tail], bits[(first + head) // 8 :], high, add)
    _some_signs(out[tail:], bits, first + tail, high, add)


@kernel
def _some_signs(out: Array, bits: Array, first: int, high: float, add: bool) -> None:
    for i in range(out.size):
        place = first + i
        value = high if bits[place // 8] >> (place % 8) & 1 else -high
        out[i] = value + out[i] if add else value


@kernel
def _bytes_of_signs(out: Array, bits: Array, high: float, add: bool) -> None:
    zero = out.dtype.type(0)
    for i in range(out.size // 8):
        byte, part = np.int32(bits[i]), out[8 * i : 8 * i + 8]
        for j in range(8):
            part[j] = (high if byte >> np.int32(j) & np.int32(1) else -high) + (part[j] if add else zero)


def warm_up_signs(dtype: DType) -> None:
    """Run what a vote on signs needs once: it is compiled then, or loaded from the cache."""
    x, bits = np.zeros(8, dtype), np.zeros(1, np.uint8)
    pack_signs(bits, x)
    add_signs(x, bits, 1.0)


# levels


@kernel
def quantise(q: Array, norms: Array, x: Array, seed: int, step: int, rank: int) -> None:
    """q (n,) int8 = floor(127 x / m + u) by blocks of 2048, m in norms (ceil(n/2048),) float32, u even in (0, 1).

    So E[m q / 127] = x, to 2^-17 of a level, and whole levels stay what they are. QSGD in its form with the largest magnitude
    of a block for the norm. u follows from (seed, step, rank, position) alone. A block below 2^-100 counts as zero.
    """
    real = x.dtype.type
    most = real(LEVELS)
    noise = np.empty(GROUP, x.dtype)
    for b in range(norms.size):
        block, levels = x[b * BLOCK : (b + 1) * BLOCK], q[b * BLOCK : (b + 1) * BLOCK]
        m = largest_magnitude(block)
        if not 2.0**-100 < m < np.inf:  # else 127 / m is infinite
            norms[b] = 0 if m <= 2.0**-100 else np.nan
            levels[:] = 0
            continue
        norms[b], scale = m, real(LEVELS / np.float64(m))
        for first in range(0, block.size, GROUP):
            uniforms(noise, (b * BLOCK + first) // GROUP, seed, step, rank)
            part, level = block[first : first + GROUP], levels[first : first + GROUP]
            for i in range(part.size):
                y = np.floor(part[i] * scale + noise[i])
                level[i] = np.int8(max(min(y, most), -most))  # scale is rounded, so y may be one too far


@kernel
def dequantise(out: Array, q: Array, norms: Array, weight: float, add: bool) -> None:
    """out = m q / 127."""
    real = out.dtype.type
    for b in range(norms.size):
        part, levels, scale = out[b * BLOCK : (b + 1) * BLOCK], q[b * BLOCK : (b + 1) * BLOCK], real(weight * norms[b] / LEVELS)
        for i in range(part.size):
            part[i] = scale * real(levels[i]) + (part[i] if add else real(0))


@kernel
def largest_magnitude(x: Array) -> np.float32:
    """max |x_i| as a float32; not a number where any is not."""
    largest = np.uint32(0)  # bits, ordered like magnitudes, NaN last
    for i in range(x.size):
        bits = np.float32(x[i]).view(np.uint32) & np.uint32(0x7FFFFFFF)
        largest = np.uint32(bits) if bits > largest else largest
    return np.uint32(largest).view(np.float32)


@kernel
def uniforms(noise: Array, group: int, seed: int, step: int, rank: int) -> None:
    """noise (128,) = random odd multiples of 2^-17 in (0, 1): their sum with 127 is exact in float32, and below 128."""
    c2, c3, k0, k1 = _counter(seed, step)
    real, unit, half = noise.dtype.type, noise.dtype.type(2.0**-16), noise.dtype.type(2.0**-17)
    for j in range(16):
        words = philox(np.uint64(group * 16 + j), np.uint64(rank), c2, c3, k0, k1)
        for w in range(4):
            noise[32 * w + j] = real(words[w] & _LOW) * unit + half
            noise[32 * w + 16 + j] = real(words[w] >> _16) * unit + half


@kernel
def _counter(seed: Int, step: Int) -> tuple[np.uint64, np.uint64, np.uint64, np.uint64]:
    """Two words of a counter of philox (dropout.py), and its key."""
    seed, step = np.uint64(seed), np.uint64(step)
    return step & _WORD, np.uint64(STREAM) | ((step >> _32) << _8), seed & _WORD, seed >> _32


# bfloat16


@kernel
def round_bf16(halves: Array, x: Array) -> None:
    """halves (n,) uint16 = x to the nearest bfloat16, to even; float64 by way of float32. NaN stays NaN.

    By whole numbers, unlike vectors.py: the instruction there makes zeros of subnormals, and not all processors have it.
    """
    for i in range(x.size):
        bits = np.float32(x[i]).view(np.uint32)
        nearest = (bits + np.uint32(0x7FFF) + (bits >> np.uint32(16) & np.uint32(1))) >> np.uint32(16)
        quiet = bits >> np.uint32(16) | np.uint32(0x40)
        halves[i] = quiet if bits & np.uint32(0x7FFFFFFF) > np.uint32(0x7F800000) else nearest


@kernel
def widen_bf16(out: Array, halves: Array, weight: float, add: bool) -> None:
    """out = the values of halves (n,) uint16."""
    real = out.dtype.type
    weight = real(weight)
    for i in range(out.size):
        value = np.uint32(np.uint32(halves[i]) << np.uint32(16)).view(np.float32)
        out[i] = weight * real(value) + (out[i] if add else real(0))


# sparse


@kernel
def select_largest(indices: Array, values: Array, x: Array, words: Array, counts: Array) -> None:
    """indices (k,) int32, ascending, and values (k,) of the k largest magnitudes; of equal ones the first; NaN is largest.

    words (n,): the bits of x as unsigned integers, which without the sign are ordered like magnitudes.
    counts (65536,) int64: scratch.
    """
    threshold, ties = kth_largest(counts, words, indices.size)
    whole = words.dtype.type
    mask, least = whole((1 << (8 * words.itemsize - 1)) - 1), whole(threshold)
    at = 0
    for start in range(0, words.size, 64):
        part, hits = words[start : start + 64], 0
        for j in range(part.size):
            hits += (part[j] & mask) >= least
        if hits == 0:  # most of the time, and found by few instructions
            continue
        for j in range(part.size):
            magnitude = part[j] & mask
            if magnitude < least or (magnitude == least and ties == 0):
                continue
            ties -= magnitude == least
            indices[at], values[at] = start + j, x[start + j]
            at += 1


@kernel
def kth_largest(counts: Array, words: Array, k: int) -> tuple[np.uint64, int]:
    """The k-th largest of words (n,) without their first bit, and how many equal to it are among the k. Radix selection:
    each pass counts the next 16 bits of those words that begin like it.
    """
    above = 8 * words.itemsize - 1
    mask, found = np.uint64((1 << above) - 1), np.uint64(0)
    while above > 0:
        low = max(above - DIGIT, 0)
        digit = np.uint64((1 << (above - low)) - 1)
        counts[:] = 0
        for i in range(words.size):
            magnitude = np.uint64(words[i]) & mask
            if magnitude >> np.uint64(above) == found:
                counts[np.int64(magnitude >> np.uint64(low) & digit)] += 1
        d = np.int64(digit)
        while counts[d] < k:
            k -= counts[d]
            d -= 1
        found, above = found << np.uint64(above - low) | np.uint64(d), low
    return found, k


@kernel
def random_indices(indices: Array, n: int, seed: int, step: int) -> None:
    """indices (k,) int32: k different ones of 0 .. n - 1, each with probability k / n exactly, by (seed, step) alone.

    One at random in each of k stretches that divide the n, then all are turned by the same random distance, around the end:
    so unequal stretches do not matter, and indices ascend but for one jump.
    """
    c2, c3, k0, k1 = _counter(seed, step)
    high, low, _, _ = philox(_WORD, _WORD, c2, c3, k0, k1)
    turn = np.int64((high << _32 | low) % np.uint64(n)) if n else 0
    k, stop = indices.size, 0
    for j in range(k):
        start, stop = stop, (j + 1) * n // k
        if j % 4 == 0:
            words = philox(np.uint64(j // 4), _WORD, c2, c3, k0, k1)
        place = start + np.int64(words[j % 4] * np.uint64(stop - start) >> _32) + turn
        indices[j] = place - n if place >= n else place


@kernel
def gather(values: Array, indices: Array, x: Array, weight: float) -> None:
    """values (k,) = weight x[indices]."""
    weight = x.dtype.type(weight)
    for j in range(indices.size):
        values[j] = weight * x[indices[j]]


@kernel
def scatter_add(out: Array, indices: Array, values: Array, weight: float) -> None:
    """out[indices] += weight values (k,)."""
    weight = out.dtype.type(weight)
    for j in range(indices.size):
        out[indices[j]] += weight * values[j]
