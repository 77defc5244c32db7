"""The layers of a Keras model, one behind the other, of what its config.json says, or of the groups that its weights have.

Nothing of it is made or run: a class is a name here. Each setting of a layer is one that is known to change nothing, or has
the value that it has to have. What else there is, Lambda, a class of a user, activations, is refused by the name of its layer.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, NamedTuple

import msgspec

from ..errors import UserError, shown
from .keras_names import BELOW, CELLS, Groups, snake

MOST_LAYERS = 4096
FREE = {  # settings that change nothing here, or are read
    "name", "trainable", "dtype", "units", "input_dim", "output_dim", "input_length", "batch_shape", "batch_input_shape",
    "batch_size", "shape", "rate", "seed", "dropout", "noise_shape", "return_sequences", "use_bias", "mask_zero", "mask_value",
    "layer", "backward_layer", "unroll", "implementation", "use_cudnn", "unit_forget_bias", "zero_output_for_mask",
}  # fmt: skip
FREE_ENDS = "_initializer", "_regularizer", "_constraint"  # of what matters in training alone
TANH, SIGMOID, OUTPUTS = ("tanh",), ("sigmoid",), ("linear", "softmax", "sigmoid")
FORWARD: dict[str, tuple[Any, ...]] = {"activation": TANH, "recurrent_activation": SIGMOID}
BACKWARD = FORWARD | {"go_backwards": (True,)}
SETTINGS: dict[str, dict[str, tuple[Any, ...]]] = {  # class -> setting -> the values that it may have
    "InputLayer": {},
    "Embedding": {},
    "Masking": {},
    "Dropout": {},
    "SpatialDropout1D": {},
    "LSTM": FORWARD,
    "Bidirectional": {"merge_mode": ("concat",)},
    "GlobalMaxPooling1D": {"data_format": ("channels_last",)},
    "GlobalAveragePooling1D": {"data_format": ("channels_last",)},
    "Dense": {"activation": (*TANH, *OUTPUTS)},
    "Activation": {"activation": OUTPUTS},
    "Softmax": {"axis": (-1,)},
    "SimpleRNN": {"activation": ("linear",)},
    "Rescaling": {"scale": (1,), "offset": (BELOW,)},
    "Add": {},
}
OF_OURS = "SimpleRNN", "Rescaling", "Add"  # what `--also keras` has beside a pool of the largest
WITHOUT_EFFECT = "Dropout", "SpatialDropout1D"  # where nothing is trained
OPERATIONS = "NotEqual", "Any", "LogicalOr"  # of which Keras makes a mask
NEXT = {  # class -> those that may come behind it; "": the first
    "": ("InputLayer", "Embedding", "Masking", "LSTM", "Bidirectional"),
    "InputLayer": ("Embedding", "Masking", "LSTM", "Bidirectional"),
    "Embedding": ("Masking", "LSTM", "Bidirectional"),
    "Masking": ("LSTM", "Bidirectional"),
    "LSTM": ("LSTM", "GlobalMaxPooling1D", "GlobalAveragePooling1D", "Dense"),
    "Bidirectional": ("Bidirectional", "GlobalMaxPooling1D", "GlobalAveragePooling1D", "Dense"),
    "GlobalMaxPooling1D": ("Dense",),
    "GlobalAveragePooling1D": ("Dense",),
    "Dense": ("Dense", "Activation", "Softmax"),
    "Activation": (),
    "Softmax": (),
}
TYPES = "float16", "float32", "float64", "bfloat16", "mixed_float16", "mixed_bfloat16"

Named = Annotated[str, msgspec.Meta(max_length=4096)]


class Call(msgspec.Struct):
    """What a layer is called with."""

    args: list[Any] = []
    kwargs: dict[str, Any] = {}


class Described(msgspec.Struct):
    """A layer, or the model, as config.json has it."""

    class_name: Named
    config: dict[str, Any]
    module: Named | None = None
    registered_name: Named | None = None
    name: Named = ""
    inbound_nodes: list[Call] = []


class Layers(msgspec.Struct):
    """What of a model's settings matters."""

    layers: Annotated[list[Described], msgspec.Meta(max_length=MOST_LAYERS)]
    output_layers: Any = None


class Part(NamedTuple):
    """A layer."""

    kind: str  # its class
    name: str
    config: Mapping[str, Any] | None  # None: only its weights are known
    group: str  # of its weights

    def __str__(self) -> str:
        return f"layer {self.name!r:.80} ({self.kind:.80})"


class Chain(NamedTuple):
    """The layers of a model but for those without effect, and the one by which padding is told apart, of ours."""

    parts: list[Part]
    there: Part | None = None


def of_config(described: Any, source: str) -> Chain:
    """The layers of the model that config.json describes. Raises UserError, which names the layer that is not known."""
    try:
        whole = msgspec.convert(described, Described)
        layers = msgspec.convert(whole.config, Layers)
        if whole.class_name not in ("Sequential", "Functional") or _is_foreign(whole):
            raise UserError(f"{source} is of class {shown(whole.class_name)}: a Sequential or Functional model is read")
        numbers, parts, nodes = Groups(), dict[str, Part](), dict[str, Described]()
        for layer in layers.layers:
            part = _checked(layer, source, numbers)
            if part.name in nodes:
                raise UserError(f"{source} has two layers named {part.name!r:.80}")
            nodes[part.name] = layer
            if layer.class_name not in OPERATIONS:
                parts[part.name] = part
        if whole.class_name == "Sequential":
            return _in_order([*parts.values()], source)
        return _Graph(parts, nodes, source).chain(layers.output_layers)
    except (msgspec.ValidationError, RecursionError) as error:
        raise UserError(f"{source}: its config.json is none of Keras ({error!s:.200})") from None


def of_groups(names: Sequence[str], source: str) -> Chain:
    """The layers whose weights have the groups `names`, where these say in which order they are. Raises UserError."""
    order, ours = [kind for kind in SETTINGS if kind not in OF_OURS], {snake(kind) for kind in OF_OURS}
    kinds, found = {snake(kind): kind for kind in order}, list[tuple[int, int, Part]]()
    there = Part("SimpleRNN", "simple_rnn", None, "layers/simple_rnn") if ours <= {*names} else None
    for name in names if there is None else sorted({*names} - ours):
        kind, number = _numbered(name, kinds)
        if kind is None:
            raise UserError(f"{source} has weights of layers/{name:.80}, which is of no layer that is known here")
        found.append((order.index(kind), number, Part(kind, name, None, f"layers/{name}")))
    return _in_order([part for *_, part in sorted(found, key=lambda entry: entry[:2])], source, there)


def _numbered(name: str, kinds: Mapping[str, str]) -> tuple[str | None, int]:
    """The class and the number of a group's layer; None: it is not known."""
    first, _, number = name.rpartition("_")
    if first in kinds and number.isdecimal() and len(number) < 6:
        return kinds[first], int(number)
    return kinds.get(name), 0


def _is_foreign(layer: Described) -> bool:
    """Whether it is a class of a user's, which may do anything."""
    module = layer.module or ""
    return not (module == "keras" or module.startswith("keras.")) or layer.registered_name not in (None, layer.class_name)


def _checked(layer: Described, source: str, numbers: Groups) -> Part:
    """A layer whose class and settings are known. Raises UserError."""
    name, kind = layer.config.get("name", layer.name), layer.class_name
    if not isinstance(name, str):
        raise UserError(f"{source}: a layer is called {shown(name)}")
    part = Part(kind, name, layer.config, "")
    if _is_foreign(layer):
        raise UserError(f"{source}: {part} is a class of its user's; nothing of a user's is run here")
    if kind in OPERATIONS:
        return part
    if kind not in SETTINGS:
        raise UserError(f"{source}: {part} is none of {', '.join(one for one in SETTINGS if one not in OF_OURS)}")
    _check_settings(part, layer.config, SETTINGS[kind], source)
    if kind == "Bidirectional":
        _check_directions(part, layer.config, source)
    return part._replace(group=numbers.of(kind))


def _check_settings(part: Part, config: Mapping[str, Any], known: Mapping[str, tuple[Any, ...]], source: str) -> None:
    for name, value in config.items():
        if name == "dtype" and part.kind != "InputLayer":
            policy = value.get("config", {}) if isinstance(value, dict) and value.get("class_name") == "DTypePolicy" else value
            policy = policy.get("name") if isinstance(policy, dict) else policy
            fits = value is None or policy in TYPES
        elif name in known:
            fits = any(value == one and type(value) in (type(one), int, float) for one in known[name])
        else:
            fits = name in FREE or name.endswith(FREE_ENDS) or not value
        if not fits:
            raise UserError(f"{source}: {part} has {name:.80} = {shown(value)}, which is not known here")


def _check_directions(part: Part, config: Mapping[str, Any], source: str) -> None:
    """Both layers of a Bidirectional are an LSTM that differ in the direction alone."""
    there = [config.get(name) for name in ("layer", "backward_layer")]
    both = [None if one is None else msgspec.convert(one, Described) for one in there]
    for one, known in zip(both, (FORWARD, BACKWARD), strict=True):
        if one is not None and (one.class_name != "LSTM" or _is_foreign(one)):
            raise UserError(f"{source}: {part} is of {shown(one.class_name)}, not of LSTM")
        if one is not None:
            _check_settings(part, one.config, known, source)
    forward, backward = both
    if forward is None:
        raise UserError(f"{source}: {part} is of no layer")
    if backward is not None and backward.config.get("go_backwards") is not True:
        raise UserError(f"{source}: {part} reads forward twice")
    for name in ("units", "use_bias", "return_sequences"):
        if backward is not None and backward.config.get(name) != forward.config.get(name):
            raise UserError(f"{source}: {part} has another {name} in each direction")


def lstm_config(part: Part) -> Mapping[str, Any] | None:
    """The settings of the LSTM that a layer is, or is of; None: they are not known."""
    if part.config is None or part.kind == "LSTM":
        return part.config
    found: Mapping[str, Any] = part.config["layer"]["config"]
    return found


def _in_order(parts: list[Part], source: str, there: Part | None = None) -> Chain:
    """Raises UserError where layers do not follow each other as those of a model here do."""
    found = list[Part]()
    for part in parts:
        if part.kind in WITHOUT_EFFECT:
            continue
        before = found[-1].kind if found else ""
        if part.kind not in NEXT.get(before, ()):
            behind = f"behind {found[-1].kind}" if found else "first"
            may = f"{', '.join(NEXT[before])} may" if NEXT.get(before) else "nothing may"
            raise UserError(f"{source}: {part} comes {behind}, where {may}")
        found.append(part)
    if not any(part.kind in CELLS for part in found) or not any(part.kind == "Dense" for part in found):
        raise UserError(f"{source} has no LSTM, or no Dense behind it")
    return Chain(found, there)


class _Graph:
    """The layers of a Functional model by what they read."""

    def __init__(self, parts: dict[str, Part], nodes: dict[str, Described], source: str) -> None:
        self.parts, self.nodes, self.source = parts, nodes, source
        self.reads = {name: self._read(part, nodes[name]) for name, part in parts.items()}

    def chain(self, outputs: Any) -> Chain:
        """The layers in their order. Raises UserError where one is read twice, or several."""
        for name, node in self.nodes.items():
            if node.class_name in OPERATIONS:
                self._check_mask(name, node)
        there, order, readers = self._without_branch(), list[Part](), dict[str, list[str]]()
        for name, read in self.reads.items():
            if len(read) > 1 or (not read) != (self.parts[name].kind == "InputLayer"):
                raise UserError(f"{self.source}: {self.parts[name]} reads {len(read)} others, a chain of layers is read here")
            for one in read:
                readers.setdefault(one, []).append(name)
        here = [name for name, read in self.reads.items() if not read]
        while len(here) == 1 and len(order) < len(self.parts):
            order.append(self.parts[here[0]])
            here = readers.get(here[0], [])
        if here or len(order) != len(self.reads):
            raise UserError(f"{self.source} is no chain of layers: several read one, or several are read first")
        if outputs is not None and [*_named(outputs)] != [order[-1].name]:
            raise UserError(f"{self.source} gives other than what its last layer gives")
        return _in_order(order, self.source, there)

    def _read(self, part: Part, node: Described) -> list[str]:
        """The names of the layers that a layer reads."""
        if len(node.inbound_nodes) > 1:
            raise UserError(f"{self.source}: {part} is used more than once")
        found = list[str]()
        for call in node.inbound_nodes:
            found += _tensors(call.args)
            for name, value in call.kwargs.items():
                if name != "mask" and value:
                    raise UserError(f"{self.source}: {part} is called with {name:.80}, which is not known here")
                if name == "mask" and not all(map(self._is_mask, _tensors(value))):
                    raise UserError(f"{self.source}: {part} is called with a mask that is not Keras's own")
        if any(name not in self.parts for name in found):
            raise UserError(f"{self.source}: {part} reads what is no layer")
        return found

    def _is_mask(self, name: str) -> bool:
        return name in self.nodes and self.nodes[name].class_name in OPERATIONS

    def _check_mask(self, name: str, node: Described) -> None:
        """Raise UserError where an operation hides other steps than the layers of the model say of themselves."""
        hidden = [
            0 for part in self.parts.values() if part.config and part.kind == "Embedding" and part.config.get("mask_zero")
        ]
        hidden += [part.config.get("mask_value", 0) for part in self.parts.values() if part.config and part.kind == "Masking"]
        for call in node.inbound_nodes:
            own = len(call.args) == 2 and call.args[1] in hidden and len([*_tensors(call.args[0])]) == 1
            if node.class_name == "NotEqual" and not own:
                raise UserError(f"{self.source}: layer {name!r:.80} makes a mask that is not Keras's own")

    def _without_branch(self) -> Part | None:
        """Take out what `--also keras` has to tell padding apart, where it is there; its layer whose weights say so."""
        for name, read in [*self.reads.items()]:
            if self.parts[name].kind != "Add":
                continue
            below, shifted = read if len(read) == 2 else ("", "")
            (there,) = self.reads.get(shifted) or [""]
            kinds = [self.parts[one].kind if one in self.parts else "" for one in (shifted, there)]
            if kinds != ["Rescaling", "SimpleRNN"] or self.reads[there] != [below]:
                raise UserError(f"{self.source}: {self.parts[name]} adds up layers, a chain of layers is read here")
            for gone in (name, shifted, there):
                del self.reads[gone]
            self.reads = {one: [below if other == name else other for other in some] for one, some in self.reads.items()}
            return self.parts[there]
        return None


def _tensors(value: Any) -> Iterator[str]:
    """The names of the layers of whose outputs there are some among arguments."""
    if isinstance(value, dict) and value.get("class_name") == "__keras_tensor__":
        config = value.get("config")
        yield from _named(config.get("keras_history") if isinstance(config, dict) else None)
    elif isinstance(value, dict | list):
        for one in value.values() if isinstance(value, dict) else value:
            yield from _tensors(one)


def _named(value: Any) -> Iterator[str]:
    """The layer of [layer, 0, 0], or those of a list of such; "" of what is none."""
    if isinstance(value, list) and len(value) == 3 and isinstance(value[0], str):
        yield value[0] if value[1:] == [0, 0] else ""
    elif isinstance(value, list):
        for one in value:
            yield from _named(one)
    else:
        yield ""
