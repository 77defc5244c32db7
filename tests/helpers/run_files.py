"""Reads what a run left behind; damages files."""

import json
import pathlib

import h5py
import numpy as np

TIMES = ("tokens_per_second", "exposed_comm_fraction", "hidden_comm_fraction", "busy_seconds", "slowest_rank")
LINKS = "neighbour_seconds"  # only where ranks have neighbours


def metrics(run, split=None):
    """The lines of metrics.jsonl without what a clock measured. split: None all, "train", or an evaluation's."""
    lines = [json.loads(line) for line in pathlib.Path(run, "metrics.jsonl").read_text().splitlines()]
    assert all(name in line for line in lines if "split" not in line for name in TIMES)
    lines = [{name: value for name, value in line.items() if name not in (*TIMES, LINKS)} for line in lines]
    return [line for line in lines if split in (None, line.get("split", "train"))]


def column(lines, name):
    return np.array([line[name] for line in lines])


def same_losses(run, other):
    """Every step once, and the losses of both splits those of another run up to rounding in float64."""
    for split in ("train", "valid"):
        ours, theirs = metrics(run, split), metrics(other, split)
        assert column(ours, "step").tolist() == column(theirs, "step").tolist()
        np.testing.assert_allclose(column(ours, "loss"), column(theirs, "loss"), rtol=1e-12)


def checkpoints(run):
    """Steps of the checkpoints that are there, oldest first."""
    return sorted(int(path.parent.name[5:]) for path in pathlib.Path(run).glob("checkpoints/step-*/manifest.json"))


def arrays(run, step):
    """name -> array of a checkpoint: the slices and lanes of all ranks joined. And the manifest's scalars."""
    folder = pathlib.Path(run, "checkpoints", f"step-{step:08d}")
    manifest = json.loads((folder / "manifest.json").read_text())
    parts = {}
    for path in sorted(folder.glob("rank-*.h5")):
        with h5py.File(path) as file:
            for name in file:
                parts.setdefault(name, []).append(file[name][:])
    joined = {name: np.concatenate(pieces, axis=1 if name in "hc" else 0) for name, pieces in parts.items()}
    return joined, manifest["scalars"]


def flip(path, place):
    """Flip the lowest bit of one byte of a file."""
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


def place_of(path, name="tokens"):
    """Where the first chunk of a dataset begins in its file."""
    with h5py.File(path) as file:
        return file[name].id.get_chunk_info(0).byte_offset
