"""Intel's tiles (AMX) for a processor that has none: a handler of SIGILL that executes the tile instructions, one by one.

    python -m pytest -p helpers.amx_emulator -p no:faulthandler tests/unit/test_gemm.py          or, in a program, install()

So the machine code that LLVM makes for a Xeon runs here and is held against the plain oracles. It is executed as Intel's manual
says ("Intel 64 and IA-32 Architectures Software Developer's Manual", volume 2: LDTILECFG, TILELOADD, TDPBF16PS, TDPBUSD and so
on), and what the processor would refuse (a tile that is not configured, sizes that do not match) ends the process. Each thread
has its own tiles, and needs to have loaded a configuration. A few million instructions a second: good for what is right, not
for how fast.
"""

import ctypes
import os
import sys

import llvmlite.binding

TILES = ("amx-tile", "amx-bf16", "amx-int8")


def pretend() -> None:
    """Let Numba compile for a processor with tiles, and the kernels use them. To be called before either is imported."""
    there = llvmlite.binding.get_host_cpu_features()
    if all(there.get(name) for name in TILES):
        raise RuntimeError("this processor has tiles: nothing is to be emulated")
    on = {name: value or name in TILES for name, value in there.items()}
    os.environ["NUMBA_CPU_NAME"] = "sapphirerapids"  # LLVM's rules for Zen would rename tiles behind the last word said
    os.environ["NUMBA_CPU_FEATURES"] = ",".join(("+" if value else "-") + name for name, value in sorted(on.items()))
    from dllm.kernels import processor

    if any(name.startswith("dllm.kernels.") and name != processor.__name__ for name in sys.modules):
        raise RuntimeError("the kernels have been imported already")
    processor.FEATURES |= set(TILES)
    processor.AMX = processor.AMX_INT8 = True
    processor.BF16 = "amx"


def install() -> None:
    """Pretend, and handle SIGILL from now on, in all threads."""
    pretend()
    from . import amx_instructions

    amx_instructions.handle_illegal_instructions(ctypes.CDLL(None))


if __name__ != "__main__" and any(word.endswith("amx_emulator") for word in sys.argv):  # as a plug-in of pytest
    install()
