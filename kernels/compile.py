"""How every kernel is compiled: to machine code, once a machine, cached on disk under a name that holds the sources' hash.

Numba notices a change in the file of a kernel but not in the files of what it calls, so the folder's name has to.
"""

import hashlib
import os
import pathlib
from collections.abc import Callable
from typing import Any, TypeVar, cast

import numba

from . import processor

F = TypeVar("F", bound=Callable[..., Any])

# Not the whole of `fastmath`: NaN and infinity keep their meaning, so that a diverging run is seen. Sums may be
# reordered, which vectorises them; the order is fixed when the kernel is compiled, so results repeat exactly.
FASTMATH = {"contract", "nsz", "reassoc", "arcp"}
OPTIONS: dict[str, Any] = {"nogil": True, "error_model": "numpy", "boundscheck": False, "fastmath": FASTMATH}


def _cache_folder() -> pathlib.Path | None:
    """A writable folder for this version of the kernels, or None: then they are compiled anew in each process."""
    sources = b"".join(path.read_bytes() for path in sorted(pathlib.Path(__file__).parent.glob("*.py")))
    sources += processor.facts().encode()  # which decide what code tiles.py writes
    name = "kernels-" + hashlib.sha256(sources).hexdigest()[:16]
    user = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    folder = pathlib.Path(os.environ.get("NUMBA_CACHE_DIR") or user, "dllm", name)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return None
    return folder if os.access(folder, os.W_OK) else None


CACHE = _cache_folder()


def kernel(function: F) -> F:
    """Decorate a kernel: no Python objects, no bounds checks, floating-point flags as FASTMATH says."""
    config: Any = numba.config  # whose names are made when it is imported
    previous, config.CACHE_DIR = config.CACHE_DIR, str(CACHE or "")
    try:
        return cast(F, numba.njit(cache=CACHE is not None, **OPTIONS)(function))
    finally:
        config.CACHE_DIR = previous
