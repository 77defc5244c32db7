"""Compiles the inner loops of the kernels for 64-bit ARM, on whatever machine this is.

    python arm_assembly.py CPU ROWS      CPU: LLVM's name of a processor; ROWS: of the highest tile, 0: as the kernels have it

Prints one line of JSON: the heights of the tiles and {name: assembly}. When the kernels ask what the processor has
(processor.py), LLVM answers as it does on ARM. So they write the code that they would write there.
"""

import json
import sys
from unittest import mock

import llvmlite.binding as llvm
from numba import types

TRIPLE = "aarch64-unknown-linux-gnu"
ANSWERS = {"get_process_triple": lambda: TRIPLE, "get_host_cpu_features": lambda: {"neon": True, "fp-armv8": True}}
with mock.patch.multiple(llvm, **ANSWERS):
    from dllm.kernels import processor

from dllm.kernels import activations, gemm, team, tiles, vectors  # noqa: E402
from helpers.assembly import assembly, target_machine  # noqa: E402

CPU, ROWS = sys.argv[1], int(sys.argv[2])
I64 = types.int64
KERNELS = {
    "float32": (tiles.multiply_tile, types.float32, *[I64] * 10),
    "float64": (tiles.multiply_tile, types.float64, *[I64] * 10),
    "float32 transposed": (tiles.multiply_tile_transposed, types.float32, *[I64] * 10),
    "float64 transposed": (tiles.multiply_tile_transposed, types.float64, *[I64] * 10),
    "cell forward": (activations.cell_forward_row, *[I64] * 6),
    "cell backward": (activations.cell_backward_row, *[I64] * 8),
    "exp": (activations.exp_rows, types.boolean, *[I64] * 4),
    "round": (vectors.round_to_bf16, types.float32),
    "round rows": (vectors.round_rows, types.boolean, *[I64] * 3, types.boolean),
    "look at a barrier": (team._read, I64),
}


if __name__ == "__main__":
    assert processor.ARM
    tiles.ROWS = tiles.TALLEST = ROWS or tiles.ROWS
    target = target_machine(TRIPLE, CPU)
    print(json.dumps([tiles.ROWS, gemm.TALL, {name: assembly(target, *kernel) for name, kernel in KERNELS.items()}]))
