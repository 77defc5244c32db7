"""One job writes to a run's folder: the last that took it. One that was cut off and thought dead learns of it here."""

from __future__ import annotations

import contextlib
import os
import pathlib
import tempfile
import time
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


class Pulse:
    """How long the job that owns the folder `run` has been silent, by no clock but this process's own.

    The clock of a file server may be behind or ahead. So what counts is that a file's time changes, and at the first look
    how much older it is than a file that is made beside it now.
    """

    def __init__(self, run: Path) -> None:
        self._run, self._seen, self._at = pathlib.Path(run), 0, 0.0

    def silent(self) -> float | None:
        """Seconds since it last showed that it is alive; None where no job owns the folder, or nobody can tell now."""
        now = time.monotonic()
        try:
            found = (self._run / FILE).stat().st_mtime_ns
            if found != self._seen:
                self._at = now if self._seen else now - self._age(found)
                self._seen = found
        except OSError:
            return None
        return now - self._at

    def _age(self, changed: int) -> float:
        """Seconds by the clock of the folder's disk, or by this machine's where nothing can be made there."""
        now = time.time_ns()
        with contextlib.suppress(OSError), tempfile.TemporaryFile(dir=self._run, prefix=".", suffix=".tmp") as file:
            now = os.fstat(file.fileno()).st_mtime_ns
        return max(0.0, (now - changed) / 1e9)


def owner(run: Path) -> str | None:
    """The token of the job that took the folder last; None where nobody has."""
    try:
        return storage.read_text(pathlib.Path(run, FILE))
    except UserError:
        return None
