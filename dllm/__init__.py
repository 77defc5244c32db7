"""dllm: decentralised training of LSTM language models over MPI ranks. The README shows the commands.

In Python, `load` a trained model to let it generate, answer, score and embed, and read the `metrics` of a run (api.py).
"""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.2.0"
__all__ = ["Model", "Score", "UserError", "__version__", "load", "metrics"]

if TYPE_CHECKING:
    from .api import Model, Score, load, metrics
    from .errors import UserError


def __getattr__(name: str) -> Any:
    """A name of the Python API, loaded when it is first asked for: `import dllm` alone costs nothing and starts no MPI."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(".api", __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
