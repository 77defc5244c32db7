"""Checkpoints on disk: a folder with one HDF5 file a rank, each with its slice of the standard vectors (model/layout.py) and
the states of its lanes, and a manifest that is renamed into place last. A folder without a manifest is not a checkpoint. Any N
ranks load what any M ranks wrote. How they are written stands in checkpoint_writer.py.
"""

from __future__ import annotations

import hashlib
import json
import pathlib
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np

from ..data.lanes import deal
from ..errors import UserError, shown
from ..files import hdf5, storage
from ..files.storage import Path
from ..kernels.types import Array, DType
from ..model.layout import Layout
from . import provenance
from .state import State

FORMAT = 4
MANIFEST = "manifest.json"
COUNTS = ("step", "epoch", "place", "tokens", "stale", "seen", "order", "skipped", "skipped_in_a_row")  # whole numbers
OWN = "own."  # before the names of what only one rank has, such as its model where models differ
LIMITS = {"parameters": 2**48, "moments": 8, "lanes": 2**31, "layers": 2**31, "hidden": 2**31, "ranks": 2**20}
KEYS = ("format", "dtype", "layout", "scalars", "texts", "tokenizer", "best", "own", "sha256", "seal", *LIMITS)


@dataclass(frozen=True)
class Part:
    """What one of `ranks` ranks has of a checkpoint."""

    name: str  # of its file
    slice: slice  # of the standard vectors
    lanes: range

    @classmethod
    def of(cls, rank: int, ranks: int, parameters: int, lanes: int) -> Part:
        """The part of a rank, of a checkpoint of so many parameters and lanes."""
        share = deal(parameters, ranks, rank)
        return cls(f"rank-{rank:05d}-of-{ranks:05d}.h5", slice(share.start, share.stop), deal(lanes, ranks, rank))


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint on disk whose manifest was read; its files are checked when they are."""

    folder: pathlib.Path
    manifest: dict[str, Any]

    @classmethod
    def open(cls, folder: pathlib.Path) -> Checkpoint:
        """Raises UserError where the manifest is missing or damaged."""
        return cls._checked(folder, storage.read_json(folder / MANIFEST, KEYS))

    @classmethod
    def parse(cls, folder: pathlib.Path, text: str) -> Checkpoint:
        """The same of a manifest that another disk has, which would lie in `folder`."""
        return cls._checked(folder, storage.parse_json(folder / MANIFEST, text.encode(), KEYS))

    @classmethod
    def _checked(cls, folder: pathlib.Path, manifest: dict[str, Any]) -> Checkpoint:
        flaw = _flaw(manifest)
        if flaw:
            raise UserError(f"{folder / MANIFEST} {flaw}")
        return cls(folder, manifest)

    @property
    def step(self) -> int:
        """After which it was written."""
        step: int = self.manifest["scalars"]["step"]
        return step

    @property
    def texts(self) -> list[provenance.Text]:
        """What the model was trained on, the newest last."""
        *before, newest = provenance.parse(self.manifest["texts"])
        return [*before, msgspec.structs.replace(newest, tokens=self.manifest["scalars"]["seen"])]

    def parts(self) -> list[tuple[Part, pathlib.Path]]:
        """(Part, path of its file) of every rank that wrote it."""
        ranks, parameters, lanes = (self.manifest[name] for name in ("ranks", "parameters", "lanes"))
        parts = (Part.of(rank, ranks, parameters, lanes) for rank in range(ranks))
        return [(part, self.folder / part.name) for part in parts]

    def verify(self) -> None:
        """Raise UserError where the sha256 of a file does not hold, or one has not the size of what it should hold."""
        files = zip(self.parts(), self.manifest["sha256"], self.sizes(), strict=True)
        for (_, path), digest, (least, most) in files:
            storage.check_file(path, digest, least, most)

    def sizes(self) -> list[tuple[int, int]]:
        """(least, most) bytes that each rank's file has."""
        manifest, itemsize = self.manifest, np.dtype(self.manifest["dtype"]).itemsize
        own = 64 * manifest["parameters"] * itemsize * (len(manifest["own"]) - 1)  # whatever a method keeps
        found = []
        for part, _ in self.parts():
            theta, lanes = (part.slice.stop - part.slice.start) * itemsize, len(part.lanes)
            states = lanes * (8 + 2 * manifest["layers"] * manifest["hidden"] * itemsize)
            least = theta * (1 + manifest["moments"]) + states
            found.append((least, hdf5.most_bytes(least + own)))
        return found

    def arrays(self, path: pathlib.Path) -> Any:
        """hdf5.open_arrays of one rank's file. Raises UserError."""
        moments = (f"moment.{number}" for number in range(self.manifest["moments"]))
        own = (f"{OWN}{name}" for name in self.manifest["own"][1:])
        return hdf5.open_arrays(path, ["theta", "h", "c", "lane_loss", *moments, *own])


def facts(layout: Layout, lanes: int, tokenizer: str, texts: Sequence[provenance.Text], made_by: str) -> dict[str, Any]:
    """What a manifest says of all checkpoints of a run.

    lanes : of all ranks
    tokenizer : the hash that names the vocabulary
    texts : what the model is trained on, the newest last; how much of that one is among the scalars
    made_by : what else must be the same for what ranks have of their own to be of use
    """
    shapes = {name: list(tensor.shape) for name, tensor in layout.tensors.items()}
    return {
        "format": FORMAT, "tokenizer": tokenizer, "parameters": layout.parameters, "lanes": lanes, "layout": shapes,
        "texts": provenance.plain(texts), "own": [made_by],
    }  # fmt: skip


def folder_of(run: Path, step: int) -> pathlib.Path:
    """Where the checkpoint of a step lies."""
    return pathlib.Path(run, "checkpoints", f"step-{step:08d}")


def seal(manifest: dict[str, Any]) -> str:
    """The sha256 of everything else in a manifest."""
    rest = {name: value for name, value in manifest.items() if name != "seal"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def _flaw(manifest: dict[str, Any]) -> str | None:
    """What is wrong with a manifest, or None."""
    if manifest["format"] != FORMAT:
        return f"is of format {manifest['format']!r:.20}, this version of dllm reads {FORMAT}"
    if seal(manifest) != manifest["seal"]:
        return "is damaged: its checksum does not hold"
    for name, limit in LIMITS.items():
        if not (type(manifest[name]) is int and 0 <= manifest[name] <= limit):
            return f"has {name} = {shown(manifest[name])}; no checkpoint has"
    digests, scalars = manifest["sha256"], manifest["scalars"]
    if not (isinstance(digests, list) and len(digests) == manifest["ranks"] > 0):
        return "does not have a sha256 for each rank"
    if not (isinstance(scalars, dict) and set(scalars) == set(State.SCALARS)):
        return "does not have the scalars of a state"
    if not all(type(value) in (int, float) for value in scalars.values()) or not isinstance(manifest["layout"], dict):
        return "has scalars that are no numbers"
    for name in COUNTS:
        if not (type(scalars[name]) is int and 0 <= scalars[name] <= 2**53):
            return f"has {name} = {shown(scalars[name])}; no run has"
    if manifest["dtype"] not in ("float32", "float64"):
        return f"is of {shown(manifest['dtype'])}; no checkpoint is"
    try:
        if not provenance.parse(manifest["texts"]):
            return "names no text"
    except UserError as error:
        return str(error)
    own = manifest["own"]
    if not (isinstance(own, list) and own and all(isinstance(name, str) for name in own)):
        return "does not name what each rank has of its own"
    return None


def prune(run: Path, keep: int, step: int) -> None:
    """Remove what is neither among the newest `keep` checkpoints up to `step` nor the newest best of these.

    Unfinished ones go too, and later ones: the run has gone back behind them.
    """
    found = [checkpoint for checkpoint in available(run)[0] if checkpoint.step <= step]
    stay = {checkpoint.folder for checkpoint in [*found[:keep], *best_ones(found)[:1]]}
    for folder in pathlib.Path(run, "checkpoints").glob("step-*"):
        if folder not in stay and re.fullmatch(r"step-\d{8,}", folder.name):
            shutil.rmtree(folder, ignore_errors=True)


def best_ones(found: Sequence[Checkpoint]) -> list[Checkpoint]:
    """Those of checkpoints, newest first, that were the best before all others on the validation text of the newest."""
    text = found[0].texts[-1].valid if found else ""
    return [checkpoint for checkpoint in found if checkpoint.manifest["best"] and checkpoint.texts[-1].valid == text]


def available(run: Path) -> tuple[list[Checkpoint], list[str]]:
    """Checkpoints whose manifest is whole, newest first; and what is wrong with other manifests, a line each."""
    found, wrong = [], []
    for folder in sorted(pathlib.Path(run, "checkpoints").glob("step-*"), reverse=True):
        try:
            if (folder / MANIFEST).exists():
                found.append(Checkpoint.open(folder))
        except UserError as error:
            wrong.append(str(error))
    return found, wrong


def intact(run: Path, best: bool = False) -> tuple[Checkpoint, list[str]]:
    """The newest checkpoint (the newest best one) all of whose hashes hold, and a warning for each that was passed over.

    Raises UserError where there is none.
    """
    found, wrong = available(run)
    if best:
        marked = best_ones(found)
        found = [*marked, *(checkpoint for checkpoint in found if checkpoint not in marked)]
    for checkpoint in found:
        try:
            checkpoint.verify()
        except UserError as error:
            wrong.append(str(error))
        else:
            return checkpoint, [f"{text}; trying the one before" for text in wrong]
    if any(not path.exists() for checkpoint in found for _, path in checkpoint.parts()):
        hint = "; other hosts may have the rest: start it on all of them"
    else:
        hint = ""
    if wrong:
        raise UserError(f"no checkpoint of {run} is whole: {wrong[0]}{hint}")
    raise UserError(f"{run} has no checkpoint to start from")


def check_fits(
    checkpoint: Checkpoint, layout: Layout, dtype: DType, moments: int | None = None, lanes: int | None = None
) -> None:
    """Raise UserError where a checkpoint was made by another model, optimiser, precision or number of lanes."""
    manifest = checkpoint.manifest
    expected = {"dtype": np.dtype(dtype).name, "parameters": layout.parameters, "moments": moments, "lanes": lanes}
    shapes = {name: list(tensor.shape) for name, tensor in layout.tensors.items()}
    for name in dict.fromkeys([*shapes, *manifest["layout"]]):
        if shapes.get(name) != manifest["layout"].get(name):
            raise UserError(
                f"{checkpoint.folder} is of another shape: {name} is {manifest['layout'].get(name)} there, "
                f"{shapes.get(name)} here"
            )
    for name, value in expected.items():
        if value is not None and manifest[name] != value:
            raise UserError(f"{checkpoint.folder} has {name} = {manifest[name]}, this run has {value}")


def load_theta(checkpoint: Checkpoint, layout: Layout, theta: Array) -> None:
    """Fill the flat vector theta from all files."""
    for part, path in checkpoint.parts():
        with checkpoint.arrays(path) as array:
            _load(layout, theta, part, array, "theta")


def load(checkpoint: Checkpoint, layout: Layout, state: State, lanes: range) -> None:
    """Fill `state` of a rank that now computes `lanes`, a range, from all files of a checkpoint of any number of ranks."""
    layers, hidden = checkpoint.manifest["layers"], checkpoint.manifest["hidden"]
    load_theta(checkpoint, layout, state.theta)
    for part, path in checkpoint.parts():
        shape = layers, len(part.lanes), hidden
        both = range(max(part.lanes.start, lanes.start), min(part.lanes.stop, lanes.stop))
        with checkpoint.arrays(path) as array:
            for number, moment in enumerate(state.moments):
                _load(layout, moment, part, array, f"moment.{number}")
            if both:
                here, there = (slice(both.start - one.start, both.stop - one.start) for one in (lanes, part.lanes))
                state.h[:, here] = array("h", state.h.dtype, shape)[:, there]
                state.c[:, here] = array("c", state.c.dtype, shape)[:, there]
                state.lane_loss[here] = array("lane_loss", np.float64, shape[1:2])[there]
    state.set_scalars(checkpoint.manifest["scalars"])


def load_own(checkpoint: Checkpoint, rank: int, ranks: int, own: Mapping[str, Array], made_by: str) -> bool:
    """Fill the vectors of `own`, name -> vector, from this rank's file. Returns whether as many ranks wrote them."""
    if checkpoint.manifest["ranks"] != ranks or checkpoint.manifest["own"] != [made_by, *sorted(own)]:
        return False
    _, path = checkpoint.parts()[rank]
    with checkpoint.arrays(path) as array:
        for name, vector in own.items():
            vector[:] = array(f"{OWN}{name}", vector.dtype, vector.shape)[:]
    return True


def _load(layout: Layout, vector: Array, part: Part, array: Any, name: str) -> None:
    start, stop = part.slice.start, part.slice.stop
    layout.load(vector, start, array(name, vector.dtype, (stop - start,))[:])
