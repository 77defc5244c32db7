"""Small models of all kinds but the language model, with batches that they take, and what PyTorch makes of the same."""

import numpy as np
import pytest

from dllm.config import ModelConfig
from dllm.kernels.team import Team
from dllm.model.base import PLAIN, Learning
from dllm.model.batch import Batch
from dllm.model.kinds import make_model
from dllm.model.layout import Layout

V, LABELS, FRAME = 11, 5, 7  # vocabulary, labels, and numbers in a frame
S, T, B = 7, 5, 5  # steps of inputs, of targets where they have their own, and lanes
LENGTHS = np.array([7, 3, 0, 1, 5])
SMOOTHING = Learning(smoothing=0.1)
SHAPES = {
    "seq2seq, dot": {"kind": "seq2seq", "attention": "dot"},
    "seq2seq, both ways": {"kind": "seq2seq", "bidirectional": True, "layers": 2, "biases": 2},
    "seq2seq, tied": {"kind": "seq2seq", "tied": True, "bidirectional": True, "layers": 3, "encoder_layers": 2},
    "seq2seq, copying": {"kind": "seq2seq", "copy": True, "bidirectional": True, "layers": 2, "projection": 9},
    "seq2seq, copying, dot": {"kind": "seq2seq", "copy": True, "attention": "dot", "layers": 2, "encoder_layers": 2},
    "tagger": {"kind": "tagger", "bidirectional": True},
    "tagger, onward": {"kind": "tagger", "layers": 2, "projection": 9, "biases": 2},
    "tagger, frames": {"kind": "tagger", "bidirectional": True, "layers": 2, "features": FRAME},
    "classifier, max": {"kind": "classifier", "bidirectional": True},
    "classifier, mean": {"kind": "classifier", "bidirectional": True, "layers": 2, "pool": "mean", "projection": 9},
    "classifier, last": {"kind": "classifier", "bidirectional": True, "pool": "last"},
    "classifier, onward": {"kind": "classifier", "layers": 2, "pool": "last"},
    "classifier, frames": {"kind": "classifier", "features": FRAME, "projection": 9},
    "bilm": {"kind": "bilm"},
    "bilm, tied": {"kind": "bilm", "layers": 3, "tied": True, "embedding": 16, "biases": 2},
    "ctc": {"kind": "ctc", "bidirectional": True, "features": FRAME, "projection": 9},
    "ctc, onward": {"kind": "ctc", "layers": 2, "features": FRAME},
}
EVERY_SHAPE = pytest.mark.parametrize("shape", SHAPES)
READ_WHOLE = [shape for shape in SHAPES if not shape.startswith("bilm")]  # by lanes of any length


def configured(shape, **changes):
    """A small model of a shape."""
    labels = {"labels": LABELS} if SHAPES[shape]["kind"] in ("tagger", "classifier", "ctc") else {}
    return ModelConfig(**{"embedding": 6, "hidden": 16, **labels, **SHAPES[shape], **changes})


def build(config, dtype=np.float64, threads=1, bf16=False, training=True, learning=PLAIN, lanes=B):
    """A model with random parameters: the same numbers in each dtype, up to rounding."""
    layout = Layout(config, V, dtype)
    theta = np.zeros(layout.size, dtype)
    layout.load(theta, 0, np.random.default_rng(1).uniform(-0.6, 0.6, layout.parameters).astype(dtype))
    options = {"theta": theta, "training": training, "bf16": bf16, "team": Team(threads), "learning": learning}
    return make_model(layout, S, lanes, **options)


def batch_of(config, lengths=LENGTHS, seed=2):
    """What a model takes: lanes of some lengths, of which those of no length have no target."""
    rng, lanes = np.random.default_rng(seed), len(lengths)
    if config.kind == "bilm":
        targets = rng.integers(0, V, (S, 2 * lanes))
        targets[-2:, ::3] = -1
        return Batch(rng.integers(0, V, (S, 2 * lanes)), targets)
    tokens = not config.features
    inputs = rng.integers(0, V, (S, lanes)) if tokens else rng.standard_normal((S, lanes, FRAME)).astype(np.float32)
    if config.kind == "seq2seq":
        targets, before = rng.integers(0, V, (2, T, lanes))
        targets[np.arange(T)[:, None] >= np.where(lengths, rng.integers(1, T + 1, lanes), 0)] = -1
        return Batch(inputs, targets, lengths, before)
    steps = {"tagger": S, "classifier": 1, "ctc": 3}[config.kind]
    targets, end = rng.integers(0, LABELS, (steps, lanes)), lengths
    if config.kind == "ctc":  # as many labels as there is time for, were they all the same
        end = np.minimum((lengths + 1) // 2, rng.integers(1, 4, lanes))
    targets[np.arange(steps)[:, None] >= end] = -1
    if config.kind == "tagger":
        targets[1::3] = -1
    return Batch(inputs, targets, lengths)


def states(config, lanes=B):
    """h, c before a window; of kinds that carry none on, none."""
    carried = {"bilm": 2 * config.layers}.get(config.kind, 0)
    return 0.5 * np.random.default_rng(3).standard_normal((2, carried, lanes, config.hidden))


def part_of(batch, lane, steps=None):
    """One lane of a batch alone, without the last steps of its window."""
    one = slice(lane, lane + 1)
    parts = [batch.inputs[:steps], batch.targets, batch.lengths, batch.before]
    if len(batch.targets) == len(batch.inputs):
        parts[1] = batch.targets[:steps]
    return Batch(
        *(None if part is None else np.ascontiguousarray(part[..., one] if part.ndim < 3 else part[:, one]) for part in parts)
    )


def run(model, batch, scale=1.0, mask=None, on_ready=None):
    """Losses and gradient as the training step gets them, of states that stay as they are."""
    parameters = model.layout.parameters
    model.layout.load(model.gradient, 0, np.full(parameters, np.nan))  # whatever is there must be overwritten ...
    if model.layout.table is not None:
        model.gradient[model.layout.table.start :] = 0  # ... but for rows of the embedding, which the caller zeroes
    h, c = states(model.config, (batch.lengths if batch.lengths is not None else batch.targets[0, ::2]).size).astype(
        model.dtype
    )
    losses = model.forward(batch, h, c, scale, mask).copy()
    model.backward(on_ready)
    return losses, model.gradient.copy()


def tensors(model, vector):
    """name -> tensor of a flat vector."""
    return {name: model.layout.read(vector, name) for name in model.layout.tensors}


class TorchModel:
    """The same model of nn.LSTM, of lanes that are not empty."""

    def __init__(self, torch, model, smoothing=0.0):
        self.torch, self.config, self.smoothing = torch, model.config, smoothing
        found = tensors(model, model.theta)
        self.weights = {name: torch.tensor(tensor, requires_grad=True) for name, tensor in found.items()}

    def losses(self, batch):
        """Losses (T,B), and what the gradient is of, a sum: with smoothing another one."""
        torch, config = self.torch, self.config
        if config.kind == "bilm":
            return self._both_ways(batch)
        lengths, targets = torch.tensor(batch.lengths), torch.tensor(batch.targets)
        x = torch.tensor(batch.inputs).double() if config.features else self._embedded(batch.inputs)
        layers = config.encoder_layers if config.kind == "seq2seq" else config.layers
        ways = ["forward", "backward"][: 1 + config.bidirectional]
        names = [f"encoder.{layer}.{way}" for layer in range(layers) for way in ways]
        packed = torch.nn.utils.rnn.pack_padded_sequence(x, lengths, enforce_sorted=False)
        m = torch.nn.utils.rnn.pad_packed_sequence(self._lstm(names, packed), total_length=len(x))[0]
        if config.kind == "seq2seq":
            return self._decoded(batch, m, lengths, targets)
        if config.kind == "classifier":
            m = self._pooled(m, lengths, config.pool)[None]
        u = torch.tanh(m @ self.weights["projection.weight"]) if config.projection else m
        logits = self._logits(u)
        if config.kind == "ctc":
            counts = (targets >= 0).sum(0)
            found = torch.nn.functional.ctc_loss(
                logits.log_softmax(2), targets.T.clamp(min=0), lengths, counts, blank=LABELS, reduction="none"
            )
            return torch.stack([found, *torch.zeros(len(targets) - 1, len(lengths))]), found.sum()
        return self._cross_entropy(logits, targets)

    def _embedded(self, tokens):
        return self.torch.nn.functional.embedding(self.torch.tensor(tokens), self.weights["embedding.weight"])

    def _lstm(self, names, x, state=None):
        """What nn.LSTM gives of x, with the weights of layers and directions by name."""
        torch, hidden = self.torch, self.config.hidden
        ways = 2 if any(".backward" in name for name in names) and any(".forward" in name for name in names) else 1
        inputs = len(self.weights[f"{names[0]}.weight_x"])
        lstm = torch.nn.LSTM(inputs, hidden, len(names) // ways, bidirectional=ways == 2, dtype=torch.float64)
        flat = []
        for name in names:
            bias = self.weights[f"{name}.bias"]
            second = bias[1] if len(bias) == 2 else torch.zeros_like(bias[0])
            flat += [self.weights[f"{name}.weight_x"].T, self.weights[f"{name}.weight_h"].T, bias[0], second]
        lstm._flat_weights = [one.contiguous() for one in flat]  # so that gradients reach our own tensors
        return lstm(x, state)[0]

    def _logits(self, u):
        table = self.weights["embedding.weight" if self.config.tied else "output.weight"]
        return u @ table.T + self.weights["output.bias"]

    def _cross_entropy(self, logits, targets):
        entropy, flat = self.torch.nn.functional.cross_entropy, (logits.flatten(0, 1), targets.flatten())
        losses = entropy(*flat, ignore_index=-1, reduction="none").reshape(targets.shape)
        return losses, entropy(*flat, ignore_index=-1, reduction="sum", label_smoothing=self.smoothing)

    def _pooled(self, m, lengths, how):
        torch, H, last = self.torch, self.config.hidden, self.torch.arange(len(lengths))
        counts = torch.arange(len(m))[:, None] < lengths
        if how == "max":
            return m.masked_fill(~counts[..., None], -torch.inf).amax(0)
        return m.sum(0) / lengths[:, None] if how == "mean" else torch.cat([m[lengths - 1, last, :H], m[0, :, H:]], 1)

    def _both_ways(self, batch):
        """Two models of text that share their embedding and their output."""
        torch, config, both = self.torch, self.config, []
        lanes = batch.inputs.shape[1] // 2
        h, c = torch.tensor(states(config, lanes))
        for way, name in enumerate(("forward", "backward")):
            some, layers = slice(way * lanes, (way + 1) * lanes), slice(way * config.layers, (way + 1) * config.layers)
            names = [f"{name}.{layer}" for layer in range(config.layers)]
            y = self._lstm(names, self._embedded(batch.inputs[:, some]), (h[layers].contiguous(), c[layers].contiguous()))
            both.append(self._cross_entropy(self._logits(y), torch.tensor(batch.targets[:, some])))
        return tuple(one + other for one, other in zip(*both, strict=True))

    def _decoded(self, batch, m, lengths, targets):
        torch, weights = self.torch, self.weights
        first = torch.tanh(self._pooled(m, lengths, "last") @ weights["bridge.weight"])[None]
        state = first, torch.zeros_like(first)
        h = self._lstm(["decoder.0"], self._embedded(batch.before), state)
        k = m @ weights["keys.weight"] if self.config.attention == "general" else m
        scores = torch.einsum("tbh,sbh->bts", h, k)
        outside = torch.arange(len(m)) >= lengths[:, None]
        A = scores.masked_fill(outside[:, None], -torch.inf).softmax(2)
        context = torch.einsum("bts,sbm->tbm", A, m)
        for layer in range(1, self.config.layers):
            h = self._lstm([f"decoder.{layer}"], torch.cat([h, context], 2) if layer == 1 else h, state)
        top = torch.cat([h, context], 2)
        losses, objective = self._cross_entropy(self._logits(torch.tanh(top @ weights["combine.weight"])), targets)
        if self.config.copy:
            g = torch.sigmoid(top @ weights["gate.weight"])[..., 0]
            there = torch.tensor(batch.inputs)[:, None] == targets  # (S,T,B)
            P = g * torch.exp(-losses) + (1 - g) * (A.permute(2, 1, 0) * there).sum(0)
            plain, losses = losses, torch.where(targets >= 0, -torch.log(P), 0)
            objective = objective + (1 - self.smoothing) * (losses - plain).sum()
        return losses, objective

    def gradients(self):
        """name -> gradient, after backward."""
        return {name: weight.grad.numpy() for name, weight in self.weights.items()}
