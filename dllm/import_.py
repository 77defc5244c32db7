"""Make a model folder of a PyTorch model: dllm import MODULE.safetensors --tokenizer FILE --out MODEL."""

from __future__ import annotations

import pathlib
import re
import sys

import numpy as np

from . import cli, config
from .data import tokenizer_files, tokenizers
from .errors import DONE, UserError, printable
from .exchange import hugging_face
from .files import safetensors, storage
from .inference import model_folder
from .model import torch_weights
from .model.torch_weights import Tensors
from .remote.locate import is_url, local_copy

EPILOG = """
MODULE.safetensors holds the state dict of nn.Embedding, nn.LSTM and nn.Linear, named embedding, lstm and output, or encoder,
rnn and decoder as in PyTorch's word_language_model, with any prefix before all of them. Without an embedding the inputs
are one-hot; without an output weight, or with the embedding's, the two are tied.

FILE is a tokenizer.json, or the folder of a run, model or corpus that has one: its token numbers must be the module's.
It may be what transformers saved of a model folder: dllm import SAVED/model.safetensors --tokenizer SAVED --out MODEL.
"""

OURS = {"embedding": "embedding", "encoder": "embedding", "output": "output", "decoder": "output"}
KNOWN = re.compile(r"lstm\.(weight|bias)_(ih|hh)_l\d+|embedding\.weight|output\.(weight|bias)")


def main(argv: list[str] | None = None) -> int:
    """The command. Returns its exit code."""
    return cli.run(import_, argv)


def import_(argv: list[str]) -> int:
    """Write the model folder of a state dict."""
    parser = cli.Parser("import_", __doc__, EPILOG)
    parser.add_argument("module", metavar="MODULE.safetensors", help="the state dict")
    parser.add_argument("--tokenizer", required=True, metavar="FILE", help="a tokenizer.json, or a folder that has one")
    parser.add_argument("--out", required=True, metavar="MODEL", help="the folder to make")
    options = parser.parse_args(argv)
    model_folder.check_free(options.out)
    tokenizer = _tokenizer(options.tokenizer)
    tensors = _renamed(torch_weights.decode(safetensors.read(local_copy(options.module))), options.module)
    torch_weights.check_finite(options.module, tensors)
    settings, tensors = _complete(tensors, options.module)
    vocabulary = len(tensors["output.bias"])
    if vocabulary != tokenizer.size:
        raise UserError(f"{options.module} has a vocabulary of {vocabulary}, {options.tokenizer} one of {tokenizer.size}")
    data = safetensors.pack(tensors)
    facts = model_folder.describe(settings, tokenizer, "fp32", data) | {
        "imported": printable(pathlib.Path(options.module).name)[:255]
    }
    model_folder.write(options.out, data, tokenizer, facts)
    print(f"{printable(options.out)}: {facts['parameters']:,} parameters, of {facts['model']}")
    return DONE


def _tokenizer(path: str) -> tokenizers.Tokenizer:
    """Of a tokenizer.json or of a folder that has one."""
    if pathlib.Path(path).is_dir() or (is_url(path) and not path.endswith(".json")):
        file = tokenizer_files.tokenizer_file(path)
    else:
        file = local_copy(path)
    value = storage.read_json(file, [])
    if isinstance(value, dict) and "kind" not in value and "model" in value:
        try:
            value = hugging_face.read_library_form(value)
        except ValueError as error:
            raise UserError(f"{file}: {error}") from None
    elif not isinstance(value, dict) or "kind" not in value:
        raise UserError(f"{file} has no 'kind'; make the folder anew")
    return tokenizers.load(value, file)


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


if __name__ == "__main__":
    sys.exit(main())
