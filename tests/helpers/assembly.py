"""What LLVM makes of the kernels' innermost loops, for any processor that it knows."""

from types import SimpleNamespace

import llvmlite.binding as llvm
from llvmlite import ir
from numba import types

CONTEXT = SimpleNamespace(get_dummy_value=lambda: None)  # all that the kernels ask of Numba's context


def target_machine(triple, cpu):
    """LLVM's machine of a name."""
    llvm.initialize_all_targets()
    llvm.initialize_all_asmprinters()
    return llvm.Target.from_triple(triple).create_target_machine(cpu=cpu, opt=3)


def value_type(kind):
    """LLVM's type of an argument."""
    floats = {types.float32: ir.FloatType(), types.float64: ir.DoubleType()}
    return floats.get(kind) or ir.IntType(1 if kind == types.boolean else 64)


def assembly(machine, intrinsic, *kinds):
    """What LLVM makes of an intrinsic on its own; kinds: Numba's types of its arguments."""
    module = ir.Module()
    module.triple = machine.triple
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
