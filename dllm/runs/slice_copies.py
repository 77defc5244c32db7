"""Copies of a checkpoint's slices on other disks, so that no disk that is lost takes a slice with it."""

from __future__ import annotations

import math
import pathlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from ..comm.replicas import Domains, File, Move
from ..comm.transfers import CHECKPOINTS, Transfer, failures
from ..errors import printable
from .checkpoint import Part

if TYPE_CHECKING:
    from mpi4py import MPI


class Written(NamedTuple):
    """A slice on the disk of the rank that made it."""

    sha256: str
    size: int  # bytes
    seconds: float  # of computing that it took


class SliceCopies:
    """The copies of one checkpoint after the other. Every rank has one and calls the same methods at the same steps.

    Parameters
    ----------
    comm : MPI.Comm
    domains : Domains
        Of the run's folder.
    run : path
    copies : int
        Disks that shall have each slice, that of the rank which made it included.
    """

    def __init__(self, comm: MPI.Comm, domains: Domains, run: str, copies: int) -> None:
        self.comm, self.domains, self.run, self.copies = comm, domains, run, copies
        self._moves: list[Move] = []
        self._transfer: Transfer | None = None

    @property
    def wanted(self) -> bool:
        """Whether there is another disk, and copies are asked for."""
        return self.copies > 1 and not self.domains.shared

    @property
    def busy(self) -> bool:
        """Whether this rank still sends or gets some."""
        return self._transfer is not None and not self._transfer.done

    def begin(self, folder: pathlib.Path, slices: Sequence[Written]) -> None:
        """Start to copy the slices of all ranks of the checkpoint `folder`, the same list on all ranks."""
        self._moves = []
        for rank, one in enumerate(slices):
            name = str((folder / Part.of(rank, self.comm.size, 0, 0).name).relative_to(self.run))
            home, there = self.domains.of[rank], self.domains.holders(name, len(slices))
            targets = [leader for leader in there if leader != home][: self.copies - 1]
            self._moves += [Move(File(name, one.sha256, one.size), rank, target) for target in targets]
        self._transfer = Transfer(self.comm, self.run, self._moves, CHECKPOINTS)

    def progress(self, seconds: float = math.inf) -> None:
        """Go on between two steps, of which the last took so many seconds."""
        if self._transfer is not None and self.busy:
            self._transfer.progress(seconds)

    def finish(self) -> None:
        """Go on until this rank has no more to do."""
        if self._transfer is not None:
            self._transfer.run()

    def problems(self) -> list[str]:
        """What went wrong at any rank, a line each, the same on all ranks. Collective, once nobody is busy."""
        transfer, self._transfer = self._transfer, None
        failed = failures(self.comm, self._moves, transfer)
        return [f"no copy of {m.file.name} on {printable(self.domains.hosts[m.target])}: {why}" for m, why in failed]

    def end(self) -> None:
        """The run ends before the copies are there; all ranks call it."""
        transfer, self._transfer = self._transfer, None
        if transfer is not None:
            transfer.cut_short()

    def abandon(self) -> list[MPI.Request]:
        """Ranks have died. Returns requests in which others may still wait."""
        transfer, self._transfer = self._transfer, None
        return transfer.under_way() if transfer else []
