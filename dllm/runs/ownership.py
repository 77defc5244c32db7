"""One job writes to a run's folder: the last that took it. One that was cut off and thought dead learns of it here."""

from __future__ import annotations

import contextlib
import os
import pathlib
import uuid
from dataclasses import dataclass

from ..errors import UserError
from ..files import storage
from ..files.storage import Path

JOB = "DLLM_JOB"  # the variable by which a launcher knows its processes
FILE = "owner"


@dataclass(frozen=True)
class Ownership:
    """The right of a job to write to the folder `run`, once it has taken it."""

    run: str
    token: str

    @classmethod
    def of_this_job(cls, run: Path) -> Ownership:
        """One rank makes it for all."""
        return cls(str(run), f"{os.environ.get(JOB, '')}.{uuid.uuid4().hex}")

    def take(self) -> None:
        """By one rank for each disk. Raises OSError."""
        storage.write_text(pathlib.Path(self.run, FILE), self.token)

    def is_held(self) -> bool:
        """Whether nobody else has taken the folder since."""
        return owner(self.run) == self.token

    def show_alive(self) -> None:
        """Tell whoever looks at the folder that the job is alive."""
        with contextlib.suppress(OSError):
            os.utime(pathlib.Path(self.run, FILE))


def last_alive(run: Path) -> float:
    """When the job that owns the folder last showed that it is alive, by time.time(); 0 where none does."""
    try:
        return pathlib.Path(run, FILE).stat().st_mtime
    except OSError:
        return 0.0


def owner(run: Path) -> str | None:
    """The token of the job that took the folder last; None where nobody has."""
    try:
        return storage.read_text(pathlib.Path(run, FILE))
    except UserError:
        return None
