"""Intel's tiles where there are none: what LLVM makes of the loop for a Xeon, and all tests of bfloat16 with tiles emulated."""

import os
import pathlib
import platform
import re
import subprocess
import sys

import pytest
from helpers.assembly import assembly, target_machine
from numba import types

from dllm.kernels import amx, processor

ROOT = pathlib.Path(__file__).parents[2]
FILES = ("tiles", "gemm", "lstm", "softmax", "factors", "model", "decoder", "engine", "int8")
CHOSEN = (
    "test_tiles or (test_factors and steps) or ((bf16 or bfloat16) and not narrower and not rounding) "
    "or (int8 and (same or within_their_arrays or whole_numbers or largest_sums or stays_in_its_row))"
)
C, A, B = (("tmm0", "tmm2"), ("tmm1", "tmm3")), ("tmm4", "tmm5"), ("tmm6", "tmm7")  # by panels; above, below; by panels


def skipped():
    """Why tiles cannot be emulated, or need not be, or None."""
    if processor.AMX:
        return "this process may use AMX: these tests run by themselves"
    if sys.platform != "linux" or platform.machine() != "x86_64" or not processor.BF16_INSTRUCTIONS:
        return "tiles are emulated on Linux on x86-64 with AVX512_BF16"
    return None


@pytest.mark.slow  # compiles all of a model's kernels for it: a minute of one core
@pytest.mark.timeout(600)
@pytest.mark.skipif(skipped() is not None, reason=str(skipped()))
def test_all_that_multiplies_bfloat16_is_right_with_tiles_emulated():
    """Each of these tests fails if it passes without a tile (helpers/amx_emulator.py)."""
    words = ["-p", "helpers.amx_emulator", "-p", "no:faulthandler", "-p", "no:cacheprovider", "-q", "-k", CHOSEN]
    files = [f"tests/unit/test_{name}.py" for name in FILES]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "PYTEST_ADDOPTS": ""}
    command = [sys.executable, "-m", "pytest", *words, *files]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=560)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    result = done.stdout.splitlines()[-1]
    assert int(re.search(r"(\d+) passed", result)[1]) >= 90, result
    assert "skipped" not in result


@pytest.fixture(scope="module", params=["sapphirerapids", "graniterapids"])
def machine(request):
    return target_machine("x86_64-unknown-linux-gnu", request.param)


def instructions(text):
    """Name and tiles of each tile instruction, operands as LLVM prints them: the target last."""
    found = re.findall(r"^\t(t(?:ile|dp)\w+)\t(.*)$", text, re.MULTILINE)
    return [(name, *re.findall(r"tmm\d", operands)) for name, operands in found]


def loops(code):
    """The instructions of each loop that is one block."""
    blocks = re.findall(r"^(\.L\w+):.*\n((?:\t.*\n)*?\tj\w+\t\1\n)", code, re.MULTILINE)
    return [instructions(block) for _, block in blocks]


def one_span(product, height, width):
    """What belongs to one step of k: each tile is loaded once, and what shares a B tile is multiplied one after the other."""
    found = []
    for j in range(width):
        for i in range(height):
            found += [("tileloadd", A[i])] * (j == 0) + [("tileloadd", B[j])] * (i == 0)
            found.append((product, B[j], A[i], C[j][i]))
    return found


@pytest.mark.parametrize(("product", "word"), [("tdpbf16ps", types.uint32), ("tdpbusd", types.int32)])
def test_a_loop_over_k_is_loads_and_products_with_the_sums_in_tiles(machine, product, word):
    code = assembly(machine, amx.multiply_tiles, word, *[types.int64] * 10)
    wanted = {}
    for height, width in ((1, 1), (1, 2), (2, 1), (2, 2)):
        span = one_span(product, height, width)
        wanted[frozenset(step[3] for step in span if step[0] == product)] = span
    found = {}
    for loop in loops(code):
        found.setdefault(frozenset(step[3] for step in loop if step[0] == product), []).append(loop)
    assert set(found) == set(wanted)
    for sums, span in wanted.items():
        for loop in found[sums]:  # one span at a time, or several
            times = len(loop) // len(span)
            assert sorted(loop) == sorted(span * times)
            assert [step for step in loop if step[0] == product] == [step for step in span if step[0] == product] * times
            loaded = set()
            for name, *tiles in loop:  # before each product its factors have been loaded
                loaded |= {*tiles} if name == "tileloadd" else set()
                assert {*tiles[:2]} <= loaded


def test_sums_are_loaded_or_zeroed_before_the_loop_and_stored_behind_it(machine):
    found = instructions(assembly(machine, amx.multiply_tiles, types.uint32, *[types.int64] * 10))
    sums = [tile for height in (1, 2) for width in (1, 2) for j in range(width) for tile in C[j][:height]]
    for name in ("tilezero", "tilestored"):
        assert sorted(tile for one, *(tile,) in [f for f in found if f[0] == name]) == sorted(sums)
    assert sorted(f[1] for f in found if f[0] == "tileloadd" and f[1] in sums) == sorted(sums)
    assert {name for name, *_ in found} == {
        "tileloadd",
        "tilezero",
        "tilestored",
        "tdpbf16ps",
    }  # no configuration of LLVM's own


def test_configurations_have_whole_tiles_but_for_the_lowest_rows():
    for rows in range(1, amx.TALL + 1):
        config = amx.CONFIGURATIONS[rows]
        above, below = min(rows, 16), rows - 16 if rows > 16 else 16
        assert config[48:56].tolist() == [above, above, below, below, above, below, 16, 16]
        assert config[16:32].view("u2").tolist() == [64] * 8
        assert config[0] == 1
        assert not config[[*range(1, 16), *range(32, 48), *range(56, 64)]].any()
