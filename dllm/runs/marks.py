"""Small files by which a job, its launcher and its user tell each other something: DONE, resize. Cheap to import."""

from __future__ import annotations

import pathlib

from ..errors import UserError
from ..files import storage
from ..files.storage import Path

DONE = "DONE"
RESIZE = "resize"
MOST_RANKS = 1 << 20  # that anybody can want


def done(run: Path, step: int) -> None:
    """Mark a run as finished: the one thing that a supervisor believes, since mpirun's exit code may be anything."""
    storage.write_text(pathlib.Path(run, DONE), f"{step}\n")


def is_done(run: Path) -> bool:
    """Whether the run has come to its end."""
    return pathlib.Path(run, DONE).exists()


def not_done(run: Path) -> None:
    """Take the mark away: the run goes on."""
    pathlib.Path(run, DONE).unlink(missing_ok=True)


def request_resize(run: Path, ranks: int) -> pathlib.Path:
    """Ask the launcher of a run to go on with another number of ranks. Returns the file, which is gone once it was taken in."""
    path = pathlib.Path(run, RESIZE)
    storage.write_text(path, f"{ranks}\n")
    return path


def resize_request(run: Path) -> int | None:
    """The number of ranks that somebody wants; None where nobody does."""
    try:
        wanted = int(storage.read_text(pathlib.Path(run, RESIZE)))
    except (UserError, ValueError):
        return None
    return wanted if 0 < wanted <= MOST_RANKS else None


def take_resize_request(run: Path) -> int | None:
    """The same, once."""
    wanted = resize_request(run)
    if wanted is not None:
        try:
            pathlib.Path(run, RESIZE).unlink()
        except OSError:
            return None
    return wanted
