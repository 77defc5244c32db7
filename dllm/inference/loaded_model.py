"""A trained model that was loaded from a run or from a model folder: what every command that uses one works with."""

from __future__ import annotations

import os
import pathlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import xxhash

from ..comm.runtime import agree, check_same
from ..config import Config, ModelConfig
from ..data.tokenizer_files import tokenizer_hash
from ..data.tokenizers import Tokenizer
from ..errors import UserError, printable
from ..kernels.team import Team
from ..kernels.types import Array
from ..model import torch_weights
from ..model.base import Model
from ..model.kinds import language_model, make_model
from ..model.language_model import LanguageModel
from ..model.layout import Layout
from ..remote.locate import local_copy
from ..runs.gathering import gather_run
from ..runs.provenance import Text
from ..runs.run_folder import Trained
from . import model_folder

if TYPE_CHECKING:
    from mpi4py import MPI


@dataclass(frozen=True, eq=False, kw_only=True)
class LoadedModel:
    """The parameters of a trained model, its tokenizer, and what is known of it."""

    name: str  # of its folder
    settings: Config  # of the run; of a model folder its shape, and window and lanes of an evaluation
    tokenizer: Tokenizer
    vector: Array  # (size,) the parameters as Layout has them; all models made of it share it, so nobody writes to it
    data: str | None  # where the corpus is, as data.path says it; None: unknown
    origin: str  # in a few words
    scalars: dict[str, Any] = field(default_factory=dict)  # of the run's checkpoint (runs/state.py); of a model folder {}
    facts: dict[str, Any] = field(default_factory=dict)  # what config.json says; of a run {}
    texts: list[Text] = field(default_factory=list)  # what it was trained on, the newest last; []: unknown
    warnings: list[str] = field(default_factory=list)

    @classmethod
    def open(cls, path: str | os.PathLike[str], best: bool = True) -> LoadedModel:
        """Load a model folder, or a run's newest best (or newest) checkpoint; path may be an URL. Raises UserError."""
        folder = local_copy(path)
        if model_folder.is_model_folder(folder):
            return cls._of_model(folder)
        if not (folder / "config.toml").exists():
            there = f"it has no config.toml and no {model_folder.CONFIG}"
            raise UserError(f"{path} is not the folder of a run or of a model: {there}")
        return cls._of_run(folder, best)

    @classmethod
    def _of_run(cls, folder: pathlib.Path, best: bool) -> LoadedModel:
        run = Trained.open(folder, best)
        model_folder.check_kind(run.settings.model, run.tokenizer, folder)
        scalars = run.checkpoint.manifest["scalars"]
        return cls(
            name=printable(folder.resolve().name),
            settings=run.settings,
            tokenizer=run.tokenizer,
            vector=run.theta(Layout(run.settings.model, run.tokenizer.size, run.dtype)),
            data=run.settings.data.path,
            origin=f"step {scalars['step']}",
            scalars=scalars,
            texts=run.checkpoint.texts,
            warnings=[printable(text) for text in run.warnings],
        )

    @classmethod
    def _of_model(cls, folder: pathlib.Path) -> LoadedModel:
        found = model_folder.read(folder)
        return cls(
            name=printable(folder.resolve().name),
            settings=found.settings,
            tokenizer=found.tokenizer,
            vector=found.vector,
            data="" if found.facts["embedded"] is True else None,
            origin=f"weights in {found.facts['weights']}",
            facts=found.facts,
            texts=model_folder.texts(found.facts),
        )

    @property
    def fingerprint(self) -> str:
        """Of the parameters and the tokenizer: equal where both are, to the bit."""
        return f"{xxhash.xxh3_64_hexdigest(self.vector.data)}-{self.vocabulary[:16]}"

    @property
    def vocabulary(self) -> str:
        """The hash that names the tokenizer."""
        return tokenizer_hash(self.tokenizer)

    @property
    def config(self) -> ModelConfig:
        """The model's shape."""
        return self.settings.model

    @property
    def dtype(self) -> np.dtype[Any]:
        """Of the parameters."""
        return self.vector.dtype

    @property
    def layout(self) -> Layout:
        """Of `vector`."""
        return Layout(self.config, self.tokenizer.size, self.dtype)

    @property
    def window(self) -> int:
        """T of training."""
        return self.settings.train.window

    def network(self, window: int, lanes: int = 1, team: Team | None = None) -> Model:
        """A Model of its kind for inference over windows of at most `window` steps and `lanes` lanes."""
        return make_model(self.layout, window, lanes, theta=self.vector, training=False, team=team)

    def model(self, window: int, lanes: int = 1, team: Team | None = None) -> LanguageModel:
        """The same of one that continues text. Raises UserError where it is of another kind."""
        return language_model(self.network(window, lanes, team))

    def tensors(self) -> torch_weights.Tensors:
        """The parameters under PyTorch's names, float32."""
        return torch_weights.read_vector(self.layout, self.vector)


def open_parent(comm: MPI.Comm, path: str, say: Callable[[str], None]) -> LoadedModel:
    """The model that a new run begins with, the same on all ranks. Collective. Raises UserError on all ranks.

    say : told what is damaged or takes long, by all ranks alike
    """
    check_same(comm, {"--init-from": path})
    gather_run(comm, path, say, best=True)
    found = agree(comm, LoadedModel.open, path)
    check_same(comm, {f"parameters of {path}": found.fingerprint})
    for warning in found.warnings:
        say(warning)
    return found
