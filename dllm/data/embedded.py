"""The embedded corpus: the Python standard library of this interpreter, prepared once into the user's cache."""

from __future__ import annotations

import contextlib
import os
import pathlib
import shutil
import sys
import sysconfig
import tempfile
from collections.abc import Callable
from typing import TYPE_CHECKING

from ..comm.messages import allgather, broadcast
from ..comm.runtime import together
from ..errors import UserError
from ..kernels.caches import temporary_cache, user_cache
from .preparation import prepare_corpus
from .shards import FORMAT
from .vocabulary import Vocabulary

if TYPE_CHECKING:
    from mpi4py import MPI

KIND, SIZE = "bpe", 2048  # tokenizer and vocabulary of the embedded corpus


def embedded_corpus(comm: MPI.Comm, node_comm: MPI.Comm, progress: Callable[[str], None]) -> pathlib.Path:
    """The folder of the embedded corpus in this user's cache, prepared first where it is not there. Collective.

    Prepared by all ranks together where they see one file system, else by the ranks of each node for themselves.
    """
    name = f"python-{sys.version.split()[0]}-{KIND}{SIZE}-{FORMAT}"
    with together(comm):
        found = str(_place(name)) if comm.rank == 0 else ""
    folder = pathlib.Path(broadcast(comm, found, str))
    if all(allgather(comm, (folder / "manifest.json").exists(), bool)):
        return folder
    with together(comm):
        building = folder.with_name(f".{folder.name}.{os.getpid()}")
        if comm.rank == 0:
            building.mkdir(parents=True)
    building = pathlib.Path(broadcast(comm, str(building), str))
    group = comm if all(allgather(comm, building.exists(), bool)) else node_comm
    building = pathlib.Path(broadcast(group, f"{building}-{comm.rank}", str))
    train, valid = standard_library()
    prepare_corpus(group, {"train": train, "valid": valid}, Vocabulary(KIND, SIZE), building, progress=progress)
    with together(comm):
        if group.rank == 0:
            try:
                building.rename(folder)
            except OSError:  # another job was faster
                shutil.rmtree(building, ignore_errors=True)
        if comm.rank == 0:
            shutil.rmtree(folder.with_name(f".{folder.name}.{os.getpid()}"), ignore_errors=True)
    return folder


def _place(name: str) -> pathlib.Path:
    """Where the corpus is or can be: the cache of this user, else a temporary one. Raises UserError."""
    for cache in (user_cache(), temporary_cache()):
        if cache is not None:
            folder = cache / "dllm" / name
            with contextlib.suppress(OSError):
                if not (folder / "manifest.json").exists():
                    folder.parent.mkdir(parents=True, exist_ok=True)
                    tempfile.TemporaryFile(dir=folder.parent).close()
                return folder
    raise UserError("there is no folder to keep the embedded corpus in: XDG_CACHE_HOME may name one, or give --data DIR")


def standard_library() -> tuple[list[pathlib.Path], list[pathlib.Path]]:
    """The Python standard library of this interpreter as (train files, valid files): sorted, tests left out."""
    root = pathlib.Path(sysconfig.get_paths()["stdlib"])
    skipped = {"test", "tests", "site-packages", "dist-packages", "idle_test", "lib2to3", "__pycache__"}
    files = [path for path in root.rglob("*.py") if not skipped & set(path.relative_to(root).parts)]
    files = [path for path in sorted(files) if _is_text(path)]
    valid = files[10::20]
    return [path for path in files if path not in set(valid)], valid


def _is_text(path: pathlib.Path) -> bool:
    try:
        return bool(path.read_bytes().decode())
    except (OSError, UnicodeDecodeError):
        return False
