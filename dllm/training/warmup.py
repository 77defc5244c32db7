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
from ..config import SIDE_BY_SIDE, TEXT, Config
from ..kernels import reduce
from ..kernels import rows as rows_kernels
from ..kernels.gemm import zero_panels
from ..kernels.softmax import Chunk, softmax_cross_entropy
from ..kernels.types import DType
from ..model import blocks
from ..model.base import Learning, Model
from ..model.kinds import make_model
from ..model.layout import Layout
from ..model.precision import DTYPES, uses_bf16
from ..runs.state import State
from . import optim


def code_hash() -> str:
    """Names the version of the code by its text: 16 hexadecimal digits."""
    root = pathlib.Path(__file__).parents[1]
    files = sorted({*root.rglob("*.py"), *(root / "kernels").glob("*.py")})
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()[:16]


AT_ONCE = 2  # ranks between which the work of `warm_up` can be divided


def warm_up(config: Config, place: int = 0) -> None:
    """Run every kernel of a configuration once, so that all are compiled or loaded from the cache.

    place : of this rank on its node. The second begins with the output layer, a third of the work, to which the first comes
        last. Each finds in the cache what the other has compiled meanwhile.
    """
    dtype = DTYPES[config.train.precision]
    if place == 1:
        _output_layer(config, dtype)
    _others(config, dtype)
    _one_step(config, dtype)


def _others(config: Config, dtype: DType) -> None:
    """What no step on one rank reaches."""
    reduce.warm_up(dtype)
    rows_kernels.warm_up(dtype)
    compression.warm_up(config.averaging.compression, dtype)


def _output_layer(config: Config, dtype: DType) -> None:
    """The losses and gradients of the output layer alone."""
    model = _model(config, dtype)
    weights, gradients = (model.layout.arrays(np.zeros(model.layout.size, dtype))["output"] for _ in range(2))
    classes, columns = weights.shape[1], blocks.top(model.config)
    chunk = Chunk(2, columns, classes, model.operands, True)
    y, dy = zero_panels(2, columns, dtype), zero_panels(2, columns, dtype)
    softmax_cross_entropy(np.zeros(2, dtype), dy, gradients, chunk, y, 0, weights, np.zeros(2, np.int64), 1.0)


def _model(config: Config, dtype: DType, training: bool = True) -> Model:
    """One with few weights that has every part of the real one."""
    real, units = config.model, 2 if config.model.kind in TEXT else SIDE_BY_SIDE
    embedding = units if real.tied and real.kind in TEXT else min(2, real.embedding)  # as what is tied needs it
    small = dataclasses.replace(
        real, embedding=embedding, hidden=units, layers=2, encoder_layers=1, projection=min(2, real.projection)
    )
    layout = Layout(small, 5, dtype)
    bf16, learning = training and uses_bf16(config.train.precision), Learning(config.train.smoothing)
    return make_model(layout, 2, 1, bf16=bf16, training=training, learning=learning)


def _one_step(config: Config, dtype: DType) -> None:
    """A step, and the loss without training. The optimiser is first: another rank compiles the output layer meanwhile."""
    model = _model(config, dtype)
    P, table = model.layout.size, model.layout.table
    optimizer = optim.make_optimizer(config.train, table)
    h, c = np.zeros((2, model.layout.carried, 1, model.config.hidden), dtype)
    moments = [np.zeros(P, dtype) for _ in range(optimizer.moments)]
    state = State(np.zeros(P, dtype), moments, h, c, np.zeros(1))
    model.bind(state.theta)
    rows = None if table is None else np.zeros(1, np.int64)
    start = P if table is None else table.start
    optimizer.step(state, Gradient([(0, model.gradient[:start]), (start, model.gradient[start:])], rows), 0.0)
    model.forward(model.example(), h, c, 1.0, (1, 1, np.zeros(1, np.int64)))
    model.backward()
    measured = _model(config, dtype, training=False)
    measured.bind(state.theta)
    measured.forward(measured.example(), h, c)
