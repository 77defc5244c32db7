"""The language model: embedding, L LSTM layers, output layer, over one flat vector of parameters and one of gradients.

Knows no MPI and no files. The vectors are laid out in the order in which the backward finishes them (output layer first,
embedding last), so that what is final is always a prefix and can leave while the rest is still computed.
"""

import math
from dataclasses import dataclass

import numpy as np

from .kernels.dropout import dropout
from .kernels.embedding import embedding_backward, embedding_forward
from .kernels.gemm import matmul, packed_shape
from .kernels.lstm import lstm_backward, lstm_forward
from .kernels.softmax import softmax_cross_entropy

DTYPES = {"fp32": np.float32, "fp64": np.float64}
CHUNK = 1 << 23  # at most so many logits in memory at a time, and at most half of a window's


@dataclass(frozen=True)
class Tensor:
    """Where a named tensor lies in the flat vectors: elements [start, stop), its shape, row-major."""

    start: int
    stop: int
    shape: tuple


class Layout(dict):
    """name -> Tensor, in the order of the flat vectors. `size` is their length P."""

    def __init__(self, config, vocabulary):
        super().__init__()
        self.size = 0
        V, E, H = vocabulary, config.embedding, config.hidden
        if not config.tied:
            self._add("output.weight", V, H)
        self._add("output.bias", V)
        for layer in reversed(range(config.layers)):
            D = H if layer else E
            if D:
                self._add(f"lstm.{layer}.weight_x", D, 4 * H)
            self._add(f"lstm.{layer}.weight_h", H, 4 * H)
            self._add(f"lstm.{layer}.bias", config.biases, 4 * H)
        self._add("embedding.weight", V, E or 4 * H)  # one-hot inputs: this is Wx of layer 0, looked up by token

    def _add(self, name, *shape):
        stop = self.size + math.prod(shape)
        self[name] = Tensor(self.size, stop, shape)
        self.size = stop

    def views(self, vector):
        """name -> view of the flat vector (P,)."""
        return {name: vector[tensor.start : tensor.stop].reshape(tensor.shape) for name, tensor in self.items()}

    def active(self):
        """Parameters that take part in a matrix product for each token; what GFLOP/s are counted by."""
        products = sum(math.prod(t.shape) for name, t in self.items() if name.endswith(("weight_x", "weight_h")))
        output = self.get("output.weight", self["embedding.weight"])
        return products + math.prod(output.shape)


class LanguageModel:
    """One rank's model over windows of at most T steps and B lanes.

    Parameters
    ----------
    config : ModelConfig
    vocabulary : int
        V.
    dtype : numpy.float32 or numpy.float64
    window, lanes : int
        T and B.
    theta : (P,) array
        The parameters; see `bind`.
    training : bool
        False: no gradients and one layer's activations only.
    """

    def __init__(self, config, vocabulary, dtype, window, lanes, theta=None, training=True):
        self.config, self.vocabulary, self.dtype, self.training = config, vocabulary, np.dtype(dtype), training
        self.layout, self.window = Layout(config, vocabulary), window
        T, B, H, L, E = window, lanes, config.hidden, config.layers, config.embedding
        copies = L if training else 1
        array = lambda *shape: np.zeros(shape, dtype)
        self._h = [array(T + 1, B, H) for _ in range(copies)]
        self._c = [array(T + 1, B, H) for _ in range(copies)]
        self._gates = [array(T, B, 4 * H) for _ in range(copies)]
        self._bias = array(4 * H)
        shapes = packed_shape(H, 4 * H, dtype), packed_shape(4 * H, H, dtype)
        memory = array(max(map(math.prod, shapes)))  # one for both: forward and backward take turns
        self._Wh_packed, self._WhT_packed = (memory[: math.prod(shape)].reshape(shape) for shape in shapes)
        self._x = array(T, B, E)  # the embedded window, after dropout
        self._dropped = [array(T, B, H) for _ in range(L if config.dropout and training else 0)]
        self._losses = array(T * B)
        chunks = max(2, -(-T * B * vocabulary // CHUNK))
        self._logits = array(max(1, -(-T * B // chunks)), vocabulary)
        if training:
            self.gradient = array(self.layout.size)
            self._d = self.layout.views(self.gradient)
            self._dy, self._dx = array(T, B, H), array(T, B, E)
            self._dh_next, self._dc, self._db = array(B, H), array(B, H), array(4 * H)
        if theta is not None:
            self.bind(theta)

    def bind(self, theta):
        """Use the flat vector theta (P,) as parameters from now on; it is not copied."""
        self.theta, self._p = theta, self.layout.views(theta)

    def initialise(self, seed):
        """Fill theta: uniform(+-a) as the config says; every rank gets the same values, in float32 those of float64 rounded."""
        config = self.config
        ranges = {"output.weight": config.init_output, "output.bias": config.init_output_bias}
        if config.embedding:
            ranges["embedding.weight"] = config.init_output
        for number, (name, tensor) in enumerate(self.layout.items()):
            bound = ranges.get(name, config.init or 1 / math.sqrt(config.hidden))
            generator = np.random.Generator(np.random.Philox(key=[seed, number]))
            for start in range(tensor.start, tensor.stop, 1 << 20):
                part = self.theta[start : min(start + (1 << 20), tensor.stop)]
                part[:] = generator.uniform(-bound, bound, part.size)
            if name.endswith(".bias") and name.startswith("lstm") and config.forget_bias:
                self._p[name][0, config.hidden : 2 * config.hidden] = config.forget_bias

    def forward(self, tokens, targets, h, c, scale=0.0, mask=None, between=None):
        """Losses of a window; when training, the output layer's gradients too, since they need the logits.

        Parameters
        ----------
        tokens, targets : (T,B) int64
            A target of -1 is padding.
        h, c : (L,B,H), in and out
            The state before and after the window.
        scale : float
            Factor on every gradient.
        mask : (seed, step, lanes (B,) int64), optional
            Names the dropout masks; None: no dropout.
        between : callable, optional
            Called now and then.

        Returns
        -------
        (T,B) losses in nats, valid until the next call.
        """
        T, B = tokens.shape
        y = self._hidden(tokens, h, c, mask, between).reshape(T * B, -1)
        losses, W, outputs = self._losses[: T * B], self._output_weight(self._p), (None, None, None)
        if self.training:
            outputs = self._dy[:T].reshape(T * B, -1), self._output_weight(self._d), self._d["output.bias"]
        softmax_cross_entropy(losses, *outputs, self._logits, y, W, self._p["output.bias"], targets.reshape(-1), scale, between)
        return losses.reshape(T, B)

    def backward(self, on_ready=None, between=None):
        """The rest of the gradient of the last `forward`, into `self.gradient` (P,).

        on_ready(slice) is called as soon as a slice is final, in order, without gaps. Every tensor is overwritten, but
        for embedding rows: they are added to where embedding and output are not tied, and the caller zeroes those it used.
        """
        T, B = self._tokens.shape
        config, p, d = self.config, self._p, self._d
        final = 0

        def ready(name):
            nonlocal final
            start, final = final, self.layout[name].stop
            if on_ready is not None:
                on_ready(slice(start, final))

        ready("output.bias")
        dy = self._dy[:T]
        self._drop(dy, dy, config.layers)
        for layer in reversed(range(config.layers)):
            x, name = self._inputs[layer], f"lstm.{layer}."
            dx = None if x is None else self._dy[:T] if layer else self._dx[:T]
            lstm_backward(
                dx, d.get(name + "weight_x"), d[name + "weight_h"], self._db, self._gates[layer][:T],
                self._dh_next, self._dc, self._WhT_packed,
                dy, x, self._h[layer][: T + 1], self._c[layer][: T + 1], p.get(name + "weight_x"), p[name + "weight_h"],
                between,
            )  # fmt: skip
            d[name + "bias"][:] = self._db
            if dx is not None:
                self._drop(dx, dx, layer)
            ready(name + "bias")
        dtable_rows = self._gates[0][:T] if dx is None else dx
        embedding_backward(d["embedding.weight"], self._tokens.reshape(-1), dtable_rows.reshape(T * B, -1))
        ready("embedding.weight")

    def logits(self, tokens, h, c):
        """What comes next: tokens (T,B) int64; h, c (L,B,H) in and out. Returns the logits (B,V) behind the last step."""
        y = self._hidden(tokens, h, c)[-1]
        logits = np.empty((len(y), self.vocabulary), self.dtype)
        matmul(logits, y, self._output_weight(self._p).T)
        return logits + self._p["output.bias"]

    def _hidden(self, tokens, h, c, mask=None, between=None):
        """The top layer's output (T,B,H) after dropout; saves what the backward needs."""
        T, B = tokens.shape
        config, p = self.config, self._p
        self._tokens, self._mask, self._inputs = tokens, mask if config.dropout else None, []
        x = None
        if config.embedding:
            x = self._x[:T]
            embedding_forward(x.reshape(T * B, -1), tokens.reshape(-1), p["embedding.weight"])
            self._drop(x, x, 0)
        for layer in range(config.layers):
            # Without training all layers share one slot: a layer reads its input whole before it writes its output.
            slot = layer if self.training else 0
            hs, cs, gates = self._h[slot][: T + 1], self._c[slot][: T + 1], self._gates[slot][:T]
            hs[0], cs[0] = h[layer], c[layer]
            if x is None:
                embedding_forward(gates.reshape(T * B, -1), tokens.reshape(-1), p["embedding.weight"])
            np.sum(p[f"lstm.{layer}.bias"], axis=0, out=self._bias)
            weights = p.get(f"lstm.{layer}.weight_x"), p[f"lstm.{layer}.weight_h"]
            lstm_forward(hs, cs, gates, self._Wh_packed, x, *weights, self._bias)
            h[layer], c[layer] = hs[T], cs[T]
            self._inputs.append(x)
            x = hs[1:]
            if self._mask is not None:
                x = self._dropped[layer][:T]
                self._drop(x, hs[1:], layer + 1)
            if between is not None:
                between()
        return x

    def _output_weight(self, tensors):
        return tensors["embedding.weight" if self.config.tied else "output.weight"]

    def _drop(self, out, x, place):
        """Dropout number `place`: 0 on the embeddings, l behind layer l."""
        if self._mask is not None:
            seed, step, lanes = self._mask
            dropout(out, x, self.config.dropout, lanes, seed, step, place)
