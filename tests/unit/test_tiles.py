"""Intel's tiles at work: single instructions against plain oracles, what the processor refuses, and the loop around them.

These need AMX. Where there is none, test_amx.py runs them with the emulator (helpers/amx_emulator.py); on a Xeon they show
that the emulator does what the processor does.
"""

import faulthandler
import os
import signal

import numpy as np
import pytest
from helpers.numerics import guarded
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

from dllm.kernels import amx, gemm, processor
from dllm.kernels.team import Team

pytestmark = pytest.mark.skipif(not processor.AMX, reason="this process may use no AMX: test_amx.py emulates it")
I8, I64, ROW = ir.IntType(8), ir.IntType(64), 64
RNG = np.random.default_rng(1)
UNSIGNED = {"tdpbssd": (), "tdpbsud": "b", "tdpbusd": "a", "tdpbuud": "ab"}


def by_instructions(product, configured=True, tiles=(1, 4, 6)):
    """A function of four addresses: a configuration, A, B and C; C += A B by one product. product: None for an invalid one."""

    @intrinsic
    def emitted(typingctx, config, a, b, c):
        def generate(context, builder, signature, arguments):
            def emit(name, *values):
                kind = ir.FunctionType(ir.VoidType(), [value.type for value in values])
                builder.call(builder.module.declare_intrinsic("llvm.x86." + name, (), kind), values)

            config, *places = (builder.inttoptr(argument, I8.as_pointer()) for argument in arguments)
            if product is None:
                kind = ir.FunctionType(ir.VoidType(), ())
                builder.call(builder.module.declare_intrinsic("llvm.trap", (), kind), ())  # ud2
                return context.get_dummy_value()
            if configured:
                emit("ldtilecfg", config)
            for tile, place in zip(tiles, (places[2], *places[:2]), strict=True):
                emit("tileloadd64", I8(tile), place, I64(ROW))
            emit(product, *map(I8, tiles))
            emit("tilestored64", I8(tiles[0]), places[2], I64(ROW))
            emit("tilerelease")
            return context.get_dummy_value()

        return types.void(*[types.int64] * 4), generate

    @njit
    def run(config, a, b, c):
        emitted(config, a, b, c)

    run.compile((types.int64,) * 4)
    return lambda *arrays: run(*(array.ctypes.data for array in arrays))


def configuration(rows, words, columns, tiles=(1, 4, 6)):
    """The 64 bytes of a C tile (rows,columns), an A tile (rows,words) and a B tile (words,columns), of 4 bytes each."""
    config = np.zeros(64, np.uint8)
    config[0] = 1
    for tile, (height, width) in zip(tiles, ((rows, columns), (rows, words), (words, columns)), strict=True):
        config[16 + 2 * tile], config[48 + tile] = 4 * width, height
    return config


def flushed(x):
    """float32 without subnormals."""
    x = np.asarray(x, np.float64).astype(np.float32)
    return np.where(abs(x) < np.float32(2.0**-126), np.copysign(np.float32(0), x), x)


def dot_bf16(c, a, b):
    """C (m,n) float32 + A (m,k) B (k,n) of words, two bfloat16 each: even and odd ones are summed apart."""
    sums = np.zeros((2, *c.shape), np.float32)
    halves = [[flushed((x >> np.uint32(16 * odd) << np.uint32(16)).view(np.float32)) for odd in range(2)] for x in (a, b)]
    for k in range(len(b)):
        for odd in range(2):
            product = halves[0][odd][:, k, None].astype(np.float64) * halves[1][odd][k].astype(np.float64)
            sums[odd] = flushed(sums[odd] + product)
    return flushed(flushed(c) + flushed(sums[0] + sums[1]))


def numbers(shape, smallest):
    """float32 of very different sizes, some of them zero; smallest: the exponent of the smallest."""
    return np.ldexp(RNG.standard_normal(shape), RNG.integers(smallest, 4, shape)).astype(np.float32) * (RNG.random(shape) > 0.1)


def halves(shape, smallest):
    """Words of two such numbers as bfloat16."""
    return numbers((*shape[:-1], 2 * shape[-1]), smallest).view(np.uint16)[..., 1::2].copy().view(np.uint32)


SIZES = [(1, 1, 1), (16, 16, 16), (16, 1, 16), (5, 16, 3), (3, 7, 16), (16, 13, 11)]


@pytest.mark.parametrize("smallest", [-6, -140])
def test_products_of_bfloat16_are_those_of_the_manual_to_the_bit(smallest):
    run = by_instructions("tdpbf16ps")
    for rows, words, columns in SIZES:
        a, b = np.zeros((rows, 16), np.uint32), np.zeros((words, 16), np.uint32)
        c = np.full((rows, 16), np.nan, np.float32)
        a[:, :words], b[:, :columns] = halves((rows, words), smallest), halves((words, columns), smallest)
        c[:, :columns] = start = numbers((rows, columns), smallest)
        run(configuration(rows, words, columns), guarded(a), guarded(b), c)
        np.testing.assert_array_equal(
            c[:, :columns].view(np.uint32), dot_bf16(start, a[:, :words], b[:, :columns]).view(np.uint32)
        )
        assert np.isnan(c[:, columns:]).all()


@pytest.mark.skipif(not processor.AMX_INT8, reason="there are no tiles of int8 here")
@pytest.mark.parametrize("product", UNSIGNED)
def test_products_of_bytes_are_those_of_the_manual(product):
    run = by_instructions(product)
    for rows, words, columns in SIZES:
        a, b = RNG.integers(0, 256, (rows, 64), np.uint8), RNG.integers(0, 256, (words, 64), np.uint8)
        c = RNG.integers(-(2**31), 2**31, (rows, 16), np.int32)
        expected = c.astype(np.int64)
        wide = lambda x, name: x.astype(np.int64) if name in UNSIGNED[product] else x.view(np.int8).astype(np.int64)
        right = wide(b, "b").reshape(words, 16, 4)[:, :columns].transpose(0, 2, 1).reshape(4 * words, columns)
        expected[:, :columns] += wide(a, "a")[:, : 4 * words] @ right
        run(configuration(rows, words, columns), a, b, c)
        np.testing.assert_array_equal(c, (expected + 2**31) % 2**32 - 2**31)


def changed(*bytes_of_config):
    config = configuration(16, 16, 16)
    for place, value in bytes_of_config:
        config[place] = value
    return config


WHOLE = configuration(16, 16, 16)
REFUSED = {
    "no tile instruction": (None, {}, WHOLE, signal.SIGILL),
    "no configuration": ("tdpbf16ps", {"configured": False}, WHOLE, signal.SIGILL),
    "a tile that is not configured": ("tdpbf16ps", {"tiles": (0, 4, 6)}, WHOLE, signal.SIGILL),
    "C and A of other heights": ("tdpbf16ps", {}, changed((49, 15)), signal.SIGILL),
    "A wider than B is high": ("tdpbf16ps", {}, changed((54, 15)), signal.SIGILL),
    "C and B of other widths": ("tdpbf16ps", {}, changed((18, 60)), signal.SIGILL),
    "rows of C that are no words": ("tdpbf16ps", {}, changed((18, 62), (28, 62)), signal.SIGILL),
    "a palette that is not there": ("tdpbf16ps", {}, changed((0, 2)), signal.SIGSEGV),
    "a reserved byte": ("tdpbf16ps", {}, changed((15, 1)), signal.SIGSEGV),
    "too many rows": ("tdpbf16ps", {}, changed((49, 17)), signal.SIGSEGV),
    "too long rows": ("tdpbf16ps", {}, changed((18, 65)), signal.SIGSEGV),
    "rows of no length": ("tdpbf16ps", {}, changed((48, 16)), signal.SIGSEGV),
}


def signal_of(call):
    """The signal that ends a child process that makes a call, 0: none."""
    child = os.fork()
    if not child:
        faulthandler.disable()
        call()
        os._exit(0)
    return os.waitpid(child, 0)[1] & 0x7F


@pytest.mark.parametrize("what", REFUSED)
def test_what_the_processor_refuses_ends_the_process(what):
    product, options, config, number = REFUSED[what]
    run, (a, b, c) = by_instructions(product, **options), np.zeros((3, 16, 16), np.uint32)
    run_rightly = by_instructions("tdpbf16ps")
    assert signal_of(lambda: run_rightly(WHOLE, a, b, c)) == 0
    run_rightly(WHOLE, a, b, c)
    assert signal_of(lambda: run(config, a, b, c)) in (number, signal.SIGILL)  # the emulator has one end for all


def operands(rows, spans, panels):
    """A, B and C as the kernels have them, of whole numbers, and A B."""
    a, b = (RNG.integers(-3, 4, shape).astype(np.float32) for shape in ((rows, 32 * spans), (32 * spans, 16 * panels)))
    bits = lambda x: (np.ascontiguousarray(x).view(np.uint32) >> np.uint32(16)).astype(np.uint16)
    words = bits(a).view(np.uint32).reshape(rows, spans, 16).transpose(1, 0, 2).copy()
    pairs = bits(b).reshape(16 * spans, 2, panels, 16).transpose(2, 0, 3, 1).copy().view(np.uint32)[..., 0]
    return words, pairs, np.full((panels, rows, 16), np.nan, np.float32), a @ b


def matrix(panels):
    return panels.transpose(1, 0, 2).reshape(panels.shape[1], -1)


@pytest.mark.parametrize("rows", [1, 15, 16, 17, 31, 32, 33, 64, 65, 100])
def test_each_number_of_rows_has_its_configuration(rows):
    """At the edge of memory that cannot be read or written; `multiply` leaves no configuration behind."""
    a, b, c, expected = operands(rows, 3, 3)
    a, b, c = map(guarded, (a, b, c))
    gemm.multiply(c, 0, a, 0, b, rows, 48, False)
    np.testing.assert_array_equal(matrix(c), expected)
    gemm.multiply(c, 0, a, 0, b, rows, 33, True)  # the third span is whole all the same
    np.testing.assert_array_equal(matrix(c), 2 * expected)
    assert signal_of(lambda: by_instructions("tdpbf16ps", configured=False)(WHOLE, a, b, c)) == signal.SIGILL


def test_a_product_over_nothing_reads_nothing():
    a, b, c, expected = operands(5, 1, 2)
    gemm.multiply(c, 0, a, 0, b, 5, 16, False)
    nowhere = guarded(np.zeros((0, 5, 16), np.uint32)), guarded(np.zeros((2, 0, 16), np.uint32))
    for rows, panels in ((5, 2), (0, 2), (5, 0)):
        gemm.multiply(c[:panels], 0, nowhere[0], 0, nowhere[1], rows, 0, True)
    np.testing.assert_array_equal(matrix(c), expected)


def test_blocks_of_k_change_no_bit_and_no_row_knows_its_neighbours():
    """A tall product goes through k in blocks, a short one at one go."""
    spans, rows = amx.DEPTH + 1, amx.FEW + 9
    a = np.stack([halves((rows, 16), -6) for _ in range(spans)])
    b = halves((2, 16 * spans, 16), -6)
    whole = np.full((2, rows, 16), np.nan, np.float32)
    gemm.multiply(whole, 0, a, 0, b, rows, 16 * spans, False)
    expected = np.zeros((3, 32), np.float32)
    for span in range(spans):
        for panel in range(2):
            columns = slice(16 * panel, 16 * panel + 16)
            part = b[panel, 16 * span : 16 * span + 16]
            expected[:, columns] = dot_bf16(expected[:, columns], a[span, [0, 17, rows - 1]], part)
    np.testing.assert_array_equal(matrix(whole)[[0, 17, rows - 1]], expected)
    for first, count in ((0, 1), (3, 64), (amx.FEW, 9), (rows - 1, 1)):
        part = np.full((2, count, 16), np.nan, np.float32)
        gemm.multiply(part, 0, a, first, b, count, 16 * spans, False)
        np.testing.assert_array_equal(part, whole[:, first : first + count])


@njit
def one_behind_the_other(c, a, b, sizes, K):
    tiles, first = 0, 0
    for count in sizes:
        tiles = gemm.multiply_on(tiles, c, first, a, first, b, count, K, False)
        first += count
    gemm.leave_tiles(a)


def test_a_loop_of_products_of_many_heights_in_several_threads():
    sizes = np.array([1, 32, 33, 7, 7, 16, 17, 64, 2, 0, 5])
    a, b, c, expected = operands(sizes.sum(), 2, 3)
    results = [np.full_like(c, np.nan) for _ in range(4)]
    Team(4).run(lambda part: one_behind_the_other(results[part], a, b, sizes, 32))
    for found in results:
        np.testing.assert_array_equal(matrix(found), expected)
