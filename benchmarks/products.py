"""The matrix products of a training step, one by one, on one core.

    python -m benchmarks.products SECONDS SIZE...

Prints one JSON line: {"peak": {"fp32", "bf16": GFLOP/s of the innermost loop, its factors in the first-level cache},
"products": [{"size", "product", "shape": [M, K, N], "intensity": operations a byte in fp32 and in bf16,
"fp32", "blas", "bf16": GFLOP/s of some runs}, ...]}. bf16 is empty where products are of float32 all the same.
"""

import json
import math
import sys
import time

import numpy as np

from dllm.kernels import gemm, processor, tiles
from dllm.kernels.compile import kernel
from dllm.kernels.operands import Operands
from dllm.kernels.softmax import GROUP
from dllm.model.output import tokens_of_chunk

from .sizes import SIZES

RUNS = 5
WORDS, CALLS = (32, 128), 1000  # of two tiles along k: the long one takes 25 KB, or 36 KB of AMX's


def products(size, bf16):
    """name -> (M, K, N, how: multiply or multiply_transposed). bf16 has no transposed products: it turns a factor before."""
    V, H, B, T = size.vocabulary, size.hidden, size.lanes, size.window
    tokens = tokens_of_chunk(T * B, V, 16, 2 if bf16 else 4)
    return {
        "x Wx": (T * B, H, 4 * H, "multiply"),
        "h Wh": (B, H, 4 * H, "multiply"),
        "da Wh'": (B, 4 * H, H, "multiply"),
        "da Wx'": (T * B, 4 * H, H, "multiply"),
        "x' da": (H, T * B, 4 * H, "multiply" if bf16 else "multiply_transposed"),
        "W y'": (V, H, tokens, "multiply"),
        "p W": (H, GROUP, tokens, "multiply") if bf16 else (tokens, V, H, "multiply_transposed"),  # bf16: (p W)', GROUP of V
        "p' fy": (V, tokens, H + 1, "multiply"),
    }


def intensity(M, K, N, size):
    """Operations a byte of a product whose factors have numbers of `size` bytes."""
    return 2 * M * K * N / (size * (M * K + K * N) + 4 * M * N)


def rates(seconds, work, case):
    """GFLOP/s of RUNS runs, each of as many calls as fill its share of the time."""
    flops = 2 * math.prod(case[:3])
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


@kernel
def repeat(c, a, b, K):
    """c = a @ b, CALLS times."""
    for _ in range(CALLS):
        gemm.multiply(c, 0, a, 0, b, c.shape[1], K, False)


def peak(seconds, bf16):
    """GFLOP/s of the innermost loop: of what a long tile has more of it than a short one, by the fastest of many runs."""
    operands = Operands(np.float32, bf16)
    M, N = 32 if bf16 and processor.BF16 == "amx" else tiles.ROWS, tiles.PANELS * operands.R
    K = WORDS[1] * (2 if bf16 else 1)
    c, a, b = (factor(rows, columns) for rows, columns in ((M, N), (M, K), (K, N)))
    a, b = operands.words("a", a, 0, M)[0], operands.pairs("b", b, 0, K)[0]
    repeat(c, a, b, 1)
    end, fastest = time.perf_counter() + seconds, dict.fromkeys(WORDS, np.inf)
    while time.perf_counter() < end:
        for words in WORDS:
            begin = time.perf_counter()
            repeat(c, a, b, words)
            fastest[words] = min(fastest[words], time.perf_counter() - begin)
    short, long = fastest.values()
    return 2 * M * N * K * (1 - WORDS[0] / WORDS[1]) * CALLS / (long - short) / 1e9


def factor(rows, columns):
    """Panels of random numbers."""
    panels = gemm.zero_panels(rows, columns, np.float32)
    gemm.to_panels(panels, 0, np.random.default_rng(1).standard_normal((rows, columns), np.float32))
    return panels


def own(M, K, N, how, bf16):
    """A call of our product."""
    operands = Operands(np.float32, bf16)
    c, b = gemm.zero_panels(M, N, np.float32), operands.pairs("b", factor(K, N), 0, K)[0]
    if how == "multiply":
        a = operands.words("a", factor(M, K), 0, M)[0]
        return lambda: gemm.multiply(c, 0, a, 0, b, M, operands.depth(K), False)
    a = factor(K, M)
    return lambda: gemm.multiply_transposed(c, 0, a, 0, b, 0, M, K, False)


def blas(M, K, N, how):
    rng = np.random.default_rng(1)
    a, b = rng.standard_normal((M, K), np.float32), rng.standard_normal((K, N), np.float32)
    c, a = np.empty((M, N), np.float32), np.ascontiguousarray(a.T).T if how == "multiply_transposed" else a
    return lambda: np.dot(a, b, out=c)


def main():
    rows, names = [], sys.argv[2:]
    cases = [(name, product, case) for name in names for product, case in products(SIZES[name], False).items()]
    seconds = float(sys.argv[1]) / 8
    precisions = ["fp32", *(["bf16"] if processor.BF16 else [])]
    peaks = {precision: peak(seconds, precision == "bf16") for precision in precisions}
    for name, product, plain in cases:
        short = products(SIZES[name], True)[product]
        row = {
            "size": name,
            "product": product,
            "shape": plain[:3],
            "intensity": [intensity(*plain[:3], 4), intensity(*short[:3], 2)],
        }
        row["fp32"] = rates(seconds, own(*plain, False), plain)
        row["blas"] = rates(seconds, blas(*plain), plain)
        row["bf16"] = rates(seconds, own(*short, True), short) if processor.BF16 else []
        rows.append(row)
    print(json.dumps({"peak": peaks, "products": rows}))


if __name__ == "__main__":
    main()
