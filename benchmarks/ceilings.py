"""What this machine can do at best, with all ranks at it at once: the scale that steps are held against.

    OPENBLAS_NUM_THREADS=1 mpirun -n 2 python -m benchmarks.ceilings

Rank 0 prints one JSON line, sums over ranks: {"fp32", "fp64", "bf16"} GFLOP/s of a large product, {"copy"} GB/s, read plus
written. fp32 and fp64 are BLAS's; bf16 is PyTorch's oneDNN where it is installed, else our own.
"""

import importlib.util
import json
import time

import numpy as np

from dllm.comm import messages, runtime
from dllm.kernels import gemm, processor
from dllm.kernels.operands import Operands

SIDE = 2048


def best_rate(comm, work, amount, repeats=7):
    """`amount` / seconds of the middle of some runs, all ranks at once, summed over ranks."""
    seconds = []
    for _ in range(repeats):
        comm.barrier()
        begin = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - begin)
    return float(messages.total(comm, np.array([amount / sorted(seconds)[repeats // 2] / 1e9]))[0])


def blas(dtype):
    a, b, c = (np.ones((SIDE, SIDE), dtype) for _ in range(3))
    return lambda: np.dot(a, b, out=c)


def bf16():
    """A large product of bfloat16, None where the processor has none."""
    if not processor.BF16:
        return None
    if importlib.util.find_spec("torch"):
        import torch

        torch.set_num_threads(1)
        a, b, c = (torch.ones(SIDE, SIDE, dtype=torch.bfloat16) for _ in range(3))
        return lambda: torch.matmul(a, b, out=c)
    operands = Operands(np.float32, bf16=True)
    a, b, c = (gemm.zero_panels(SIDE, SIDE, np.float32) for _ in range(3))
    words, pairs = operands.words("a", a, 0, SIDE)[0], operands.pairs("b", b, 0, SIDE)[0]
    return lambda: gemm.multiply(c, 0, words, 0, pairs, SIDE, SIDE // 2, False)


def main():
    comm, rates = runtime.world(), {}
    for name, work in (("fp32", blas(np.float32)), ("fp64", blas(np.float64)), ("bf16", bf16())):
        if work is not None:
            work()
            rates[name] = best_rate(comm, work, 2 * SIDE**3)
    source, target = np.ones((2, 1 << 24), np.float32)
    rates["copy"] = best_rate(comm, lambda: np.copyto(target, source), 2 * source.nbytes)
    if comm.rank == 0:
        print(json.dumps(rates))


if __name__ == "__main__":
    main()
