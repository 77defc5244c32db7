"""The kernels for ARM, which no machine here can run: what LLVM compiles the inner loops to.

NEON has 32 registers of 16 bytes. A row of a panel takes four of them.
"""

import json
import os
import pathlib
import re
import subprocess
import sys

import pytest

PROGRAM = pathlib.Path(__file__).parents[1] / "helpers/arm_assembly.py"
VECTORS = 4  # of a row of a panel
TILES = ["float32", "float64", "float32 transposed", "float64 transposed"]


def compiled(folder, cpu, rows=0):
    """(rows of the highest tile, of a transposed one, {name: assembly})."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "XDG_CACHE_HOME": str(folder)}
    command = [sys.executable, PROGRAM, cpu, str(rows)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module", params=["generic", "neoverse-n1"])
def code(request, tmp_path_factory):
    return compiled(tmp_path_factory.mktemp("cache"), request.param)


def instructions(assembly):
    return [line.strip() for line in assembly.splitlines() if re.match(r"\t[a-z]", line)]


def loops(assembly):
    """The instructions of each loop that is one block: rows x vectors -> them."""
    blocks = re.findall(r"^(\.L\w+):.*\n((?:\t.*\n|//.*\n)*?\tb\.\w+\t\1\n)", assembly, re.MULTILINE)
    found = [instructions(block) for _, block in blocks]
    return {len(multiply_adds(loop)): loop for loop in found}


def multiply_adds(loop):
    return [line for line in loop if line.startswith("fmla")]


def on_the_stack(loop):
    return [line for line in loop if re.search(r"\bsp\b", line)]


@pytest.mark.parametrize("tile", TILES)
def test_the_sums_of_a_tile_stay_in_registers(code, tile):
    rows, _, assembly = code
    found = loops(assembly[tile])
    assert set(found) == {height * VECTORS for height in range(1, rows + 1)}
    for count, loop in found.items():
        sums = {line.split()[1] for line in multiply_adds(loop)}
        assert len(sums) == count
        assert all(re.fullmatch(r"v\d+\.(4s|2d),", name) for name in sums)
        assert not on_the_stack(loop)
        assert not [line for line in loop if line.startswith(("mov\tv", "st", "bl"))]


def test_rows_of_a_tile_fill_neons_registers(code, tmp_path):
    """One row more does not fit: so the test above would see it."""
    rows, tall, _ = code
    assert (rows, tall) == (6, 4)
    _, _, higher = compiled(tmp_path, "neoverse-n1", rows + 1)
    for tile in TILES:
        assert on_the_stack(loops(higher[tile])[VECTORS * (rows + 1)])


@pytest.mark.parametrize(("kernel", "least"), [("cell forward", 190), ("cell backward", 40), ("exp", 50)])
def test_rows_of_activations_are_vectors_and_call_nobody(code, kernel, least):
    """`least` multiply-adds of four numbers."""
    found = instructions(code[2][kernel])
    assert len([line for line in found if re.match(r"fml[as]\tv\d+\.4s", line)]) >= least
    assert not [line for line in found if re.match(r"bl\b|f\w+\ts\d", line)]


@pytest.mark.parametrize("kernel", ["round", "round rows"])
def test_rounding_to_bfloat16_calls_nobody(code, kernel):
    assert not [line for line in instructions(code[2][kernel]) if line.startswith("bl\t")]


def test_who_waits_at_a_barrier_lets_the_processor_rest(code):
    assert "isb" in instructions(code[2]["look at a barrier"])
