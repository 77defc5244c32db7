"""Model folders: what export and import write, and anything that uses a model opens (loaded_model.py).

A model folder holds model.safetensors (model/torch_weights.py), dllm_tokenizer.json (older ones: tokenizer.json), README.md
(model_card.py), what transformers reads (exchange/hugging_face.py), and config.json with

    format, vocabulary, parameters, window and lanes (of evaluations)
    model       embedding, hidden, layers, tied, biases; of kinds other than lm all of SHAPE
    weights (fp32, bf16 or int8), sha256 (of model.safetensors), tokenizer (its hash)
    embedded    whether the corpus is the embedded one, which every machine has
    training    of an exported run: step, averaged, tokens and corpus, those of the texts before, measured, recipe.
                Not with `imported`, the name of a file

and what transformers asks for, which is not read here.

It may come from anywhere: nothing in it is believed before it was checked, and nothing but numbers and text is read.
"""

from __future__ import annotations

import hashlib
import os
import pathlib
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Annotated, Any, TypeAlias

import msgspec
import numpy as np

from .. import __version__, config
from ..data.tokenizer_files import OF_MODEL, load_tokenizer, save_tokenizer, tokenizer_file, tokenizer_hash
from ..data.tokenizers import Tokenizer
from ..errors import UserError, reason, shown
from ..exchange import formats, hugging_face
from ..files import safetensors, storage
from ..kernels.gemm import aligned
from ..kernels.types import Array
from ..model import blocks, inheriting, torch_weights
from ..model.layout import Layout
from ..runs.provenance import MOST, Text
from . import model_card

FORMAT = 1
CONFIG, WEIGHTS, README = "config.json", "model.safetensors", "README.md"
OF_TEXT = ("embedding", "hidden", "layers", "tied", "biases")  # what of ModelConfig a trained model of kind lm depends on
OF_KINDS = (
    "kind", "bidirectional", "encoder_layers", "attention", "pool", "projection", "copy", "labels", "features",
)  # fmt: skip
SHAPE = OF_TEXT + OF_KINDS
KEYS = ("format", "vocabulary", "parameters", "model", "window", "lanes", "weights", "sha256", "tokenizer", "embedded")
NOTHING: Mapping[str, bytes] = {}
LARGEST = 1 << 20  # bytes of a config.json, which has 3 kB
LONGEST_WINDOW, MOST_IN_WINDOWS = 1 << 20, 1 << 26  # tokens of a window, and of the windows of all lanes

Count: TypeAlias = Annotated[int, msgspec.Meta(ge=0, le=2**53)]
Name: TypeAlias = Annotated[str, msgspec.Meta(max_length=255)]
Digest: TypeAlias = Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{64}$")]
Key: TypeAlias = Annotated[str, msgspec.Meta(pattern="^[a-z0-9_]{1,40}$")]
Setting: TypeAlias = bool | int | float | Annotated[str, msgspec.Meta(max_length=4096)]


class Measured(msgspec.Struct):
    """Perplexity of a split before and after weights were stored in another precision."""

    split: Name
    tokens: Count
    before: float
    after: float
    corpus: Digest


class Earlier(msgspec.Struct):
    """A corpus that a model was trained on before its last one."""

    corpus: Digest | None
    tokens: Count


class Training(msgspec.Struct):
    """Where the model of an exported run comes from. tokens : that training has predicted, of all corpora"""

    step: Count
    averaged: Count
    tokens: Count | None
    corpus: Digest | None
    measured: Annotated[list[Measured], msgspec.Meta(max_length=100)]
    recipe: dict[Key, dict[Key, Setting]]
    earlier: Annotated[list[Earlier], msgspec.Meta(max_length=MOST)] = []


class Origin(msgspec.Struct, omit_defaults=True):
    """What of a config.json is for people, and goes into the next one that is made of the folder."""

    embedded: bool
    training: Training | None = None
    imported: Name | None = None


@dataclass(frozen=True, eq=False)
class ModelFolder:
    """What a model folder holds, checked."""

    settings: config.Config  # the model's shape, and window and lanes of an evaluation
    tokenizer: Tokenizer
    vector: Array  # (size,) float32, the parameters as Layout has them
    facts: dict[str, Any]  # its config.json


def is_model_folder(folder: pathlib.Path) -> bool:
    """Whether a folder is meant to be that of a model, be it whole or not."""
    return (folder / CONFIG).exists() or (folder / WEIGHTS).exists()


def read(folder: pathlib.Path) -> ModelFolder:
    """Read a model folder. Raises UserError that says what in it no model has."""
    path = folder / CONFIG
    _check_writer(folder)
    facts = storage.read_json(path, KEYS, LARGEST)
    settings, origin, tokenizer = _settings(path, facts), _origin(path, facts), load_tokenizer(folder)
    check_kind(settings.model, tokenizer, folder)
    if (
        not (tokenizer.size or tokenizer.bands)
        or tokenizer.size != facts["vocabulary"]
        or tokenizer_hash(tokenizer) != facts["tokenizer"]
    ):
        raise UserError(f"{tokenizer_file(folder)} is not the one of its {CONFIG}")
    shape = settings.model, tokenizer.size
    tensors = torch_weights.read_model(folder / WEIGHTS, *shape, facts["weights"], facts["sha256"])
    parameters = Layout(*shape, np.float32).parameters
    if facts["parameters"] != parameters:
        raise UserError(f"{path}: parameters are {shown(facts['parameters'])}, a model of its shape has {parameters}")
    return ModelFolder(settings, tokenizer, flat(*shape, tensors), {name: facts[name] for name in KEYS} | origin)


def _check_writer(folder: pathlib.Path) -> None:
    """Raise UserError where transformers has saved a model of ours again: its weights may be others by now."""
    facts = storage.read_json(folder / CONFIG, KEYS[:1], LARGEST)
    if "sha256" not in facts and "transformers_version" in facts:
        command = f"dllm import {folder / WEIGHTS} --tokenizer {folder} --out MODEL"
        raise UserError(f"{folder} was saved by transformers: {command} makes a model folder of it")


def published(folder: pathlib.Path) -> tuple[list[str], list[str]]:
    """Names of what belongs to a model folder, and of what is there under such a name but is not what dllm writes: transformers
    runs some of it. Reads all of the folder. Raises UserError.
    """
    found = read(folder)
    names, strange = [CONFIG, WEIGHTS, tokenizer_file(folder).name, README], list[str]()
    theirs = found.settings.model, found.tokenizer, found.facts["weights"]
    code = storage.read_json(folder / CONFIG, KEYS, LARGEST).get("auto_map")
    if code is not None and code != hugging_face.keys(*theirs).get("auto_map"):
        name = f"{folder / CONFIG} names code for transformers (auto_map) that is not dllm's"
        raise UserError(f"{name}: dllm export {folder} --out MODEL makes a folder without it")
    ours = hugging_face.files(*theirs)
    for name, (_, files) in formats.FORMATS.items():
        if any(os.path.lexists(folder / file) for file in files):
            ours |= _also(folder, found, name)
    for name in (*hugging_face.FILES, *(file for _, files in formats.FORMATS.values() for file in files)):
        if name not in names and os.path.lexists(folder / name):
            same = (folder / name).is_file() and (folder / name).read_bytes() == ours.get(name)
            (names if same else strange).append(name)
    return names, strange


def _also(folder: pathlib.Path, found: ModelFolder, name: str) -> dict[str, bytes]:
    """File name -> bytes of a format for other programs, as dllm writes it; {} where it cannot."""
    arrays = {tensor: array for tensor, (_, array) in safetensors.read(folder / WEIGHTS).items()}
    try:
        return formats.pack([name], formats.Stored(found.settings, found.tokenizer, arrays, found.facts["weights"]))
    except UserError:
        return {}


def texts(facts: dict[str, Any]) -> list[Text]:
    """What a model was trained on, as a config.json says, the newest last; []: it does not."""
    training = facts.get("training") or {}
    earlier = training.get("earlier", [])
    found = [Text(entry["corpus"] or "", tokens=entry["tokens"]) for entry in earlier]
    if training.get("corpus") or training.get("tokens"):
        before = sum(text.tokens for text in found)
        found.append(Text(training["corpus"] or "", tokens=max(0, (training["tokens"] or 0) - before)))
    return found


def flat(model: config.ModelConfig, vocabulary: int, tensors: torch_weights.Tensors) -> Array:
    """The flat vector (size,), float32, of tensors under PyTorch's names."""
    layout = Layout(model, vocabulary, np.float32)
    vector: Array = aligned((layout.size,), np.float32)
    torch_weights.write_vector(layout, vector, tensors)
    return vector


def _settings(path: pathlib.Path, facts: dict[str, Any]) -> config.Config:
    """The Config of a config.json. Raises UserError that says what in it no model has."""
    try:
        for name in ("format", "vocabulary", "parameters"):
            if type(facts[name]) is not int:  # True and 1.0 are equal to 1
                raise UserError(f"{name} is {shown(facts[name])}, not a whole number")
        if facts["format"] != FORMAT:
            raise UserError(f"format is {shown(facts['format'])}, this version of dllm reads {FORMAT}")
        if not isinstance(facts["model"], dict) or set(facts["model"]) not in (set(OF_TEXT), set(SHAPE)):
            raise UserError(f"model does not have {', '.join(OF_TEXT)} and nothing else, nor all of {', '.join(OF_KINDS)} too")
        if facts["weights"] not in list(torch_weights.KINDS):
            raise UserError(f"weights are {shown(facts['weights'])}; there are {', '.join(torch_weights.KINDS)}")
        train = {"window": facts["window"], "lanes": facts["lanes"]}
        settings = config.from_dict({"model": facts["model"], "train": train})
        check_windows(settings.train)
        return settings
    except UserError as error:
        raise UserError(f"{path}: {error!s:.200}") from None


def check_kind(model: config.ModelConfig, tokenizer: Tokenizer, folder: pathlib.Path) -> None:
    """Raise UserError where a model lacks what training takes from its corpus, or its tokenizer what such a model needs."""
    labels, needed = len(tokenizer.labels), model.kind in blocks.LABELLED
    if model.features != tokenizer.bands or (model.kind == "ctc" and not model.features):
        of = f"for a model of kind {model.kind}"
        raise UserError(f"{folder}: model.features = {model.features} {of}, and frames of its tokenizer have {tokenizer.bands}")
    if model.kind == "seq2seq" and not tokenizer.pairs:
        raise UserError(f"{folder}: a model of kind seq2seq has a tokenizer of pairs, and this one is of none")
    if model.labels != labels * needed or (needed and not labels):
        of = f"for a model of kind {model.kind}"
        raise UserError(f"{folder}: model.labels = {model.labels} {of}, and its tokenizer names {labels}")


def shape(model: config.ModelConfig) -> dict[str, Any]:
    """What of the settings `model` a trained model depends on."""
    return {name: value for name, value in asdict(model).items() if name in SHAPE}


def shape_for(parent: config.ModelConfig | None) -> Callable[[str | None], dict[str, Any]] | None:
    """What a model to begin with decides of the settings `model` of another one, of a kind."""
    return None if parent is None else lambda kind: inheriting.shape(parent, kind, shape(parent))


def check_windows(train: config.TrainConfig) -> None:
    """Raise UserError where an evaluation would take windows that no model is trained with."""
    window, lanes = train.window, train.eval_lanes or train.lanes
    if window > LONGEST_WINDOW or window * lanes > MOST_IN_WINDOWS:
        most = f"at most {LONGEST_WINDOW:,} tokens in a window and {MOST_IN_WINDOWS:,} in those of all lanes"
        raise UserError(f"window = {window} and lanes = {lanes}: a model folder has {most}")


def _origin(path: pathlib.Path, facts: dict[str, Any]) -> dict[str, Any]:
    """What a config.json says of where the model comes from, without what else may stand there. Raises UserError."""
    try:
        origin = msgspec.convert(facts, Origin)
        if (origin.training is None) == (origin.imported is None):
            raise ValueError("either training or imported")
    except (ValueError, RecursionError) as error:
        complaint = f"as every config.json of dllm does ({reason(error):.100})"
        raise UserError(f"{path} does not say where the model comes from, {complaint}") from None
    found: dict[str, Any] = msgspec.to_builtins(origin)
    return found


def describe(settings: config.Config, tokenizer: Tokenizer, kind: str, data: bytes) -> dict[str, Any]:
    """What a config.json must say of weights that are stored as `kind`; data: the file's bytes. Raises UserError."""
    check_windows(settings.train)
    layout, names = Layout(settings.model, tokenizer.size, np.float32), OF_TEXT if settings.model.kind == "lm" else SHAPE
    known = {name: value for name, value in shape(settings.model).items() if name in names}
    return {
        "format": FORMAT, "vocabulary": tokenizer.size, "parameters": layout.parameters, "model": known,
        "window": settings.train.window, "lanes": settings.train.eval_lanes or settings.train.lanes,
        "weights": kind, "sha256": hashlib.sha256(data).hexdigest(), "tokenizer": tokenizer_hash(tokenizer),
        "embedded": False,
    }  # fmt: skip


def check_free(out: str | os.PathLike[str]) -> None:
    """Raise UserError where there is something already."""
    if os.path.lexists(out):
        raise UserError(f"--out {out} exists; choose another name, or remove it first")


def write(
    out: str | os.PathLike[str], data: bytes, tokenizer: Tokenizer, facts: dict[str, Any], also: Mapping[str, bytes] = NOTHING
) -> None:
    """Make the model folder `out`, whole or not at all. Raises UserError where it cannot.

    data : the bytes of its weights
    facts : its config.json, to which comes what transformers asks for
    also : file name -> bytes of what else it holds, for other programs
    """
    path = pathlib.Path(os.path.abspath(out))
    check_free(path)
    theirs = config.ModelConfig(**facts["model"]), tokenizer, facts["weights"]
    facts = facts | hugging_face.keys(*theirs)
    try:
        with storage.atomic_folder(path) as folder:
            for name, content in {WEIGHTS: data, **hugging_face.files(*theirs), **also}.items():
                (folder / name).write_bytes(content)
            save_tokenizer(folder, tokenizer, OF_MODEL)
            storage.write_json(folder / CONFIG, facts)
            storage.write_text(folder / README, model_card.text(path.name, facts, tokenizer, __version__))
    except OSError as error:
        raise UserError(f"cannot write to --out {path}: {reason(error)}") from None
