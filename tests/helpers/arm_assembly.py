"""Compiles the inner loops of the kernels for 64-bit ARM, on whatever machine this is.

    python arm_assembly.py CPU ROWS      CPU: LLVM's name of a processor; ROWS: of the highest tile, 0: as the kernels have it

Prints one line of JSON: the heights of the tiles and {name: assembly}. When the kernels ask what the processor has
(processor.py), LLVM answers as it does on ARM. So they write the code that they would write there.
"""

import json
import sys
from types import SimpleNamespace
from unittest import mock

import llvmlite.binding as llvm
from llvmlite import ir
from numba import types

TRIPLE = "aarch64-unknown-linux-gnu"
ANSWERS = {"get_process_triple": lambda: TRIPLE, "get_host_cpu_features": lambda: {"neon": True, "fp-armv8": True}}
with mock.patch.multiple(llvm, **ANSWERS):
    from dllm.kernels import processor

from dllm.kernels import activations, gemm, team, tiles, vectors  # noqa: E402

CPU, ROWS = sys.argv[1], int(sys.argv[2])
I64, CONTEXT = types.int64, SimpleNamespace(get_dummy_value=lambda: None)  # all that the kernels ask of Numba's context
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


def value_type(kind):
    """LLVM's type of an argument."""
    floats = {types.float32: ir.FloatType(), types.float64: ir.DoubleType()}
    return floats.get(kind) or ir.IntType(1 if kind == types.boolean else 64)


def assembly(machine, intrinsic, *kinds):
    """What LLVM makes of an intrinsic on its own."""
    module = ir.Module()
    module.triple = TRIPLE
    function = ir.Function(module, ir.FunctionType(ir.VoidType(), [*map(value_type, kinds)]), "kernel")
    builder = ir.IRBuilder(function.append_basic_block())
    signature, generate = intrinsic._defn(None, *kinds)
    value = generate(CONTEXT, builder, signature, function.args)
    if value is not None:  # which would not be computed if nobody kept it
        builder.store(value, ir.GlobalVariable(module, value.type, "result"))
    builder.ret_void()
    parsed = llvm.parse_assembly(str(module))
    parsed.verify()
    passes = llvm.create_pass_builder(machine, llvm.create_pipeline_tuning_options(speed_level=3))
    passes.getModulePassManager().run(parsed, passes)
    return machine.emit_assembly(parsed)


if __name__ == "__main__":
    assert processor.ARM
    llvm.initialize_all_targets()
    llvm.initialize_all_asmprinters()
    tiles.ROWS = tiles.TALLEST = ROWS or tiles.ROWS
    target = llvm.Target.from_triple(TRIPLE).create_target_machine(cpu=CPU, opt=3)
    print(json.dumps([tiles.ROWS, gemm.TALL, {name: assembly(target, *kernel) for name, kernel in KERNELS.items()}]))
