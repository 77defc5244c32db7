"""model.onnx for ONNX Runtime and whatever else reads ONNX; of seq2seq encoder.onnx and decoder.onnx.

                  inputs                                               outputs
    lm            tokens (T,B), h, c (L,B,H)                           logits (T,B,V), h_next, c_next
    tagger, ctc   tokens (T,B) or frames (T,B,F), lengths (B,)         logits (T,B,classes)
    classifier    the same                                             logits (B,classes)
    encoder       tokens (S,B), lengths (B,)                           memory (S,B,M), keys (S,B,H), h, c (L,B,H)
    decoder       tokens (T,B), memory, keys, lengths, source, h, c    logits (T,B,V), h_next, c_next

T, S and B may be anything. tokens, source and lengths are int64, all else is float32. Of a lane only `lengths` steps count.
With attention = dot there are no keys; `source`, the tokens of the encoder, is there where they can be copied, and the logits
are log-probabilities then. Equations: model/seq2seq.py, model/encoder_model.py, kernels/pool.py, kernels/copying.py.

Tensors have PyTorch's names and shapes (torch_weights.py). But of an LSTM both directions are one tensor, and gates are in the
order that ONNX has, i, o, f, g. bfloat16 becomes float32. int8 stays int8 in the file; Cast and Mul by row make floats of it,
which ONNX Runtime does once, as it loads. Of DequantizeLinear before a product 1.32 makes one that rounds what is multiplied to
8 bits, and 1.20 takes it for one of uint8.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from .. import __version__
from ..config import ModelConfig
from ..errors import UserError
from ..kernels.types import Array, DType
from ..model import blocks
from ..model.torch_weights import SCALE
from .formats import Stored

OPSET, IR = 17, 8  # of 2022: what reads them is older than anybody's installation
GATES = [0, 3, 1, 2]  # ONNX's i, o, f, g among PyTorch's i, f, g, o
LARGEST = (1 << 31) - (1 << 20)  # bytes of weights: a protobuf message has at most 2 GB
LEAST = 1e-37  # a probability of float32 with a logarithm


def pack(stored: Stored) -> dict[str, bytes]:
    """File name -> bytes. Raises UserError where there is no onnx package, of other kinds, and of too many weights."""
    config, arrays = stored.settings.model, stored.arrays
    if config.kind not in FILES:
        raise UserError(f"--also onnx: of kind {config.kind} there is no such file; there is of {', '.join(FILES)}")
    try:
        import onnx  # noqa: F401
    except ImportError:
        raise UserError("--also onnx takes the onnx package: pip install 'dllm[onnx]'") from None
    size = sum(array.nbytes for array in arrays.values()) * (2 if stored.kind == "bf16" else 1)
    if size > LARGEST:
        raise UserError(f"--also onnx: the weights take {size / 1e9:.1f} GB there, and a file holds 2; --weights int8 is less")
    if stored.kind == "bf16":
        arrays = stored.tensors
    files = {}
    for name, write in FILES[config.kind].items():
        graph = Graph(arrays, config, stored.tokenizer.size)
        write(graph)
        files[name] = graph.pack()
    return files


class Graph:
    """The graph of a file while it is made. Tensors go by their names: what a method makes, it returns the name of.

    Parameters
    ----------
    arrays : dict
        name -> array as it is stored, of float32 or int8.
    config : ModelConfig
    vocabulary : int
    """

    def __init__(self, arrays: dict[str, Array], config: ModelConfig, vocabulary: int) -> None:
        self.config, self.vocabulary, self._arrays = config, vocabulary, arrays
        self._nodes: list[Any] = []
        self._inputs: list[Any] = []
        self._outputs: list[Any] = []
        self._constants: dict[str, Array] = {}
        self._floats: dict[str, str] = {}  # name of a stored matrix -> of its floats

    def pack(self) -> bytes:
        """The file."""
        from onnx import helper, numpy_helper

        tensors = [numpy_helper.from_array(array, name) for name, array in self._constants.items()]
        graph = helper.make_graph(self._nodes, "dllm", self._inputs, self._outputs, tensors)
        opset = [helper.make_opsetid("", OPSET)]
        model = helper.make_model(graph, opset_imports=opset, ir_version=IR, producer_name="dllm", producer_version=__version__)
        data: bytes = model.SerializeToString()
        return data

    def input(self, name: str, *sizes: int | str, whole: bool = False) -> str:
        """One of float32, or of int64. sizes : numbers, and names of those that may be anything"""
        from onnx import TensorProto, helper

        kind = TensorProto.INT64 if whole else TensorProto.FLOAT
        self._inputs.append(helper.make_tensor_value_info(name, kind, sizes))
        return name

    def output(self, name: str, tensor: str, *sizes: int | str) -> None:
        """Let a tensor of float32 be an output, under another name."""
        from onnx import TensorProto, helper

        self._nodes.append(helper.make_node("Identity", [tensor], [name]))
        self._outputs.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, sizes))

    def node(self, operator: str, *inputs: str, **attributes: Any) -> str:
        """What an operator of ONNX gives."""
        return self.several(1, operator, *inputs, **attributes)[0]

    def several(self, count: int, operator: str, *inputs: str, **attributes: Any) -> list[str]:
        """The first outputs of an operator that has some."""
        from onnx import helper

        names = [f"{operator}_{len(self._nodes)}" + f"_{number}" * (count > 1) for number in range(count)]
        self._nodes.append(helper.make_node(operator, inputs, names, **attributes))
        return names

    def constant(self, values: float | Sequence[float], dtype: DType = np.int64) -> str:
        """A number, or a few."""
        array = np.array(values, dtype)
        name = "_".join(["constant", *(["list"] if array.ndim else []), *map(str, array.ravel().tolist())])
        self._constants[name] = array
        return name

    def vector(self, name: str) -> str:
        """A stored vector (n,)."""
        self._constants[name] = self._arrays[name]
        return name

    def matrix(self, name: str) -> str:
        """A stored matrix (rows,columns)."""
        return self._matrix(name, self._arrays[name], self._arrays.get(name + SCALE))

    def _matrix(self, name: str, array: Array, scale: Array | None) -> str:
        if name not in self._floats:
            self._constants[name], self._floats[name] = array, name
            if scale is not None:
                self._constants[name + SCALE] = scale[:, None]
                self._floats[name] = self.node("Mul", self.node("Cast", name, to=_onnx_type("FLOAT")), name + SCALE)
        return self._floats[name]

    def linear(self, x: str, name: str) -> str:
        """x W^T of x (...,columns)."""
        return self.node("MatMul", x, self.node("Transpose", self.matrix(name), perm=[1, 0]))

    def lstm(self, x: str, module: str, ends: Sequence[str], lengths: str = "", h: str = "", c: str = "") -> list[str]:
        """What a layer gives (T,B,D H) of x (T,B,n), and its states h, c (D,B,H) behind the last step that counts.

        module, ends : the beginning of its tensors' names, and what they end in, one a direction
        lengths : (B,) int32; "": all steps count
        h, c : (D,B,H) before the first one; "": zeros
        """
        H, D = self.config.hidden, len(ends)
        Wx, Wh = (self._gates([f"{module}.weight_{kind}{end}" for end in ends]) for kind in ("ih", "hh"))
        both = [np.concatenate([_turned(self._arrays[f"{module}.bias_{kind}{end}"]) for kind in ("ih", "hh")]) for end in ends]
        self._constants[f"{module}.bias{ends[0]}"] = np.stack(both)
        how = {"hidden_size": H, "direction": "bidirectional" if D == 2 else "forward"}
        y, h, c = self.several(3, "LSTM", x, Wx, Wh, f"{module}.bias{ends[0]}", lengths, h, c, **how)
        return [self.node("Reshape", self.node("Transpose", y, perm=[0, 2, 1, 3]), self.constant([0, 0, D * H])), h, c]

    def _gates(self, names: Sequence[str]) -> str:
        """(D,4H,columns) of stored matrices, one a direction."""
        arrays, name = [_turned(self._arrays[name]) for name in names], names[0]
        if name + SCALE not in self._arrays:
            self._constants[name] = np.stack(arrays)
            return name
        scales = np.concatenate([_turned(self._arrays[one + SCALE]) for one in names])
        floats = self._matrix(name, np.concatenate(arrays), scales)
        return self.node("Reshape", floats, self.constant([len(names), *arrays[0].shape]))


def _turned(array: Array) -> Array:
    """An LSTM's rows of gates (4H,...) in ONNX's order."""
    turned: Array = array.reshape(4, -1, *array.shape[1:])[GATES].reshape(array.shape)
    return turned


def _embedded(graph: Graph, tokens: str) -> str:
    """(T,B,n) of tokens (T,B)."""
    if graph.config.embedding:
        return graph.node("Gather", graph.matrix("embedding.weight"), tokens, axis=0)
    return graph.node("OneHot", tokens, graph.constant(graph.vocabulary), graph.constant([0, 1], np.float32), axis=-1)


def _logits(graph: Graph, x: str) -> str:
    output = "embedding.weight" if graph.config.tied else "output.weight"
    return graph.node("Add", graph.linear(x, output), graph.vector("output.bias"))


def _states(graph: Graph) -> list[list[str]]:
    """Of the inputs h and c (L,B,H) what each layer has, (1,B,H)."""
    L, H = graph.config.layers, graph.config.hidden
    states = [graph.input(name, L, "batch", H) for name in "hc"]
    return [graph.several(L, "Split", state, graph.constant([1] * L), axis=0) if L > 1 else [state] for state in states]


def _give_states(graph: Graph, h: Sequence[str], c: Sequence[str]) -> None:
    """Outputs of what each layer has."""
    for name, states in (("h_next", h), ("c_next", c)):
        graph.output(name, graph.node("Concat", *states, axis=0), graph.config.layers, "batch", graph.config.hidden)


def _language_model(graph: Graph) -> None:
    x = _embedded(graph, graph.input("tokens", "time", "batch", whole=True))
    (h, c), ends = _states(graph), []
    for layer in range(graph.config.layers):
        x, *end = graph.lstm(x, "lstm", [f"_l{layer}"], h=h[layer], c=c[layer])
        ends.append(end)
    graph.output("logits", _logits(graph, x), "time", "batch", graph.vocabulary)
    _give_states(graph, *zip(*ends, strict=True))


def _encoded(graph: Graph, layers: int) -> tuple[str, str, str]:
    """What has been read (S,B,M), where each direction ends (B,M), and lengths, an input, of at least 1."""
    config = graph.config
    if config.features:
        x = graph.input("frames", "time", "batch", config.features)
    else:
        x = _embedded(graph, graph.input("tokens", "time", "batch", whole=True))
    lengths = graph.input("lengths", "batch", whole=True)
    counted = graph.node("Cast", lengths, to=_onnx_type("INT32"))
    ways = ["", "_reverse"][: len(blocks.directions(config))]
    for layer in range(layers):
        x, h, _ = graph.lstm(x, "encoder", [f"_l{layer}{way}" for way in ways], counted)
    ends = graph.node("Reshape", graph.node("Transpose", h, perm=[1, 0, 2]), graph.constant([0, blocks.memory(config)]))
    return x, ends, graph.node("Max", lengths, graph.constant(1))  # of an empty lane the first step is zeros


def _onnx_type(name: str) -> int:
    from onnx import TensorProto

    return int(getattr(TensorProto, name))


def _there(graph: Graph, x: str, lengths: str) -> str:
    """(S,B) bool: which steps of x (S,B,n) count."""
    steps = graph.node("Squeeze", graph.node("Shape", x, end=1))
    numbers = graph.node("Range", graph.constant(0), steps, graph.constant(1))
    return graph.node("Less", graph.node("Unsqueeze", numbers, graph.constant([1])), lengths)


def _labels(graph: Graph) -> None:
    """Of a tagger, a classifier or ctc."""
    config, rows = graph.config, ["time", "batch"]
    x, ends, lengths = _encoded(graph, config.layers)
    if config.kind == "classifier":
        x, rows = _pooled(graph, x, ends, lengths), ["batch"]
    if config.projection:
        x = graph.node("Tanh", graph.linear(x, "projection.weight"))
    graph.output("logits", _logits(graph, x), *rows, blocks.outputs(config, graph.vocabulary))


def _pooled(graph: Graph, x: str, ends: str, lengths: str) -> str:
    """(B,M) of x (S,B,M)."""
    if graph.config.pool == "last":
        return ends
    there = graph.node("Unsqueeze", _there(graph, x, lengths), graph.constant([2]))
    outside = graph.constant(-np.inf if graph.config.pool == "max" else 0, np.float32)
    x = graph.node("Where", there, x, outside)
    if graph.config.pool == "max":
        return graph.node("ReduceMax", x, axes=[0], keepdims=0)
    counts = graph.node("Cast", graph.node("Unsqueeze", lengths, graph.constant([1])), to=_onnx_type("FLOAT"))
    return graph.node("Div", graph.node("ReduceSum", x, graph.constant([0]), keepdims=0), counts)


def _encoder(graph: Graph) -> None:
    config, H = graph.config, graph.config.hidden
    memory, ends, _ = _encoded(graph, config.encoder_layers)
    graph.output("memory", memory, "time", "batch", blocks.memory(config))
    if config.attention == "general":
        graph.output("keys", graph.linear(memory, "keys.weight"), "time", "batch", H)
    first = graph.node("Unsqueeze", graph.node("Tanh", graph.linear(ends, "bridge.weight")), graph.constant([0]))
    h = graph.node("Expand", first, graph.constant([config.layers, 1, 1]))
    graph.output("h", h, config.layers, "batch", H)
    graph.output("c", graph.node("ConstantOfShape", graph.node("Shape", h)), config.layers, "batch", H)


def _decoder(graph: Graph) -> None:
    config, H = graph.config, graph.config.hidden
    tokens = graph.input("tokens", "time", "batch", whole=True)
    keys = memory = graph.input("memory", "source", "batch", blocks.memory(config))
    if config.attention == "general":
        keys = graph.input("keys", "source", "batch", H)
    lengths = graph.node("Max", graph.input("lengths", "batch", whole=True), graph.constant(1))
    source = graph.input("source", "source", "batch", whole=True) if config.copy else ""
    (h, c), ends = _states(graph), []
    x, *end = graph.lstm(_embedded(graph, tokens), "decoder.0", ["_l0"], h=h[0], c=c[0])
    ends.append(end)
    attention, context = _attended(graph, x, keys, memory, lengths)
    for layer in range(1, config.layers):
        x = graph.node("Concat", x, context, axis=2) if layer == 1 else x
        x, *end = graph.lstm(x, f"decoder.{layer}", ["_l0"], h=h[layer], c=c[layer])
        ends.append(end)
    top = graph.node("Concat", x, context, axis=2)
    logits = _logits(graph, graph.node("Tanh", graph.linear(top, "combine.weight")))
    if config.copy:
        logits = _with_copies(graph, logits, top, attention, source)
    graph.output("logits", logits, "time", "batch", graph.vocabulary)
    _give_states(graph, *zip(*ends, strict=True))


def _attended(graph: Graph, h: str, keys: str, memory: str, lengths: str) -> tuple[str, str]:
    """The weights (B,T,S) of steps h (T,B,H), and what they give (T,B,M)."""
    by_lane, turned = (graph.node("Transpose", x, perm=perm) for x, perm in ((h, [1, 0, 2]), (keys, [1, 2, 0])))
    there = graph.node("Transpose", _there(graph, memory, lengths), perm=[1, 0])
    there = graph.node("Unsqueeze", there, graph.constant([1]))
    scores = graph.node("MatMul", by_lane, turned)
    weights = graph.node("Softmax", graph.node("Where", there, scores, graph.constant(-np.inf, np.float32)), axis=-1)
    context = graph.node("MatMul", weights, graph.node("Transpose", memory, perm=[1, 0, 2]))
    return weights, graph.node("Transpose", context, perm=[1, 0, 2])


def _with_copies(graph: Graph, logits: str, top: str, attention: str, source: str) -> str:
    """log P (T,B,V), of logits and of attention (B,T,S) to the tokens of a source (S,B)."""
    gate = graph.node("Sigmoid", graph.linear(top, "gate.weight"))
    written = graph.node("Mul", gate, graph.node("Softmax", logits, axis=-1))
    other = graph.node("Sub", graph.constant(1, np.float32), gate)
    copied = graph.node("Mul", other, graph.node("Transpose", attention, perm=[1, 0, 2]))
    tokens = graph.node("Expand", graph.node("Transpose", source, perm=[1, 0]), graph.node("Shape", copied))
    P = graph.node("ScatterElements", written, tokens, copied, axis=2, reduction="add")
    return graph.node("Log", graph.node("Max", P, graph.constant(LEAST, np.float32)))


FILES: dict[str, dict[str, Callable[[Graph], None]]] = {  # kind -> file -> what makes its graph
    "lm": {"model.onnx": _language_model},
    "tagger": {"model.onnx": _labels},
    "classifier": {"model.onnx": _labels},
    "ctc": {"model.onnx": _labels},
    "seq2seq": {"encoder.onnx": _encoder, "decoder.onnx": _decoder},
}
