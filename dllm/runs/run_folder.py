"""A run's folder: made by train, opened by every command that uses what was trained."""

import datetime
import pathlib
import shutil
from dataclasses import dataclass

import numpy as np
import tomli_w

from . import checkpoint, ownership
from .. import config
from ..files import storage
from ..data.shards import load_tokenizer, save_tokenizer, tokenizer_hash
from ..errors import UserError
from ..kernels.gemm import aligned

FILES = {
    "config.toml",
    "tokenizer.json",
    "metrics.jsonl",
    "summary.json",
    "loss.png",
    "checkpoints",
    "DONE",
    "resize",
    ownership.FILE,
}


def new_name(out, preset):
    """The folder of a new run. Raises UserError where it exists."""
    run = out or f"runs/{preset}-{datetime.datetime.now():%Y%m%d-%H%M%S}"
    if pathlib.Path(run).exists():
        raise UserError(f"--out {run} exists; choose another name, or go on with it by --resume {run}")
    return run


def make(run, settings, tokenizer):
    """Write config.toml and tokenizer.json to the folder; it may be there already."""
    try:
        pathlib.Path(run).mkdir(parents=True, exist_ok=True)
        storage.write_text(pathlib.Path(run, "config.toml"), tomli_w.dumps(config.as_dict(settings)))
        save_tokenizer(run, tokenizer)
    except OSError as error:
        raise UserError(f"cannot write to the run folder {run}: {error.strerror}") from None


def begin_anew(run):
    """Remove the folder of a run that came to no checkpoint. Where it is anything else, UserError; then all of it stays."""
    folder = pathlib.Path(run)
    if not folder.exists():
        return
    known = lambda name: name in FILES or (name.startswith(".") and name.endswith(".tmp"))
    if not folder.is_dir() or not all(known(path.name) for path in folder.iterdir()) or newest_step(run) is not None:
        raise UserError(f"{run} exists and is not the folder of a run: choose another name")
    shutil.rmtree(folder)


def done(run, step):
    """Mark a run as finished: the one thing that a supervisor believes, since mpirun's exit code may be anything."""
    storage.write_text(pathlib.Path(run, "DONE"), f"{step}\n")


def is_done(run):
    return pathlib.Path(run, "DONE").exists()


def not_done(run):
    """Take the mark away: the run goes on."""
    pathlib.Path(run, "DONE").unlink(missing_ok=True)


def wish(run, ranks):
    """Ask the launcher of a run to go on with another number of ranks. Returns the file, which is gone once it was taken in."""
    path = pathlib.Path(run, "resize")
    storage.write_text(path, f"{ranks}\n")
    return path


def take_wish(run):
    """The number of ranks that somebody wants, once; None where nobody does."""
    path = pathlib.Path(run, "resize")
    try:
        text = path.read_text(encoding="utf-8")
        path.unlink()
        return int(text)
    except (OSError, ValueError):
        return None


def newest_step(run):
    """The step of the newest checkpoint, None where there is none."""
    found, _ = checkpoint.available(run)
    return found[0].step if found else None


def read_settings(run, extra=None):
    """The Config of a run, overlaid by `extra`, nested dicts."""
    path = pathlib.Path(run, "config.toml")
    if not path.exists():
        raise UserError(f"{run} is not the folder of a run: it has no config.toml")
    return config.from_dict(config.merge(config.load_toml(path), extra or {}))


@dataclass(frozen=True)
class Trained:
    """A run with a whole checkpoint: what it takes to use the model."""

    run: str
    settings: config.Config
    tokenizer: object
    checkpoint: checkpoint.Checkpoint
    warnings: list

    @classmethod
    def open(cls, run, best=True):
        """Raises UserError where the folder is no run, or has no checkpoint whose hashes hold."""
        settings, tokenizer = read_settings(run), load_tokenizer(run)
        found, warnings = checkpoint.intact(run, best)
        if found.manifest["tokenizer"] != tokenizer_hash(tokenizer):
            raise UserError(f"{run}/tokenizer.json is not the one that the run was trained with")
        return cls(run, settings, tokenizer, found, warnings)

    @property
    def dtype(self):
        return np.dtype(self.checkpoint.manifest["dtype"])

    def theta(self, layout):
        """The parameters (P,) of `layout`, which must be the checkpoint's."""
        checkpoint.check_fits(self.checkpoint, layout, self.dtype)
        theta = aligned((layout.size,), self.dtype)
        checkpoint.load_theta(self.checkpoint, layout, theta)
        return theta
