"""A run's folder: made by train, opened by every command that uses what was trained."""

from __future__ import annotations

import atexit
import contextlib
import datetime
import itertools
import os
import pathlib
import shutil
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import tomli_w

from .. import config
from ..comm import replicas
from ..data.tokenizer_files import load_tokenizer, save_tokenizer, tokenizer_hash
from ..errors import UserError, reason
from ..files import storage
from ..files.storage import Path
from ..kernels.gemm import aligned
from ..kernels.types import Array
from . import checkpoint, marks, ownership

if TYPE_CHECKING:
    from ..data.tokenizers import Tokenizer
    from ..model.layout import Layout

FILES = {
    "config.toml",
    "tokenizer.json",
    "metrics.jsonl",
    "summary.json",
    "loss.png",
    "trace.json",
    "tensorboard",
    "checkpoints",
    marks.DONE,
    marks.RESIZE,
    ownership.FILE,
}


_claimed: set[str] = set()  # folders that this process has made for runs and not yet filled


def new_name(out: str | None, preset: str) -> str:
    """A name for the folder of a new run: `out`, else one that nothing has yet. Raises UserError where `out` exists."""
    if out:
        if os.path.lexists(out):
            raise _exists(out)
        return out
    first = f"runs/{preset}-{datetime.datetime.now():%Y%m%d-%H%M%S}"
    names = (f"{first}-{number}" if number > 1 else first for number in itertools.count(1))
    return next(name for name in names if not os.path.lexists(name))


def claim(out: str | None, preset: str) -> str:
    """The same; a name that the user has not chosen is taken at once, by an empty folder, so that nobody else takes it.

    The folder goes with this process where no run has come of it. Raises UserError.
    """
    while not out:
        name = new_name(None, preset)
        with contextlib.suppress(FileExistsError):  # of another job that has started in the same second
            _make(name)
            _claimed.add(name)
            atexit.register(_give_up, name)
            return name
    return new_name(out, preset)


def _give_up(run: str) -> None:
    if run in _claimed:
        with contextlib.suppress(OSError):  # somebody has put something there
            os.removedirs(run)


def _make(run: Path) -> None:
    """Make the folder. Raises FileExistsError, UserError."""
    try:
        pathlib.Path(run).parent.mkdir(parents=True, exist_ok=True)
        os.mkdir(run)
    except FileExistsError:
        raise
    except OSError as error:
        raise UserError(f"cannot write to the run folder {run}: {reason(error)}") from None


def _exists(run: Path, where: str = "") -> UserError:
    return UserError(f"--out {run} exists{where}; choose another name, or go on with it by --resume {run}")


def check_new(run: Path) -> None:
    """Raise UserError where the folder has anything in it: a disk that rank 0 does not see may have an older run."""
    if os.path.lexists(run) and not (os.path.isdir(run) and not os.listdir(run)):
        raise _exists(run, f" on {socket.gethostname()}")


def create(run: Path, settings: config.Config, tokenizer: Tokenizer, new: bool = True) -> None:
    """Write config.toml and tokenizer.json to the folder, which must not be there where it is new. Raises UserError."""
    try:
        if new and str(run) not in _claimed:
            _make(run)
        _claimed.discard(str(run))
        storage.write_text(pathlib.Path(run, "config.toml"), tomli_w.dumps(config.as_dict(settings)))
        save_tokenizer(run, tokenizer)
    except FileExistsError:
        raise _exists(run, f" on {socket.gethostname()}") from None
    except OSError as error:
        raise UserError(f"cannot write to the run folder {run}: {reason(error)}") from None


def begin_anew(run: Path) -> None:
    """Remove the folder of a run that came to no checkpoint. Where it is anything else, UserError; then all of it stays.

    Hosts that see the same disk may do so at once.
    """
    folder = pathlib.Path(run)
    if not os.path.lexists(folder):
        return
    with contextlib.suppress(FileNotFoundError):  # another host was first
        if (
            folder.is_symlink()
            or not folder.is_dir()
            or not all(_is_of_a_run(path.name) for path in folder.iterdir())
            or newest_step(run) is not None
        ):
            raise UserError(f"{run} exists and is not the folder of a run: choose another name")
        gone = folder.with_name(f".{folder.name[:100]}.{os.urandom(8).hex()}.tmp")
        folder.rename(gone)
        shutil.rmtree(gone)


def _is_of_a_run(name: str) -> bool:
    """Whether train writes a file of that name, or one that became of it when it was cut off."""
    return name in FILES or (name.startswith(".") and name.endswith(".tmp")) or name.startswith(replicas.TOKEN)


def newest_step(run: Path) -> int | None:
    """The step of the newest checkpoint, None where there is none."""
    found, _ = checkpoint.available(run)
    return found[0].step if found else None


def read_settings(run: Path, extra: Mapping[str, Any] | None = None) -> config.Config:
    """The Config of a run, overlaid by `extra`, nested dicts. Raises UserError."""
    path = pathlib.Path(run, "config.toml")
    if not path.exists():
        raise UserError(f"{run} is not the folder of a run: it has no config.toml")
    settings = config.from_dict(config.lay_over(config.load_toml(path), extra or {}, of_run=True))
    config.check_said(settings, extra or {})
    return settings


@dataclass(frozen=True)
class Trained:
    """A run with a whole checkpoint: what it takes to use the model."""

    run: str
    settings: config.Config
    tokenizer: Tokenizer
    checkpoint: checkpoint.Checkpoint
    warnings: list[str]

    @classmethod
    def open(cls, run: Path, best: bool = True) -> Trained:
        """Raises UserError where the folder is no run, or has no checkpoint whose hashes hold."""
        settings, tokenizer = read_settings(run), load_tokenizer(run)
        found, warnings = checkpoint.intact(run, best)
        if found.manifest["tokenizer"] != tokenizer_hash(tokenizer):
            raise UserError(f"{run}/tokenizer.json is not the one that the run was trained with")
        return cls(str(run), settings, tokenizer, found, warnings)

    @property
    def dtype(self) -> np.dtype[Any]:
        """Of the parameters."""
        dtype: np.dtype[Any] = np.dtype(self.checkpoint.manifest["dtype"])
        return dtype

    def theta(self, layout: Layout) -> Array:
        """The parameters (P,) of `layout`, which must be the checkpoint's."""
        checkpoint.check_fits(self.checkpoint, layout, self.dtype)
        theta: Array = aligned((layout.size,), self.dtype)
        checkpoint.load_theta(self.checkpoint, layout, theta)
        return theta
