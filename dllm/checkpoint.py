"""Checkpoints: one HDF5 file a rank, each with its slice of the standard vectors (layout.py) and the states of its lanes,
and a manifest that is renamed into place last. A folder without a manifest is not a checkpoint. Any N ranks load what any M
ranks wrote.
"""

import pathlib
import shutil
from dataclasses import dataclass

import numpy as np

from . import storage
from .data.lanes import deal
from .errors import UserError

FORMAT = 1
MOMENTS = 8  # vectors of optimiser state that a manifest may name at most
KEYS = (
    "format",
    "dtype",
    "parameters",
    "layout",
    "moments",
    "lanes",
    "layers",
    "hidden",
    "scalars",
    "files",
    "tokenizer",
    "best",
)


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint on disk whose manifest was read; its files are checked when they are."""

    folder: pathlib.Path
    manifest: dict

    @property
    def step(self):
        return self.manifest["scalars"]["step"]


def save(comm, run, state, layout, lanes, tokenizer, best):
    """Write state of all ranks as checkpoints/step-XXXXXXXX of the folder `run`. Collective.

    lanes : (of this rank: range, of all ranks: int)
    tokenizer : str
        The hash that names the vocabulary.
    best : bool
        True: the validation loss is the best so far.

    Returns None, or on all ranks what went wrong; then nothing is left of the attempt and older checkpoints stay.
    """
    folder = pathlib.Path(run, "checkpoints", f"step-{state.step:08d}")
    part = _share(layout.parameters, comm.size, comm.rank)
    mine, total = lanes
    name, problem, entry = f"rank-{comm.rank:05d}.h5", None, None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        stream = lambda vector: storage.Stream(part[1] - part[0], vector.dtype, layout.parts(vector, *part))
        arrays = {"theta": stream(state.theta), "h": state.h, "c": state.c, "lane_loss": state.lane_loss}
        arrays |= {f"moment.{number}": stream(moment) for number, moment in enumerate(state.moments)}
        digest = storage.write_arrays(folder / name, arrays)
        entry = {
            "name": name,
            "start": part[0],
            "stop": part[1],
            "lanes": [mine.start, mine.stop],
            "sha256": digest,
        }
    except OSError as error:
        problem = error.strerror or str(error)
    gathered = comm.allgather((problem, entry))
    problem = next((text for text, _ in gathered if text), None)
    if problem is None and comm.rank == 0:
        manifest = {
            "format": FORMAT, "dtype": state.theta.dtype.name, "parameters": layout.parameters,
            "layout": {name: list(tensor.shape) for name, tensor in layout.tensors.items()}, "moments": len(state.moments),
            "lanes": total, "layers": state.h.shape[0], "hidden": state.h.shape[2], "scalars": state.scalars(),
            "tokenizer": tokenizer, "best": best, "files": [entry for _, entry in gathered],
        }  # fmt: skip
        try:
            storage.write_json(folder / "manifest.json", manifest)
        except OSError as error:
            problem = error.strerror
    problem = comm.bcast(problem)
    if problem is not None and comm.rank == 0:
        shutil.rmtree(folder, ignore_errors=True)
    comm.barrier()
    return problem


def prune(run, keep):
    """Remove what is neither among the newest `keep` checkpoints nor the newest best one; unfinished ones too."""
    found = available(run)
    best = [checkpoint for checkpoint in found if checkpoint.manifest["best"]][:1]
    stay = {checkpoint.folder for checkpoint in [*found[:keep], *best]}
    for folder in pathlib.Path(run, "checkpoints").glob("step-*"):
        if folder not in stay:
            shutil.rmtree(folder, ignore_errors=True)


def available(run):
    """Checkpoints whose manifest is whole, newest first."""
    found = []
    for folder in sorted(pathlib.Path(run, "checkpoints").glob("step-*"), reverse=True):
        try:
            manifest = storage.read_json(folder / "manifest.json", KEYS)
        except UserError:
            continue
        if manifest["format"] == FORMAT:
            found.append(Checkpoint(folder, manifest))
    return found


def intact(run, best=False):
    """The newest checkpoint (the newest best one) all of whose hashes hold, and a warning for each that was passed over.

    Raises UserError where there is none.
    """
    warnings, found = [], available(run)
    found = sorted(found, key=lambda checkpoint: not checkpoint.manifest["best"]) if best else found
    for checkpoint in found:
        try:
            for entry in checkpoint.manifest["files"]:
                storage.check_file(checkpoint.folder / entry["name"], entry["sha256"])
        except UserError as error:
            warnings.append(f"{error}; trying the one before")
        else:
            return checkpoint, warnings
    if warnings:
        raise UserError(f"no checkpoint of {run} is whole: {warnings[0].split(';')[0]}")
    raise UserError(f"{run} has no checkpoint to start from")


def check_fits(checkpoint, layout, dtype, moments=None, lanes=None):
    """Raise UserError where a checkpoint was made by another model, optimiser, precision or number of lanes."""
    manifest = checkpoint.manifest
    expected = {"dtype": np.dtype(dtype).name, "moments": moments, "lanes": lanes}
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


def _open(checkpoint, entry):
    """storage.open_arrays of one rank's file, whose names the manifest gives. Raises UserError."""
    moments = checkpoint.manifest["moments"]
    if not (isinstance(moments, int) and 0 <= moments <= MOMENTS):
        raise UserError(f"{checkpoint.folder}/manifest.json has moments = {moments!r:.40}; no optimiser has")
    names = ["theta", "h", "c", "lane_loss", *(f"moment.{number}" for number in range(moments))]
    return storage.open_arrays(checkpoint.folder / entry["name"], names)


def load_theta(checkpoint, layout, theta):
    """Fill the flat vector theta from all files."""
    for entry in checkpoint.manifest["files"]:
        with _open(checkpoint, entry) as array:
            layout.load(theta, entry["start"], array("theta", theta.dtype, (entry["stop"] - entry["start"],))[:])


def load(checkpoint, layout, state, lanes):
    """Fill `state` of a rank that now computes `lanes`, a range, from all files of a checkpoint of any number of ranks."""
    manifest = checkpoint.manifest
    load_theta(checkpoint, layout, state.theta)
    for entry in manifest["files"]:
        first, last = entry["lanes"]
        shape = (manifest["layers"], last - first, manifest["hidden"])
        here = slice(max(first, lanes.start) - lanes.start, min(last, lanes.stop) - lanes.start)
        there = slice(here.start + lanes.start - first, here.stop + lanes.start - first)
        with _open(checkpoint, entry) as array:
            for number, moment in enumerate(state.moments):
                part = array(f"moment.{number}", moment.dtype, (entry["stop"] - entry["start"],))[:]
                layout.load(moment, entry["start"], part)
            if here.start < here.stop:
                state.h[:, here] = array("h", state.h.dtype, shape)[:, there]
                state.c[:, here] = array("c", state.c.dtype, shape)[:, there]
                state.lane_loss[here] = array("lane_loss", np.float64, shape[1:2])[there]
    state.set_scalars(manifest["scalars"])


def _share(size, ranks, rank):
    part = deal(size, ranks, rank)
    return part.start, part.stop
