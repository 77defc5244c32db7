"""A model that is ready for use: what is opened by everything that uses one. From a model folder, or from a run's.

A model folder holds model.safetensors (weights.py), tokenizer.json, README.md (card.py) and config.json with

    format, vocabulary, parameters, model (embedding, hidden, layers, tied, biases), window and lanes (of evaluations)
    weights (fp32, bf16 or int8), sha256 (of model.safetensors), tokenizer (its hash)
    embedded    whether the corpus is the embedded one, which every machine has
    training    of an exported run: step, averaged, tokens, corpus, measured, recipe. Not with `imported`, the name of a file

It may come from anywhere: nothing in it is believed before it was checked, and nothing but numbers and text is read.
"""

import hashlib
import os
import pathlib
from dataclasses import asdict, dataclass

import numpy as np
import xxhash

from .. import __version__, config
from ..data.tokenizer_files import load_tokenizer, save_tokenizer, tokenizer_hash
from ..errors import UserError
from ..files import storage
from ..kernels.gemm import aligned
from ..model import torch_weights
from ..model.language_model import LanguageModel
from ..model.layout import Layout
from ..runs.run_folder import Trained
from . import model_card

FORMAT = 1
CONFIG, WEIGHTS, README = "config.json", "model.safetensors", "README.md"
SHAPE = ("embedding", "hidden", "layers", "tied", "biases")  # what of ModelConfig a trained model depends on
KEYS = ("format", "vocabulary", "model", "window", "lanes", "weights", "sha256", "tokenizer", "embedded")
MOST_LAYERS = 1000


@dataclass(frozen=True, eq=False)
class Bundle:
    """A model and what it takes to use it.

    Attributes
    ----------
    name : str
        Of its folder.
    settings : Config
        Of the run; of a model folder its shape, and window and lanes of an evaluation.
    tokenizer : Tokenizer
    vector : (size,) array
        The parameters as Layout has them. All models made from a bundle share it, so nobody writes to it.
    data : str or None
        Where the corpus is, as data.path says it; None: unknown.
    origin : str
        In a few words.
    scalars : dict
        Of the run's checkpoint (state.py); of a model folder {}.
    facts : dict
        What config.json says; of a run {}.
    warnings : list of str
    """

    name: str
    settings: config.Config
    tokenizer: object
    vector: np.ndarray
    data: str | None
    origin: str
    scalars: dict
    facts: dict
    warnings: list

    @property
    def fingerprint(self):
        """Of the parameters and the tokenizer: equal where both are, to the bit."""
        return f"{xxhash.xxh3_64_hexdigest(self.vector)}-{tokenizer_hash(self.tokenizer)[:16]}"

    @classmethod
    def open(cls, path, best=True):
        """Of a model folder, or of a run's newest best (or newest) checkpoint. Raises UserError."""
        folder = pathlib.Path(path)
        if (folder / CONFIG).exists() or (folder / WEIGHTS).exists():
            return cls._of_model(folder)
        if not (folder / "config.toml").exists():
            raise UserError(f"{path} is not the folder of a run or of a model: it has no config.toml and no {CONFIG}")
        return cls._of_run(folder, best)

    @classmethod
    def _of_run(cls, folder, best):
        run = Trained.open(folder, best)
        theta = run.theta(Layout(run.settings.model, run.tokenizer.size, run.dtype))
        scalars, name, path = run.checkpoint.manifest["scalars"], folder.resolve().name, run.settings.data.path
        return cls(name, run.settings, run.tokenizer, theta, path, f"step {scalars['step']}", scalars, {}, run.warnings)

    @classmethod
    def _of_model(cls, folder):
        path = folder / CONFIG
        facts = storage.read_json(path, KEYS)
        settings, tokenizer = _settings(path, facts), load_tokenizer(folder)
        if not 0 < tokenizer.size == facts["vocabulary"] or tokenizer_hash(tokenizer) != facts["tokenizer"]:
            raise UserError(f"{folder}/tokenizer.json is not the one of its {CONFIG}")
        shape = settings.model, tokenizer.size
        tensors = torch_weights.read_model(folder / WEIGHTS, *shape, facts["weights"], facts["sha256"])
        name, data, origin = folder.resolve().name, "" if facts["embedded"] is True else None, f"weights in {facts['weights']}"
        try:
            model_card.text(name, facts, tokenizer, __version__)
        except Exception:  # anything at all may stand in its parts
            raise UserError(f"{path} does not say where the model comes from, as every config.json of dllm does") from None
        return cls(name, settings, tokenizer, flat(*shape, tensors), data, origin, {}, facts, [])

    @property
    def config(self):
        return self.settings.model

    @property
    def dtype(self):
        return self.vector.dtype

    @property
    def window(self):
        return self.settings.train.window

    def theta(self, layout):
        """The parameters (size,) of `layout`, which must be this model's; shared, not to be written to."""
        if (layout.size, layout.dtype) != (self.vector.size, self.dtype):
            raise ValueError(f"a layout of {layout.size} {layout.dtype} where {self.vector.size} {self.dtype} are")
        return self.vector

    def model(self, window, lanes=1, team=None):
        """A LanguageModel for inference."""
        return LanguageModel(self.layout, window, lanes, theta=self.vector, training=False, team=team)

    def tensors(self):
        """name -> float32 array, as weights.py has them."""
        return torch_weights.read_vector(Layout(self.config, self.tokenizer.size, self.dtype), self.vector)


def flat(model, vocabulary, tensors):
    """The flat vector, float32, of tensors as weights.py has them."""
    layout = Layout(model, vocabulary, np.float32)
    vector = aligned((layout.size,), np.float32)
    torch_weights.write_vector(layout, vector, tensors)
    return vector


def _settings(path, facts):
    """The Config of a config.json. Raises UserError that says what in it no model has."""
    try:
        if facts["format"] != FORMAT:
            raise UserError(f"format is {facts['format']!r}, this version of dllm reads {FORMAT}")
        if not isinstance(facts["model"], dict) or set(facts["model"]) != set(SHAPE):
            raise UserError(f"model does not have {', '.join(SHAPE)} and nothing else")
        if facts["weights"] not in list(torch_weights.KINDS):
            raise UserError(f"weights are {facts['weights']!r}; there are {', '.join(torch_weights.KINDS)}")
        train = {"window": facts["window"], "lanes": facts["lanes"]}
        settings = config.from_dict({"model": facts["model"], "train": train})
        if settings.model.layers > MOST_LAYERS:
            raise UserError(f"model.layers = {settings.model.layers}: no model has so many")
        return settings
    except UserError as error:
        raise UserError(f"{path}: {error!s:.200}") from None


def describe(settings, tokenizer, kind, data):
    """What a config.json must say of weights that are stored as `kind`; data: the file's bytes."""
    layout = Layout(settings.model, tokenizer.size, np.float32)
    model = {name: value for name, value in asdict(settings.model).items() if name in SHAPE}
    return {
        "format": FORMAT, "vocabulary": tokenizer.size, "parameters": layout.parameters,
        "model": model, "window": settings.train.window, "lanes": settings.train.eval_lanes or settings.train.lanes,
        "weights": kind, "sha256": hashlib.sha256(data).hexdigest(), "tokenizer": tokenizer_hash(tokenizer),
        "embedded": False,
    }  # fmt: skip


def check_free(out):
    """Raise UserError where there is something already."""
    if os.path.lexists(out):
        raise UserError(f"--out {out} exists; choose another name, or remove it first")


def write(out, data, tokenizer, facts):
    """Make the model folder `out`, whole or not at all. data: the bytes of its weights; facts: its config.json."""
    out = pathlib.Path(os.path.abspath(out))
    check_free(out)
    try:
        with storage.atomic_folder(out) as folder:
            (folder / WEIGHTS).write_bytes(data)
            save_tokenizer(folder, tokenizer)
            storage.write_json(folder / CONFIG, facts)
            storage.write_text(folder / README, model_card.text(out.name, facts, tokenizer, __version__))
    except OSError as error:
        raise UserError(f"cannot write to --out {out}: {error.strerror}") from None
