"""Only files/hdf5.py opens HDF5, which loads no plugin, and its readers name all that a file may hold; only
files/safetensors.py opens safetensors; nothing is unpickled.
"""

import ast
import functools
import os
import pathlib
import shutil
import subprocess
import sys

import pytest

from dllm.files import storage

PACKAGE = pathlib.Path(storage.__file__).parents[1]
PLUGIN = '#include <stdio.h>\n__attribute__((constructor)) static void loaded(void) { puts("LOADED"); fflush(stdout); }\n'
ASKS = """
import h5py, numpy as np
with h5py.File("asks.h5", "w") as file:
    try:
        file.create_dataset("x", data=np.zeros(4), chunks=(4,), compression=32123, allow_unknown_filter=True)
    except ValueError:
        pass
"""


@pytest.mark.skipif(not shutil.which("cc"), reason="needs a C compiler")
def test_no_plugin_is_loaded(tmp_path):
    (tmp_path / "plugin.c").write_text(PLUGIN)
    (tmp_path / "plugins").mkdir()
    subprocess.run(["cc", "-shared", "-fPIC", "-o", "plugins/libplugin.so", "plugin.c"], cwd=tmp_path, check=True)
    environment = os.environ | {"HDF5_PLUGIN_PATH": str(tmp_path / "plugins"), "PYTHONPATH": str(PACKAGE.parent)}
    environment.pop("HDF5_PLUGIN_PRELOAD", None)
    for first, loaded in (("", True), ("import dllm.files.hdf5\n", False)):
        command = [sys.executable, "-c", first + ASKS]
        run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
        assert ("LOADED" in run.stdout) == loaded


@functools.cache
def modules():
    """(path within the package, syntax tree) of every file of dllm."""
    paths = [pathlib.Path(folder, name) for folder, _, names in os.walk(PACKAGE, followlinks=True) for name in names]
    return [(path.relative_to(PACKAGE).as_posix(), ast.parse(path.read_text())) for path in paths if path.suffix == ".py"]


def imported(tree):
    """Top-level names of the modules that a module imports, relative ones aside."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield node.module.split(".")[0]


def test_only_storage_opens_hdf5():
    trees = dict(modules())
    assert {"files/hdf5.py", "runs/checkpoint.py", "data/shards.py", "kernels/gemm.py"} <= trees.keys()
    assert [name for name, tree in trees.items() if {"h5py", "tables", "netCDF4"} & {*imported(tree)}] == ["files/hdf5.py"]
    opened = [
        function.name
        for function in ast.walk(trees["files/hdf5.py"])
        if isinstance(function, ast.FunctionDef)
        for node in ast.walk(function)
        if isinstance(node, ast.Attribute) and node.attr == "File"
    ]
    assert sorted(opened) == ["open_arrays", "pack_plain", "write_hdf5"]


def test_only_its_door_opens_safetensors():
    assert [name for name, tree in modules() if "safetensors" in {*imported(tree)}] == ["files/safetensors.py"]


def test_every_reader_names_all_that_a_file_may_hold():
    calls = [
        (name, len(node.args))
        for name, tree in modules()
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and getattr(node.func, "attr", getattr(node.func, "id", None)) == "open_arrays"
    ]
    assert sorted(calls) == [("data/shards.py", 2), ("files/hdf5.py", 2), ("runs/checkpoint.py", 2)]


def test_nothing_is_unpickled():
    able = {"pickle", "_pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "pandas"}
    for name, tree in modules():
        assert not able & {*imported(tree)}, name
        for node in ast.walk(tree):
            assert not (isinstance(node, ast.keyword) and node.arg == "allow_pickle"), name
            assert not (isinstance(node, ast.Attribute) and ast.unparse(node) in ("np.load", "numpy.load", "torch.load")), name
