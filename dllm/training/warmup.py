"""Before a run: every kernel is compiled, or loaded from the cache, and the code has a name."""

import dataclasses
import hashlib
import pathlib

import numpy as np

from ..comm import compression
from ..kernels.compress import add_signs, pack_signs
from ..kernels.reduce import copy, fence, sum_ranks, sum_ranks_of_rows, weighted_differences, weighted_sum
from ..model.language_model import LanguageModel
from ..model.precision import DTYPES
from ..runs.state import State
from . import optim


def code_hash():
    """Names the version of the code by its text."""
    root = pathlib.Path(__file__).parents[1]
    files = sorted({*root.rglob("*.py"), *(root / "kernels").glob("*.py")})
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()[:16]


def warm_up(config):
    """Run every kernel of a configuration once on a tiny model, so that all are compiled or loaded from the cache."""
    small = dataclasses.replace(config.model, embedding=min(2, config.model.embedding), hidden=2, layers=2)
    small = dataclasses.replace(small, tied=config.model.tied and small.embedding == 2)
    dtype = DTYPES[config.train.precision]
    model = LanguageModel(small, 5, dtype, 2, 1, bf16=config.train.precision == "bf16")
    optimizer = optim.make_optimizer(config.train, model.layout.table)
    P = model.layout.size
    h, c = np.zeros((2, 1, 2), dtype), np.zeros((2, 1, 2), dtype)
    moments = [np.zeros(P, dtype) for _ in range(optimizer.moments)]
    state = State(np.zeros(P, dtype), moments, h, c, np.zeros(1))
    model.bind(state.theta)
    tokens = np.zeros((2, 1), np.int64)
    model.forward(tokens, tokens, h, c, 1.0, (1, 1, np.zeros(1, np.int64)))
    model.backward()
    rows = None if model.layout.table is None else np.zeros(1, np.int64)
    start = P if rows is None else model.layout.table.start
    optimizer.step(state, [(0, model.gradient[:start]), (start, model.gradient[start:])], rows, 0.0)
    fence()
    vectors = np.zeros((1, 8), dtype)
    sum_ranks(vectors, 0, 0, 8)
    copy(vectors[0], vectors[0])
    sum_ranks_of_rows(np.zeros((1, 2), dtype), vectors, 0, np.zeros(1, np.int64))
    for combine in (weighted_sum, weighted_differences):
        combine(vectors[0], 1.0, vectors[0], np.zeros(1), vectors)
    _warm_up_compression(config.averaging, vectors[0])
    LanguageModel(small, 5, dtype, 2, 1, state.theta, training=False).forward(tokens, tokens, h, c)


def _warm_up_compression(config, vector):
    if config.compression == "signum":
        bits = np.zeros(1, np.uint8)
        pack_signs(bits, vector)
        add_signs(vector, bits, 1.0)
    elif config.compression in compression.NAMES:
        Q = compression.make(config.compression, [vector.shape], vector.dtype, 1.0, feedback=True)
        payload = np.zeros(Q.size, np.uint8)
        compression.ErrorFeedback(Q).encode(vector, payload, 0, 0)
        Q.decode(payload, vector)
        Q.add(payload, vector)
