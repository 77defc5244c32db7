"""What tests of kernels and models share: how close is close, derivatives by differences, matrices in panels, guarded
memory, kinds of models, and small models with something to read.
"""

import ctypes
import mmap

import numpy as np
import pytest

from dllm.config import ModelConfig
from dllm.kernels import compress, gemm
from dllm.kernels.operands import Operands
from dllm.model.batch import Batch
from dllm.model.language_model import LanguageModel
from dllm.model.layout import Layout

CLOSE = {np.float32: 2e-5, np.float64: 1e-12}  # norm-wise, for sums of some hundred terms
DTYPES = pytest.mark.parametrize("dtype", [np.float32, np.float64])
KINDS = {
    "untied": {},
    "tied": {"embedding": 6, "tied": True},
    "one-hot": {"embedding": 0},
    "one layer": {"layers": 1},
    "one layer, one-hot": {"layers": 1, "embedding": 0},
    "one layer, tied": {"layers": 1, "embedding": 6, "tied": True},
    "three layers": {"layers": 3},
    "two biases": {"biases": 2},
    "two biases, tied, three layers": {"biases": 2, "embedding": 6, "tied": True, "layers": 3},
    "wide embedding": {"embedding": 9},
}
EVERY_KIND = pytest.mark.parametrize("kind", KINDS)
V, T, B = 11, 6, 3  # vocabulary, window and lanes of a small model


def relative(found, expected):
    return np.linalg.norm(found - expected) / max(np.linalg.norm(expected), 1e-300)


def central(function, arrays, name, direction, step=1e-5):
    """The derivative of function(**arrays) along `direction` of one array."""
    ahead, behind = (function(**{**arrays, name: arrays[name] + sign * step * direction}) for sign in (1, -1))
    return (ahead - behind) / (2 * step)


def check_by_differences(function, arrays, gradients, rng):
    """Central differences of a scalar function: along a random direction, and where arrays are small, every element."""
    for name, gradient in gradients.items():
        direction = rng.standard_normal(gradient.shape)
        numeric = central(function, arrays, name, direction)
        scale = np.linalg.norm(gradient) * np.linalg.norm(direction)
        assert abs(numeric - (gradient * direction).sum()) <= 1e-6 * max(abs(numeric), 1e-2 * scale), name
        if gradient.size > 100:
            continue
        for place in np.ndindex(gradient.shape):
            unit = np.zeros(gradient.shape)
            unit[place] = 1
            numeric = central(function, arrays, name, unit)
            assert numeric == pytest.approx(gradient[place], rel=1e-6, abs=1e-8 * abs(gradient).max()), (name, place)


def check_by_complex_step(function, arrays, gradients, rng):
    """The derivative along a random direction, exact to rounding: Im f(x + i 1e-30 d) / 1e-30."""
    for name, gradient in gradients.items():
        direction = rng.standard_normal(gradient.shape)
        shifted = {**arrays, name: arrays[name] + 1e-30j * direction}
        derivative = function(**shifted).imag / 1e-30
        scale = np.linalg.norm(gradient) * np.linalg.norm(direction)
        assert abs(derivative - (gradient * direction).sum()) <= 1e-12 * max(abs(derivative), 1e-2 * scale), name


def in_panels(x, extra=0):
    """x (M,N) in panels, with `extra` columns more."""
    M, N = x.shape
    panels = gemm.zero_panels(M, N + extra, x.dtype)
    gemm.to_panels(panels, 0, np.ascontiguousarray(x))
    return panels


def nan_panels(M, N, dtype):
    panels = gemm.zero_panels(M, N, dtype)
    panels[:] = np.nan
    return panels


def out_of_panels(panels, N, first=0, M=None):
    """The first N columns of M rows of panels, from row `first` on."""
    x = np.empty(((M or panels.shape[1] - first), N), panels.dtype)
    gemm.from_panels(x, panels, first)
    return x


def padding(panels, N):
    """What lies beyond column N."""
    return panels.transpose(1, 0, 2).reshape(panels.shape[1], -1)[:, N:]


def rounded(x):
    """float32 rounded to the nearest bfloat16, ties to even."""
    bits = np.asarray(x, np.float32).view(np.uint32).astype(np.uint64)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) & 0xFFFF0000).astype(np.uint32).view(np.float32)


def spoil(*arrays):
    """Bits that are no number, in float32, float64 and bfloat16, for memory that has to be written before it is read."""
    for array in arrays:
        array.view(np.uint8)[:] = 0xFF


class SpoiltOperands(Operands):
    """Whose memory has held what is no number: whoever reads more than was written sees it."""

    def empty(self, name, shape, dtype):
        out = super().empty(name, shape, dtype)
        spoil(out)
        return out


def gate_panels(x):
    """x (M,4H) in panels of gates, as kernels/lstm.py has them."""
    M, H = len(x), x.shape[1] // 4
    gates = [in_panels(part) for part in np.split(x, 4, axis=1)] if H else []
    return np.ascontiguousarray(np.stack(gates, axis=1)).reshape(-1, M, gates[0].shape[2])


def out_of_gate_panels(panels, H):
    """(M,4H) of panels of gates."""
    P, M, R = panels.shape
    return np.concatenate([out_of_panels(panels.reshape(P // 4, 4, M, R)[:, q].copy(), H) for q in range(4)], axis=1)


def guarded(array):
    """A copy that ends where its process may read no further: one element beyond is a segmentation fault."""
    page = mmap.PAGESIZE
    size = -(-max(array.nbytes, 1) // page) * page
    memory = mmap.mmap(-1, size + page)
    start = np.frombuffer(memory, np.uint8)
    assert ctypes.CDLL(None, use_errno=True).mprotect(ctypes.c_void_p(start.ctypes.data + size), page, 0) == 0
    copy = start[size - array.nbytes : size].view(array.dtype).reshape(array.shape)
    copy[:] = array
    return copy


def configured(kind="untied", **changes):
    """A small model of a kind."""
    return ModelConfig(**{"embedding": 4, "hidden": 6, "layers": 2, **KINDS[kind], **changes})


def build(config, seed=1, lanes=B, window=T, dtype=np.float64, training=True):
    """A model of a configuration, with random parameters."""
    layout = Layout(config, V, dtype)
    theta = np.zeros(layout.size, dtype)
    layout.load(theta, 0, np.random.default_rng(seed).uniform(-0.6, 0.6, layout.parameters).astype(dtype))
    return LanguageModel(layout, window, lanes, theta=theta, training=training)


def tensors(model, vector):
    """name -> tensor of a flat vector."""
    return {name: model.layout.read(vector, name) for name in model.layout.tensors}


def text(seed=2, width=T, lanes=B):
    """Tokens and targets (T,B), and the generator that made them."""
    rng = np.random.default_rng(seed)
    return rng.integers(0, V, (width, lanes)), rng.integers(0, V, (width, lanes)), rng


def reference(model, tokens, h=None, c=None):
    """Logits (T,B,V) and states h, c (L,B,H) behind tokens (T,B), by the equations of kernels/lstm.py in float64.

    h, c : (L,B,H), optional
        States before; default: zeros.
    """
    p = {name: tensor.astype(np.float64) for name, tensor in tensors(model, model.theta).items()}
    config, (steps, lanes) = model.config, np.shape(tokens)
    zeros = np.zeros((config.layers, lanes, config.hidden))
    h, c = (zeros.copy() if state is None else np.array(state, np.float64) for state in (h, c))
    sigmoid = lambda z: (1 + np.tanh(z / 2)) / 2
    logits = np.empty((steps, lanes, model.vocabulary))
    for t in range(steps):
        x = p["embedding.weight"][tokens[t]]  # of one-hot inputs x @ Wx
        for layer in range(config.layers):
            Wx = p.get(f"lstm.{layer}.weight_x")
            a = (x if Wx is None else x @ Wx) + h[layer] @ p[f"lstm.{layer}.weight_h"] + p[f"lstm.{layer}.bias"].sum(axis=0)
            i, f, g, o = np.split(a, 4, axis=1)
            c[layer] = sigmoid(f) * c[layer] + sigmoid(i) * np.tanh(g)
            x = h[layer] = sigmoid(o) * np.tanh(c[layer])
        logits[t] = x @ p.get("output.weight", p["embedding.weight"]).T + p["output.bias"]
    return logits, h, c


def states(config, lanes=B, seed=3):
    return 0.5 * np.random.default_rng(seed).standard_normal((2, config.layers, lanes, config.hidden))


def run(model, tokens, targets, h, c, scale=1.0, mask=None, **callbacks):
    """Losses and gradient as the training step gets them; h and c stay as they are."""
    model.gradient[:] = np.nan  # whatever is there must be overwritten ...
    if model.layout.table is not None:
        model.gradient[model.layout.table.start :] = 0  # ... but for rows of the embedding, which the caller zeroes
    losses = model.forward(Batch(tokens, targets), h.copy(), c.copy(), scale, mask).copy()
    model.backward(**callbacks)
    return losses, model.gradient.copy()


class Bundled:
    """What the serving engine takes, of a model."""

    def __init__(self, model):
        self.config, self.dtype, self._model = model.config, model.dtype, model

    def model(self, window, lanes, team):
        return LanguageModel(self._model.layout, window, lanes, theta=self._model.theta, training=False, team=team)


def numbers(size, dtype=np.float64, seed=1):
    """Normal numbers, some of them zero."""
    rng = np.random.default_rng(seed)
    return (rng.standard_normal(size) * (rng.random(size) > 0.1)).astype(dtype)


def chosen(n, k, step, seed=1):
    indices = np.full(k, -1, np.int32)
    compress.random_indices(indices, n, seed, step)
    return indices
