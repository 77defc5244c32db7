"""The matrix products of a training step, one by one, on one core.

    python -m benchmarks.products SECONDS SIZE...

Prints one JSON line: [{"size", "product", "shape": [M, K, N], "intensity": operations a byte in fp32 and in bf16,
"fp32", "blas", "bf16": GFLOP/s of some runs}, ...].
"""

import json
import sys
import time

import numpy as np

from dllm.kernels import gemm, processor
from dllm.kernels.operands import Operands
from dllm.model.language_model import tokens_of_chunk

from .sizes import SIZES

RUNS = 5


def products(size):
    """name -> (M, K, N, how: multiply or multiply_transposed)."""
    V, H, B, T = size.vocabulary, size.hidden, size.lanes, size.window
    tokens = tokens_of_chunk(T * B, V, 16)
    return {
        "x Wx": (T * B, H, 4 * H, "multiply"),
        "h Wh": (B, H, 4 * H, "multiply"),
        "da Wh'": (B, 4 * H, H, "multiply"),
        "da Wx'": (T * B, 4 * H, H, "multiply"),
        "x' da": (H, T * B, 4 * H, "multiply_transposed"),
        "W y'": (V, H, tokens, "multiply"),
        "p W": (tokens, V, H, "multiply_transposed"),
        "p' fy": (V, tokens, H + 1, "multiply"),
    }


def rates(flops, seconds, work):
    """GFLOP/s of RUNS runs, each of as many calls as fill its share of the time."""
    work()
    begin = time.perf_counter()
    work()
    calls = max(1, int(seconds / RUNS / (time.perf_counter() - begin)))
    found = []
    for _ in range(RUNS):
        begin = time.perf_counter()
        for _ in range(calls):
            work()
        found.append(flops * calls / (time.perf_counter() - begin) / 1e9)
    return found


def own(M, K, N, how, bf16):
    """A call of our product."""
    rng, operands = np.random.default_rng(1), Operands(np.float32, bf16)

    def factor(rows, columns):
        panels = gemm.zero_panels(rows, columns, np.float32)
        gemm.to_panels(panels, 0, rng.standard_normal((rows, columns), np.float32))
        return panels

    c, b = gemm.zero_panels(M, N, np.float32), operands.pairs("b", factor(K, N), 0, K)[0]
    if how == "multiply":
        a = operands.words("a", factor(M, K), 0, M)[0]
        return lambda: gemm.multiply(c, 0, a, 0, b, M, operands.depth(K), False)
    a = operands.pairs("a", factor(K, M), 0, K)[0]
    return lambda: gemm.multiply_transposed(c, 0, a, 0, b, 0, M, operands.depth(K), False)


def blas(M, K, N, how):
    rng = np.random.default_rng(1)
    a, b = rng.standard_normal((M, K), np.float32), rng.standard_normal((K, N), np.float32)
    c, a = np.empty((M, N), np.float32), np.ascontiguousarray(a.T).T if how == "multiply_transposed" else a
    return lambda: np.dot(a, b, out=c)


def main():
    rows, names = [], sys.argv[2:]
    cases = [(name, product, *case) for name in names for product, case in products(SIZES[name]).items()]
    seconds = float(sys.argv[1]) / 8
    for name, product, M, K, N, how in cases:
        flops, row = 2 * M * K * N, {"size": name, "product": product, "shape": [M, K, N]}
        row["intensity"] = [flops / (size * (M * K + K * N) + 4 * M * N) for size in (4, 2)]
        row["fp32"] = rates(flops, seconds, own(M, K, N, how, False))
        row["blas"] = rates(flops, seconds, blas(M, K, N, how))
        row["bf16"] = rates(flops, seconds, own(M, K, N, how, True)) if processor.BF16 else []
        rows.append(row)
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
