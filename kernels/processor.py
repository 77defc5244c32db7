"""What this processor has: its vector instructions, its caches, and whether this process may use Intel's tiles (AMX).

Asked once a process. The kernels are written for what is found here, so the name of their cache's folder holds it (compile.py):
neither Numba nor the processor's name says what Linux permits, or how large the caches are.

bfloat16 takes the fastest products that there are, and never slower ones than float32's (`BF16`). An instruction of AVX512_BF16
does twice the work of a multiply-add of float32. Zen 4 and later of AMD take no longer for it, Intel's processors more than
twice as long (Sapphire Rapids, measured: 120 GFLOP/s beside 241 of float32), so that nothing is gained there.
"""

import ctypes
import os
import pathlib
import sys

import llvmlite.binding

HIDDEN = frozenset(filter(None, os.environ.get("DLLM_HIDE_FEATURES", "").split(",")))  # so that tests can be another machine
ARCH_PRCTL, REQUEST_PERMISSION, TILE_DATA = 158, 0x1023, 18  # Linux on x86-64: arch_prctl(ARCH_REQ_XCOMP_PERM, XTILEDATA)
FULL_RATE = {"AuthenticAMD"}  # whose AVX512_BF16 takes no longer than a multiply-add of float32


def host_features() -> set[str]:
    """LLVM's names of what the processor has and DLLM_HIDE_FEATURES does not hide."""
    return {name for name, there in llvmlite.binding.get_host_cpu_features().items() if there} - HIDDEN


def tiles_permitted(features: set[str]) -> bool:
    """Whether this process may use AMX; Linux is asked, for all threads of the process and its forks.

    Without permission the first instruction ends the process. It is refused where processor, hypervisor or kernel have no
    AMX, where asking is forbidden, and while a thread has an alternate signal stack below AT_MINSIGSTKSZ.
    """
    if sys.platform != "linux" or not {"amx-tile", "amx-bf16"} <= features:
        return False
    question = (ctypes.c_long(number) for number in (ARCH_PRCTL, REQUEST_PERMISSION, TILE_DATA))
    return bool(ctypes.CDLL(None).syscall(*question) == 0)


def vendor() -> str:
    """The processor's vendor as it names itself, "" where it does not."""
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    return next((line.split(":")[1].strip() for line in lines if line.startswith("vendor_id")), "")


def cache_bytes(level: int, otherwise: int) -> int:
    """Bytes of a core's data cache of a level, `otherwise` where the system does not say."""
    for index in pathlib.Path("/sys/devices/system/cpu/cpu0/cache").glob("index*"):
        try:
            kind, number, size = ((index / name).read_text().strip() for name in ("type", "level", "size"))
            if kind in ("Data", "Unified") and int(number) == level:
                return int(size.removesuffix("K")) << 10
        except (OSError, ValueError):
            continue
    return otherwise


def bf16_products(features: set[str], amx: bool, maker: str) -> str:
    """What multiplies bfloat16: "amx", "avx512_bf16", or "" where float32 is as fast."""
    if amx:
        return "amx"
    fast = {"avx512f", "avx512bf16"} <= features and maker in FULL_RATE and "full-rate-bf16" not in HIDDEN
    return "avx512_bf16" if fast else ""


FEATURES = host_features()
X86 = llvmlite.binding.get_process_triple().startswith(("x86", "i686"))
ARM = llvmlite.binding.get_process_triple().startswith(("aarch64", "arm64"))
AVX512, BF16_INSTRUCTIONS, VNNI = (name in FEATURES for name in ("avx512f", "avx512bf16", "avx512vnni"))
VECTOR = 64 if AVX512 else 32 if "avx2" in FEATURES else 16  # bytes
REGISTERS = 32 if AVX512 or ARM else 16  # of vectors
# Two multiply-adds of 64 bytes a cycle, for which B comes too slowly from beyond the caches. Some of Intel's do one: that costs
# them nothing but a load more.
TWICE = AVX512 and vendor() == "GenuineIntel"
L2 = cache_bytes(2, 1 << 20)
AMX = tiles_permitted(FEATURES)
AMX_INT8 = AMX and "amx-int8" in FEATURES
BF16 = bf16_products(FEATURES, AMX, vendor())


def facts() -> str:
    """All that the kernels' code depends on beside Numba's own key: the processor's name and features."""
    return f"{VECTOR} {REGISTERS} {TWICE} {BF16_INSTRUCTIONS} {VNNI} {AMX} {AMX_INT8} {L2}"
