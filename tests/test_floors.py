"""The floors of the house: a file imports only from floors below its own, files of one folder among themselves; kernels
import NumPy and Numba only; MPI stays with `comm` and the commands; and nobody imports `kernels` a second time.
"""

import ast
import pathlib
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]
FLOORS = [  # from the ground up; a name is a file of dllm/ or a folder
    ("__init__", "errors", "presets"),
    ("config", "storage", "kernels"),
    ("layout", "hdf5"),
    ("model", "optim", "state", "cli", "data", "comm", "claim", "weights", "card", "decoder"),
    ("checkpoint", "report", "corpus", "inference", "survival", "tasks"),
    ("saving", "monitor", "warmup", "runs"),
    ("training", "bundle", "serving"),
    ("prepare", "train", "evaluate", "generate", "export", "import_", "resize", "mpirun", "__main__"),
    ("job",),
    ("launch", "keep"),
    ("serve",),
]
FLOOR = {name: number for number, names in enumerate(FLOORS) for name in names}
MAY_IMPORT_MPI = {"comm", *FLOORS[FLOOR["train"]]}
KERNELS_MAY_IMPORT = {"numpy", "numba", "llvmlite", *sys.stdlib_module_names}
FILES = sorted([*ROOT.glob("dllm/*.py"), *ROOT.glob("dllm/*/*.py")])
EVERY_FILE = pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))


def home(path):
    """What stands in the table for a file of dllm/: its name, or that of its folder."""
    parts = path.relative_to(ROOT / "dllm").with_suffix("").parts
    return parts[0]


def imports(source, package):
    """Dotted names of what a file of `package`, a tuple of names, imports, those of dllm in full."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else ()
            base = ".".join([*above, *([node.module] if node.module else [])])
            yield from (f"{base}.{alias.name}" for alias in node.names)


def imported(path):
    """(name in the table, dotted name) of every import of dllm, (None, top level name) of every other."""
    for name in imports(path.read_text(encoding="utf-8"), ("dllm", *path.relative_to(ROOT / "dllm").parts[:-1])):
        top, _, rest = name.partition(".")
        first = rest.partition(".")[0]
        if top != "dllm":
            yield None, top
        elif first in FLOOR or (ROOT / "dllm" / first).with_suffix(".py").exists():
            yield first, name
        else:
            yield "__init__", name  # a name that dllm/__init__.py defines


def test_imports_are_found_in_every_form():
    source = "import os.path\nfrom . import a\ndef f():\n from ..b import c\n from .d.e import g\n import dllm.h as i"
    found = set(imports(source, ("dllm", "x")))
    assert found == {"os.path", "dllm.x.a", "dllm.b.c", "dllm.x.d.e.g", "dllm.h"}


def test_every_file_has_a_floor_and_every_name_a_file():
    assert {home(path) for path in FILES} == set(FLOOR)


@EVERY_FILE
def test_a_file_imports_only_from_floors_below_its_own(path):
    mine = home(path)
    for name, dotted in imported(path):
        assert name is None or name == mine or FLOOR[name] < FLOOR[mine], f"{path} imports {dotted}"


@EVERY_FILE
def test_mpi_is_imported_by_comm_and_the_commands_only(path):
    assert home(path) in MAY_IMPORT_MPI or "mpi4py" not in {top for name, top in imported(path) if name is None}


@pytest.mark.parametrize("path", sorted(ROOT.glob("kernels/*.py")), ids=lambda path: path.name)
def test_kernels_import_numeric_libraries_and_each_other_only(path):
    for name, dotted in imported(ROOT / "dllm" / "kernels" / path.name):
        assert name == "kernels" or dotted in KERNELS_MAY_IMPORT, f"{path} imports {dotted}"


def test_nobody_imports_kernels_as_a_package_of_its_own():
    for folder in ("dllm", "dllm/*", "benchmarks", "tests"):
        for path in ROOT.glob(f"{folder}/*.py"):
            found = {name.partition(".")[0] for name in imports(path.read_text(encoding="utf-8"), ("dllm", "x"))}
            assert "kernels" not in found, path


def test_the_kernels_of_dllm_are_a_link_to_those_at_the_top():
    assert (ROOT / "dllm/kernels").resolve() == (ROOT / "kernels").resolve()
