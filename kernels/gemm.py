r"""Matrix products: by BLAS where both factors are large; by a kernel of our own where one has few rows and the other is used
again and again, as in h_{t-1} @ Wh, once a time step. BLAS would pack the weights anew in every call.

The factor that stays, B (K,N), is packed once: cut into panels of R = two vectors of columns, each stored row after row.

             B (K,N)                packed (N/R,K,R)
        +---+---+---+--             +---+
      K | 0 | 1 | 2 |       ->    K | 0 | then panel 1, panel 2, ...; columns beyond N hold anything
        +---+---+---+--             +---+
          R   R   R                   R

A tile of C, at most ROWS x R, stays in registers while one pass over k adds column k of A times row k of the panel:

                 v0   v1            row k of the panel: two vectors, read once for all rows of the tile
      a[0,k] ->  c00  c01
      a[1,k] ->  c10  c11           each c a vector of sums
       ...        ...

While all rows of A pass by, a panel stays in the second-level cache; the rows of A in a tile stay in the first.
"""

import llvmlite.binding
import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic
from scipy.linalg import blas

from .compile import kernel

_FEATURES = llvmlite.binding.get_host_cpu_features()
VECTOR_BYTES = 64 if _FEATURES.get("avx512f") else 32 if _FEATURES.get("avx2") else 16
ROWS = 14 if _FEATURES.get("avx512f") else 6  # with two vectors a row this fills 32 (16) registers
AHEAD = 24  # rows of the panel that are prefetched
DEPTH, HEIGHT = 512, 252  # half a megabyte of float32: a block of A that stays in the second-level cache


def matmul(out, a, b):
    """out = a @ b by BLAS. out (M,N) C-contiguous, a (M,K), b (K,N), which may be transposed views."""
    np.dot(a, b, out=out)


def matmul_add(out, a, b):
    """out += a @ b by BLAS, without a temporary. out (M,N) C-contiguous, a (M,K), b (K,N), which may be transposed views."""
    gemm = blas.sgemm if out.dtype == np.float32 else blas.dgemm
    # BLAS is column-major: it is asked for out^T = b^T a^T, and the transpose of a C-contiguous array is what it wants.
    right, right_transposed = (b.T, False) if b.flags.c_contiguous else (b, True)
    left, left_transposed = (a.T, False) if a.flags.c_contiguous else (a, True)
    result = gemm(1.0, right, left, 1.0, out.T, right_transposed, left_transposed, overwrite_c=True)
    assert np.shares_memory(result, out)


def packed_shape(K, N, dtype):
    """The shape (panels,K,R) of an array for the packed form of a (K,N) matrix."""
    R = 2 * VECTOR_BYTES // np.dtype(dtype).itemsize
    return -(-N // R), K, R


@kernel
def pack(packed, b):
    """Pack b (K,N) into `packed`, of `packed_shape`."""
    K, N = b.shape
    R = packed.shape[2]
    for k in range(K):
        for panel in range(N // R):
            for j in range(R):
                packed[panel, k, j] = b[k, panel * R + j]
        for j in range(N % R):
            packed[N // R, k, j] = b[k, N // R * R + j]


@kernel
def pack_transposed(packed, b):
    """Pack the transpose (K,N) of b (N,K), a block of R x 16 at a time, which stays in cache on both sides."""
    N, K = b.shape
    R = packed.shape[2]
    for panel in range(packed.shape[0]):
        first = panel * R
        for block in range(0, K, 16):
            for j in range(min(R, N - first)):
                for k in range(block, min(block + 16, K)):
                    packed[panel, k, j] = b[first + j, k]


@kernel
def packed_matmul(out, a, packed, add):
    """out = a @ b, or out += a @ b where `add`, with b packed. out (M,N) C-contiguous, a (M,K), also a transposed view.

    Blocks of DEPTH steps of k by HEIGHT rows of A stay in the second-level cache while the panels pass by.
    """
    M, N = out.shape
    K, R, size = a.shape[1], packed.shape[2], out.itemsize
    zero = out.dtype.type(0)
    for front in range(0, K, DEPTH):
        depth = min(DEPTH, K - front)
        for start in range(0, M, HEIGHT):
            height = min(HEIGHT, M - start)
            tiles = (height + ROWS - 1) // ROWS
            for panel in range(packed.shape[0]):
                first = panel * R
                for tile in range(tiles):  # of nearly equal height
                    top, bottom = start + height * tile // tiles, start + height * (tile + 1) // tiles
                    _multiply_tile(
                        zero,
                        bottom - top,
                        min(R, N - first) if add or front > 0 else 0,
                        min(R, N - first),
                        depth,
                        a.ctypes.data + top * a.strides[0] + front * a.strides[1],
                        a.strides[0],
                        a.strides[1],
                        packed.ctypes.data + (first * K + front * R) * size,
                        out.ctypes.data + (top * N + first) * size,
                        N * size,
                    )


@intrinsic
def _multiply_tile(typingctx, kind, rows, known, columns, K, a, a_stride, k_stride, panel, c, c_stride):
    """c (rows,columns) = c[:, :known] + a (rows,K) @ panel (K,R): addresses, strides in bytes; `kind` has the dtype."""
    signature = types.void(kind, *[types.int64] * 10)

    def generate(context, builder, signature, arguments):
        element = ir.FloatType() if kind == types.float32 else ir.DoubleType()
        _emit_tiles(builder, element, *arguments[1:])
        return context.get_dummy_value()

    return signature, generate


def _emit_tiles(builder, element, rows, *arguments):
    """A switch over the number of rows, with one unrolled loop for each."""
    end = builder.append_basic_block("end")
    switch = builder.switch(rows, end)
    for count in range(1, ROWS + 1):
        block = builder.append_basic_block(f"rows{count}")
        switch.add_case(ir.Constant(ir.IntType(64), count), block)
        with builder.goto_block(block):
            _emit_tile(builder, element, count, *arguments)
            builder.branch(end)
    builder.position_at_end(end)


def _emit_tile(builder, element, count, known, columns, K, a, a_stride, k_stride, panel, c, c_stride):
    """The loop over k for tiles of `count` rows."""
    i32, i64 = ir.IntType(32), ir.IntType(64)
    size = 4 if element == ir.FloatType() else 8
    lanes = VECTOR_BYTES // size
    vector, name = ir.VectorType(element, lanes), f"v{lanes}f{8 * size}"
    mask_type = ir.VectorType(ir.IntType(1), lanes)
    pointer = vector.as_pointer()
    number = lambda value: ir.Constant(i64, value)
    function = lambda name, result, *kinds: builder.module.declare_intrinsic(name, (), ir.FunctionType(result, kinds))
    fma = function(f"llvm.fma.{name}", vector, vector, vector, vector)
    load = function(f"llvm.masked.load.{name}.p0", vector, pointer, i32, mask_type, vector)
    store = function(f"llvm.masked.store.{name}.p0", ir.VoidType(), vector, pointer, i32, mask_type)
    prefetch = function("llvm.prefetch.p0", ir.VoidType(), pointer, i32, i32, i32)
    at = lambda address, kind: builder.inttoptr(address, kind.as_pointer())

    def splat(scalar):
        one = builder.insert_element(ir.Constant(ir.VectorType(scalar.type, lanes), ir.Undefined), scalar, ir.Constant(i32, 0))
        return builder.shuffle_vector(one, one, ir.Constant(ir.VectorType(i32, lanes), [0] * lanes))

    # Columns at the right edge of C that do not exist are masked out.
    places = [ir.Constant(ir.VectorType(i64, lanes), [*range(half * lanes, (half + 1) * lanes)]) for half in range(2)]
    reads, writes = ([builder.icmp_signed("<", place, splat(bound)) for place in places] for bound in (known, columns))
    tile = [
        (builder.add(builder.add(c, builder.mul(c_stride, number(row))), number(half * VECTOR_BYTES)), half)
        for row in range(count)
        for half in range(2)
    ]
    align, nothing = ir.Constant(i32, size), ir.Constant(vector, None)
    begin = [builder.call(load, [at(address, vector), align, reads[half], nothing]) for address, half in tile]

    before, loop, behind = builder.block, builder.append_basic_block("k"), builder.append_basic_block("behind")
    builder.branch(loop)
    builder.position_at_end(loop)
    k, left, right = builder.phi(i64), builder.phi(i64), builder.phi(i64)
    for variable, start in ((k, number(0)), (left, a), (right, panel)):
        variable.add_incoming(start, before)
    sums = [builder.phi(vector) for _ in tile]
    b, new = [], []
    for half in range(2):
        b.append(builder.load(at(builder.add(right, number(half * VECTOR_BYTES)), vector), align=VECTOR_BYTES // 4))
        ahead = builder.add(right, number((2 * AHEAD + half) * VECTOR_BYTES))
        builder.call(prefetch, [at(ahead, vector), ir.Constant(i32, 0), ir.Constant(i32, 3), ir.Constant(i32, 1)])
    for row in range(count):
        value = splat(builder.load(at(builder.add(left, builder.mul(a_stride, number(row))), element)))
        new += [builder.call(fma, [value, b[half], sums[2 * row + half]]) for half in range(2)]
    next_k = builder.add(k, number(1))
    for variable, value in (
        (k, next_k),
        (left, builder.add(left, k_stride)),
        (right, builder.add(right, number(2 * VECTOR_BYTES))),
    ):
        variable.add_incoming(value, loop)
    for total, start, value in zip(sums, begin, new, strict=True):
        total.add_incoming(start, before)
        total.add_incoming(value, loop)
    builder.cbranch(builder.icmp_signed("<", next_k, K), loop, behind)
    builder.position_at_end(behind)
    for (address, half), value in zip(tile, new, strict=True):
        builder.call(store, [value, at(address, vector), align, writes[half]])
