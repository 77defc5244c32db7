"""The rooms of the house: a file imports only from floors below its own, files of one folder among themselves; kernels
import NumPy and Numba only; MPI stays with `comm` and the commands; nobody imports `kernels` a second time; no piece is so
large that one cannot see it whole.
"""

import ast
import pathlib
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[2]
COMMANDS = ("prepare", "train", "launch", "resize", "evaluate", "generate", "export", "import_", "serve", "share")
FLOORS = [  # from the ground up; a name is a file of dllm/ or a folder
    ("__init__", "errors", "kernels", "presets"),
    ("files",),
    ("config",),
    ("comm", "model", "remote"),
    ("data", "cli"),
    ("runs", "exchange"),
    ("inference", "launching"),
    ("training", "engines"),
    ("peers",),
    ("serving",),
    (*COMMANDS, "tools", "__main__", "api"),
]
FLOOR = {name: number for number, names in enumerate(FLOORS) for name in names}
MAY_IMPORT_MPI = {"comm", *COMMANDS}
KERNELS_MAY_IMPORT = {"numpy", "numba", "llvmlite", *sys.stdlib_module_names}
FILES = sorted(path for path in ROOT.glob("dllm/**/*.py") if path.parent.name != "kernels")
EVERY_FILE = pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))


def home(path):
    """What stands in the table for a file of dllm/: its name, or that of its folder."""
    return path.relative_to(ROOT / "dllm").with_suffix("").parts[0]


def nodes(tree):
    """The nodes of a syntax tree, but for what only a type checker sees."""
    yield tree
    for child in ast.iter_child_nodes(tree):
        if not (isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING"):
            yield from nodes(child)


def imports(source, package):
    """Dotted names of what a file of `package`, a tuple of names, imports, those of dllm in full."""
    for node in nodes(ast.parse(source)):
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
    source += "\nif TYPE_CHECKING:\n import j"
    found = set(imports(source, ("dllm", "x")))
    assert found == {"os.path", "dllm.x.a", "dllm.b.c", "dllm.x.d.e.g", "dllm.h"}


def test_every_file_has_a_floor_and_every_name_a_file():
    assert {home(path) for path in FILES} | {"kernels"} == set(FLOOR)


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
    for folder in ("dllm", "benchmarks", "tests"):
        for path in ROOT.glob(f"{folder}/**/*.py"):
            found = {name.partition(".")[0] for name in imports(path.read_text(encoding="utf-8"), ("dllm", "x", "y"))}
            assert "kernels" not in found, path


def test_the_kernels_of_dllm_are_a_link_to_those_at_the_top():
    assert (ROOT / "dllm/kernels").resolve() == (ROOT / "kernels").resolve()


def test_no_circle_of_files():
    """Each file of dllm is imported by files that it does not need itself, directly or by others."""
    module = lambda path: ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    files = {module(path): path for path in FILES}
    needs = {}
    for name, path in files.items():
        found = {dotted for _, dotted in imported(path)}
        found |= {dotted.rpartition(".")[0] for dotted in found}
        needs[name] = (found & files.keys()) - {name}
    done, path_to = set(), []

    def visit(name):
        assert name not in path_to, f"{' -> '.join(path_to[path_to.index(name) :])} -> {name}"
        if name not in done:
            path_to.append(name)
            for other in sorted(needs[name]):
                visit(other)
            path_to.pop()
            done.add(name)

    for name in sorted(files):
        visit(name)


def test_the_top_level_has_at_most_sixteen_files():
    assert sum(path.is_file() for path in (ROOT / "dllm").iterdir()) <= 16


@EVERY_FILE
def test_a_file_a_class_and_a_function_can_be_seen_whole(path):
    source = path.read_text(encoding="utf-8")
    assert source.count("\n") <= 400, path
    for node in ast.walk(ast.parse(source)):
        limit = {ast.ClassDef: 250, ast.FunctionDef: 70, ast.AsyncFunctionDef: 70}.get(type(node))
        assert limit is None or node.end_lineno - node.lineno < limit, f"{path}: {node.name}"


@EVERY_FILE
def test_nothing_public_takes_more_than_eight_parameters(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and (node.name == "__init__" or node.name[0] != "_"):
            arguments = node.args
            names = [
                a.arg for a in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs) if a.arg not in ("self", "cls")
            ]
            assert len(names) <= 8, f"{path}: {node.name}({', '.join(names)})"
