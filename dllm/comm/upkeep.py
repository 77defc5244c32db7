"""Copies that a disk should have and does not: found by a thread while training goes on, and made anew between steps.

A disk may come back empty, a file may rot, and a death takes copies with it. So whenever a run starts, or goes on after a
death, every disk is looked through once.
"""

from __future__ import annotations

import os
import pathlib
import threading
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

from ..errors import printable
from .messages import allgather
from .replicas import Domains, File, Move, is_sound, plan
from .transfers import GONE, SHARE, UPKEEP, Transfer, failures

if TYPE_CHECKING:
    from mpi4py import MPI


class Kept(NamedTuple):
    """Files that are kept on several disks."""

    domains: Domains  # of the folder
    folder: pathlib.Path  # on each disk
    files: Sequence[File]  # the same on all ranks
    copies: Sequence[int]  # of each file: disks that shall have it at least


class Upkeep:
    """Looks after some folders, once. Every rank has one and calls the same methods at the same steps.

    Parameters
    ----------
    comm : MPI.Comm
    kept : sequence of Kept
        As many on every rank, in the same order.
    say : callable
        Told a line on what is damaged, or cannot be copied, by all ranks alike.
    """

    def __init__(self, comm: MPI.Comm, kept: Sequence[Kept], say: Callable[[str], None]) -> None:
        self.comm, self.say = comm, say
        self.kept = [files for files in kept if files.domains.writable and not files.domains.shared]
        self._ended = threading.Event()
        self._number = 0  # of the folder that is looked after
        self._have, self._damaged = set[str](), list[str]()
        self._thread: threading.Thread | None = None
        self._moves: list[Move] = []
        self._transfer: Transfer | None = None
        self._look()

    @property
    def under_way(self) -> bool:
        """Whether there is something left to look after; the same on all ranks."""
        return self._number < len(self.kept)

    @property
    def busy(self) -> bool:
        """Whether this rank is not ready to settle."""
        moving = self._transfer is not None and not self._transfer.done
        return moving or (self._thread is not None and self._thread.is_alive())

    def progress(self, seconds: float) -> None:
        """Go on between two steps, of which the last took so many seconds."""
        if self._transfer is not None and not self._transfer.done:
            self._transfer.progress(seconds)

    def settle(self) -> None:
        """What all ranks do once none of them is busy. Collective."""
        if self._transfer is None:
            self._begin_moves()
        else:
            self._end_moves()

    def end(self) -> None:
        """The run ends: what is under way is finished, the rest is left to the next start. All ranks call it."""
        self._ended.set()
        if self._transfer is not None:
            self._transfer.cut_short()
        self._transfer, self._number = None, len(self.kept)

    def abandon(self) -> list[MPI.Request]:
        """Ranks have died. Returns requests in which others may still wait."""
        self._ended.set()
        transfer, self._transfer, self._number = self._transfer, None, len(self.kept)
        return transfer.under_way() if transfer else []

    def _look(self) -> None:
        """Begin with the next kept."""
        self._have, self._damaged, self._transfer = set(), [], None
        if self.under_way and self.kept[self._number].domains.leads:
            self._thread = threading.Thread(target=self._read, args=(self.kept[self._number],), daemon=True)
            self._thread.start()

    def _read(self, kept: Kept) -> None:
        """By a thread, for a small part of the time: which files are sound on this disk."""
        for file in kept.files:
            if self._ended.is_set():
                return
            sound = is_sound(kept.folder, file, self._rest())
            if sound:
                self._have.add(file.name)
            elif sound is False:
                self._damaged.append(file.name)

    def _rest(self) -> Callable[[], None]:
        """What to call after each piece that was read, so that reading takes no more than its share."""
        spent = time.thread_time()

        def rest() -> None:
            nonlocal spent
            self._ended.wait((time.thread_time() - spent) * (1 / SHARE - 1))
            spent = time.thread_time()

        return rest

    def _begin_moves(self) -> None:
        kept = self.kept[self._number]
        there = [name for name in sorted(self._have) if os.path.exists(kept.folder / name)]  # a checkpoint may be gone by now
        told = allgather(self.comm, (there, self._damaged), tuple[list[str], list[str]])
        have = [set(names) for names, _ in told]
        want = [names | set(damaged) for names, (_, damaged) in zip(_wanted(kept, have), told, strict=True)]
        self._moves, gone = plan(kept.files, have, want)
        lost = {file.name for file in gone}
        for rank, (_, damaged) in enumerate(told):
            for name in damaged:
                where = f"{printable(str(kept.folder / name))} on {printable(kept.domains.hosts[rank])}"
                self.say(f"{where} is damaged; " + ("nobody here has another copy" if name in lost else "it is made anew"))
        self._transfer = Transfer(self.comm, kept.folder, self._moves, UPKEEP)

    def _end_moves(self) -> None:
        kept, transfer = self.kept[self._number], self._transfer
        for move, why in failures(self.comm, self._moves, transfer):
            if why == GONE:  # since nobody needs it any more
                continue
            self.say(f"no copy of {move.file.name} on {printable(kept.domains.hosts[move.target])}: {why}")
        self._number += 1
        self._look()


def _wanted(kept: Kept, have: Sequence[set[str]]) -> list[set[str]]:
    """By rank, names of files of which a disk shall make a copy; have: by rank, those that are sound there."""
    want = [set[str]() for _ in have]
    for file, copies in zip(kept.files, kept.copies, strict=True):
        there = sum(file.name in names for names in have)
        others = [leader for leader in kept.domains.holders(file.name, len(have)) if file.name not in have[leader]]
        for leader in others[: max(0, copies - there)]:
            want[leader].add(file.name)
    return want
