"""A state dict of PyTorch in safetensors: nn.Embedding, nn.LSTM and nn.Linear, of a model of kind lm."""

from __future__ import annotations

import re

import numpy as np

from .. import config
from ..errors import UserError
from ..files import safetensors
from ..model import torch_weights
from ..model.torch_weights import Tensors
from ..remote.locate import local_copy
from .imports import Asked, Imported

OURS = {"embedding": "embedding", "encoder": "embedding", "output": "output", "decoder": "output"}
KNOWN = re.compile(r"lstm\.(weight|bias)_(ih|hh)_l\d+|embedding\.weight|output\.(weight|bias)")


def read(asked: Asked) -> Imported:
    """The model of a state dict. Raises UserError."""
    if asked.labels:
        raise UserError("--labels goes with taggers and classifiers of Keras: a state dict is of a model of text")
    tensors = _renamed(torch_weights.decode(safetensors.read(local_copy(asked.file))), asked.file)
    torch_weights.check_finite(asked.file, tensors)
    settings, tensors = _complete(tensors, asked.file)
    return Imported(settings, tensors, len(tensors["output.bias"]))


def _renamed(tensors: Tensors, source: str) -> Tensors:
    """The tensors under PyTorch's names here (model/torch_weights.py). Raises UserError that names the first that cannot be."""
    first = [name for name in tensors if name.endswith("weight_hh_l0")]
    if len(first) != 1:
        raise UserError(f"{source} has {len(first)} tensors named weight_hh_l0, a model with an LSTM has one")
    lstm = first[0].removesuffix("weight_hh_l0")
    above = lstm[:-1].rpartition(".")[0]
    prefix, found = above and above + ".", Tensors()
    for name, tensor in tensors.items():
        if "_reverse" in name:
            raise UserError(f"{source} has {name!r:.80}: a bidirectional LSTM sees what comes next, it cannot predict it")
        if "weight_hr_l" in name:
            raise UserError(f"{source} has {name!r:.80}: an LSTM with projections (proj_size) is not known here")
        ours = _our_name(name, lstm, prefix)
        if not KNOWN.fullmatch(ours):
            raise UserError(f"{source} has {name!r:.80}, which is of no embedding, LSTM or output layer")
        if ours in found:
            raise UserError(f"{source} has two tensors for {ours}, one of them {name!r:.80}")
        found[ours] = tensor
    return found


def _our_name(name: str, lstm: str, prefix: str) -> str:
    """PyTorch's name here of a tensor; lstm, prefix: what stands before the names of the LSTM, and of all modules."""
    if name.startswith(lstm):
        return "lstm." + name.removeprefix(lstm)
    module, _, rest = name.removeprefix(prefix).rpartition(".")
    return f"{OURS.get(module, module)}.{rest}"


def _complete(tensors: Tensors, source: str) -> tuple[config.Config, Tensors]:
    """The Config that the shapes say, and all tensors in the order of files; biases that are not there are zeros."""
    settings, V = _settings(tensors, source)
    wanted, found = torch_weights.shapes(settings.model, V), Tensors()
    for name, shape in wanted.items():
        if name not in tensors and ".bias" not in name:
            raise UserError(f"{source} has no {name}")
        found[name] = tensors.get(name, np.zeros(shape[:1], np.float32))
        if found[name].shape != shape:
            raise UserError(f"{source}: {name} is {list(found[name].shape)}, by the other tensors it is {list(shape)}")
    left = sorted(tensors.keys() - wanted.keys() - {"output.weight"})  # tied, it may be there too
    if left:
        raise UserError(f"{source} has {left[0]!r:.80}, which is of none of its layers")
    return settings, found


def _settings(tensors: Tensors, source: str) -> tuple[config.Config, int]:
    """The Config of the model that has these shapes, and V."""
    for name, tensor in tensors.items():
        if tensor.ndim != (1 if ".bias" in name else 2) or not tensor.size:
            raise UserError(f"{source}: {name} is {list(tensor.shape)}, not a {'vector' if '.bias' in name else 'matrix'}")
    rows, H = tensors["lstm.weight_hh_l0"].shape
    if rows != 4 * H:
        kind = {3 * H: "a GRU", H: "a plain RNN"}.get(rows, "no LSTM")
        raise UserError(f"{source} holds {kind}: weight_hh_l0 is {[rows, H]}, of an LSTM it is [4 H, H]")
    embedding, output = tensors.get("embedding.weight"), tensors.get("output.weight")
    if embedding is None and output is None:
        raise UserError(f"{source} has no output.weight: it takes an output layer to predict a token")
    tied = output is None or (embedding is not None and np.array_equal(embedding, output))
    V, E = len(tensors["embedding.weight" if tied else "output.weight"]), 0 if embedding is None else embedding.shape[1]
    if tied and E != H:
        raise UserError(f"{source} has no output.weight, and an embedding of {E} cannot serve where H is {H}")
    second = any(tensor.any() for name, tensor in tensors.items() if "bias_hh" in name)
    layers = sum("weight_hh" in name for name in tensors)
    shape = {"embedding": E, "hidden": H, "layers": layers, "tied": tied, "biases": 1 + second}
    return config.from_dict({"model": shape}), V
