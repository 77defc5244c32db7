"""How every kernel is compiled: to machine code, once a machine, cached on disk under a name that holds the sources' hash.

Numba notices a change in the file of a kernel but not in the files of what it calls, so the folder's name has to.
"""

import contextlib
import errno
import hashlib
import os
import pathlib
import sys
import tempfile
from collections.abc import Callable
from typing import Any, TypeVar, cast

import numba
from llvmlite import binding as llvm
from numba.core import caching, codegen
from numba.core.runtime.nrt import rtsys

from . import processor
from .caches import user_cache

F = TypeVar("F", bound=Callable[..., Any])
LOCAL_RANK = ("MPI_LOCALRANKID", "OMPI_COMM_WORLD_LOCAL_RANK", "SLURM_LOCALID")  # variables: 0 on one rank of a host

# Not the whole of `fastmath`: NaN and infinity keep their meaning, so that a diverging run is seen. Sums may be
# reordered, which vectorises them; the order is fixed when the kernel is compiled, so results repeat exactly.
FASTMATH = {"contract", "nsz", "reassoc", "arcp"}
OPTIONS: dict[str, Any] = {"nogil": True, "error_model": "numpy", "boundscheck": False, "fastmath": FASTMATH}


def _cache_folder() -> pathlib.Path:
    """A writable folder for this version of the kernels. Raises OSError."""
    sources = b"".join(path.read_bytes() for path in sorted(pathlib.Path(__file__).parent.glob("*.py")))
    sources += processor.facts().encode()  # which decide what code tiles.py writes
    name = "kernels-" + hashlib.sha256(sources).hexdigest()[:16]
    named = os.environ.get("NUMBA_CACHE_DIR")
    root = pathlib.Path(named) if named else user_cache()
    if root is None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), tempfile.gettempdir())
    folder = root / "dllm" / name
    folder.mkdir(parents=True, exist_ok=True)
    if not os.access(folder, os.W_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(folder))
    return folder


def _warn(error: OSError) -> None:
    """Say once, on one rank of a host, that kernels are compiled again in each process."""
    global _warned
    if not _warned and all(os.environ.get(name, "0") == "0" for name in LOCAL_RANK):
        print(
            f"dllm: compiled kernels cannot be kept in {error.filename or CACHE}: {error.strerror}; every process compiles its "
            "own until NUMBA_CACHE_DIR names a folder that has room",
            file=sys.stderr, flush=True,
        )  # fmt: skip
    _warned = True


class _Locator(caching.UserProvidedCacheLocator):  # type: ignore[misc]
    """Where Numba keeps a function. The folder's name says all about its source, and was tried once for all functions."""

    def __init__(self, function: Any, file: str) -> None:
        self._py_file, self._lineno = file, function.__code__.co_firstlineno

    @classmethod
    def from_function(cls, function: Any, file: str) -> Any:
        return cls(function, file)

    def get_cache_path(self) -> str:
        return str(CACHE)

    def get_source_stamp(self) -> int:
        return 0


class _Places(caching.CompileResultCacheImpl):  # type: ignore[misc]
    _locator_classes = [_Locator]  # noqa: RUF012, as Numba has it


class _Cache(caching.FunctionCache):  # type: ignore[misc]
    """What Numba keeps of a function. A disk that is full or taken away costs time, never the work."""

    _impl_class = _Places

    def load_overload(self, signature: Any, context: Any) -> Any:
        # Without what Numba does here first, which is to learn how everything is compiled: half the time of a start. What is
        # in the cache needs no more than the counting of references; what is not is compiled, and then Numba learns it.
        rtsys.initialize(context)
        try:
            return self._load_overload(signature, context)  # type: ignore[no-untyped-call]
        except OSError:  # `save_overload` will say it
            return None
        except Exception:  # of what was cut short when the machine went down: any
            with contextlib.suppress(OSError):
                self.flush()  # type: ignore[no-untyped-call]
            return None

    def save_overload(self, signature: Any, compiled: Any) -> None:
        try:
            super().save_overload(signature, compiled)  # type: ignore[no-untyped-call]
        except OSError as error:
            _warn(error)


class _NoCache(caching.NullCache):  # type: ignore[misc]
    """Where there is no folder."""

    def save_overload(self, signature: Any, compiled: Any) -> None:
        _warn(_problem)


_warned = False
CACHE: pathlib.Path | None = None  # of this version of the kernels, where there can be one
_problem = OSError()
try:
    CACHE = _cache_folder()
except OSError as error:
    _problem = error


def _keep_to_itself(library: Any) -> None:
    """Have the machine code of a kernel call its own copies of other kernels.

    Else the linker takes those that came into this process first, whatever kernel brought them. Each was optimised beside
    other code, so that its sums may be added up in another order: a process that compiles had other last bits than one that
    loads the same kernels from the cache.
    """
    own = [function for function in library._final_module.functions if function.linkage == llvm.Linkage.linkonce_odr]
    for function in own:
        function.linkage = "internal"
    _finalize(library)  # type: ignore[no-untyped-call]  # makes the machine code
    for function in own:
        function.linkage = "linkonce_odr"  # for kernels that it is linked into


_finalize = codegen.JITCodeLibrary._finalize_final_module
codegen.JITCodeLibrary._finalize_final_module = _keep_to_itself  # type: ignore[method-assign]


def kernel(function: F) -> F:
    """Decorate a kernel: no Python objects, no bounds checks, floating-point flags as FASTMATH says."""
    compiled, cache = numba.njit(**OPTIONS)(function), cast(Any, _NoCache if CACHE is None else _Cache)
    compiled._cache = cache() if CACHE is None else cache(function)  # as Numba's enable_caching does
    return cast(F, compiled)
