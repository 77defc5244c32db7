"""Before a run: every kernel is compiled, or loaded from the cache, and the code has a name.

What a run consists of is run once, on a tiny model. Kernels that a tiny step does not reach say beside themselves how they
are warmed up: `warm_up` of their file.
"""

import dataclasses
import hashlib
import pathlib

import numpy as np

from ..comm import compression
from ..comm.averaging import Gradient
from ..config import Config, ModelConfig
from ..kernels import reduce
from ..kernels import rows as rows_kernels
from ..kernels.types import DType
from ..model.language_model import LanguageModel
from ..model.layout import Layout
from ..model.precision import DTYPES, uses_bf16
from ..runs.state import State
from . import optim


def code_hash() -> str:
    """Names the version of the code by its text: 16 hexadecimal digits."""
    root = pathlib.Path(__file__).parents[1]
    files = sorted({*root.rglob("*.py"), *(root / "kernels").glob("*.py")})
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()[:16]


def warm_up(config: Config) -> None:
    """Run every kernel of a configuration once, so that all are compiled or loaded from the cache."""
    dtype = DTYPES[config.train.precision]
    _one_step(config, dtype)
    reduce.warm_up(dtype)
    rows_kernels.warm_up(dtype)
    compression.warm_up(config.averaging.compression, dtype)


def _one_step(config: Config, dtype: DType) -> None:
    """A step of a model with few weights that has every part of the real one, and the loss of it without training."""
    small, bf16 = _small(config.model), uses_bf16(config.train.precision)
    layout = Layout(small, 5, dtype)
    model = LanguageModel(layout, 2, 1, bf16=bf16)
    P, table = model.layout.size, model.layout.table
    optimizer = optim.make_optimizer(config.train, table)
    h, c = np.zeros((2, 1, 2), dtype), np.zeros((2, 1, 2), dtype)
    moments = [np.zeros(P, dtype) for _ in range(optimizer.moments)]
    state = State(np.zeros(P, dtype), moments, h, c, np.zeros(1))
    model.bind(state.theta)
    tokens = np.zeros((2, 1), np.int64)
    model.forward(tokens, tokens, h, c, 1.0, (1, 1, np.zeros(1, np.int64)))
    model.backward()
    rows = None if table is None else np.zeros(1, np.int64)
    start = P if table is None else table.start
    optimizer.step(state, Gradient([(0, model.gradient[:start]), (start, model.gradient[start:])], rows), 0.0)
    LanguageModel(layout, 2, 1, theta=state.theta, training=False).forward(tokens, tokens, h, c)


def _small(model: ModelConfig) -> ModelConfig:
    small = dataclasses.replace(model, embedding=min(2, model.embedding), hidden=2, layers=2)
    return dataclasses.replace(small, tied=model.tied and small.embedding == 2)
