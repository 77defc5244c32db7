"""Checkpoints are written while training goes on: a copy of this rank's slice is taken, a thread writes and verifies it.

    begin    all ranks, at the same step: the copy, a few per cent of a step
    ...      each rank's thread writes its file in small pieces, with rests between them; steps go on
    settle   all ranks, at the same step, when nobody writes any more: the files go to further disks, a piece between two steps
    settle   when they are there: a thread for each disk writes the manifest
    settle   when that is there: now the checkpoint counts, and the threads remove older ones
    settle   once more, when they are gone

Where all ranks see one disk, or one copy is enough, the second stage is left out. The threads never call MPI; who is still busy
travels with the control values of a step (comm/control.py).
"""

from __future__ import annotations

import itertools
import math
import shutil
import sys
import threading
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from ..comm.messages import allgather
from ..comm.replicas import Domains
from ..config import CheckpointConfig, Config
from ..errors import reason
from ..files import hdf5, storage
from ..kernels.types import Array
from ..model.layout import Layout
from . import checkpoint
from .ownership import Ownership
from .slice_copies import SliceCopies, Written
from .state import State

if TYPE_CHECKING:
    from mpi4py import MPI

Cut = tuple[str, int, Array]  # of Layout.cut
BUSY = 0.05  # the part of its rank's time that a thread takes at most
SWITCH = 0.0005  # seconds in which Python's threads take turns while one writes; the default is ten times that
PATIENCE = 5.0  # seconds that a disk gets when ranks have died
SHORTEST, LONGEST = 30.0, 1800.0  # seconds between checkpoints where the interval is chosen here


class Saver:
    """Saves the states of a run. Collective: every rank has one and calls the same methods at the same steps.

    Parameters
    ----------
    comm : MPI.Comm
    ownership : Ownership
        On the run's folder.
    domains : Domains
        Of the run's folder.
    layout : Layout
    facts : dict
        What a manifest says of all checkpoints of the run: checkpoint.facts.
    config : Config
    warn : callable
        Takes a line for the user.
    before : Saver, optional
        Of the same run with more ranks, which was abandoned.

    Attributes
    ----------
    under_way : bool
        Whether a checkpoint is; the same on all ranks.
    step, whole : int, bool
        Of the newest one, which becomes whole in the end unless something goes wrong; -1, True: there was none.
    problem : str or None
        Why it did not.
    begun : float
        When that was, by time.monotonic; at first when this was made.
    count, stalled : int, float
        How many were begun while training went on, and the seconds that it stood still for them.
    cost : float or None
        Seconds of computing that the last one took the slowest rank.
    on_stage : list of callable
        Of the class: each is called in the writing thread, with this and "begin", "piece" or "end" of a rank's file.
    """

    on_stage: ClassVar[list[Callable[[Saver, str], None]]] = []

    def __init__(
        self, comm: MPI.Comm, ownership: Ownership, domains: Domains, layout: Layout, facts: dict[str, Any], config: Config,
        warn: Callable[[str], None], before: Saver | None = None,
    ) -> None:  # fmt: skip
        self.comm, self.ownership, self.domains, self.layout, self.warn = comm, ownership, domains, layout, warn
        self.config, self.disks = config.checkpoint, SliceCopies(comm, domains, ownership.run, config.storage.copies)
        self.stays_here = config.data.private and not domains.shared  # what a rank alone has: a copy would tell of its text
        self.facts = {**facts, "ranks": comm.size}
        self.part = checkpoint.Part.of(comm.rank, comm.size, layout.parameters, facts["lanes"])
        self.step, self.whole, self.under_way = -1, True, False
        self.begun, self.count, self.stalled, self.cost = time.monotonic(), 0, 0.0, None
        if before is not None:
            self.begun = -math.inf if before.under_way else before.begun
            self.count, self.stalled, self.cost = before.count, before.stalled, before.cost
        self.thread: threading.Thread | None = None
        self.copies: list[list[Cut]] | None = None
        self.problem: str | None = None
        self.told = ""  # the last warning
        self.result: Any = None
        self.hurry, self.abandoned = threading.Event(), False

    @property
    def writing(self) -> bool:
        """Whether this rank is not ready to settle."""
        return self.disks.busy or (self.thread is not None and self.thread.is_alive())

    def due(self) -> bool:
        """Whether the time has come for the next one."""
        return 0 < self.interval() <= time.monotonic() - self.begun

    def interval(self) -> float:
        """Seconds from one checkpoint to the next; 0: none by time."""
        return _interval(self.config, 1.0 if self.cost is None else self.cost, self.comm.size)

    def begin(self, state: State, best: bool, own: Mapping[str, Array]) -> None:
        """Begin to save `state`, whose validation loss is the best so far or not; it may change as soon as this returns.

        own : dict
            name -> vector that only this rank has; the same names on all ranks.
        """
        begin = time.perf_counter()
        if self.under_way:
            self.complete()
        cuts = self._cuts(state)
        if self.copies is None:
            self.copies = [[(name, row, block.copy()) for name, row, block in some] for some in cuts]
        else:
            for (_, _, copy), (_, _, block) in zip(itertools.chain(*self.copies), itertools.chain(*cuts), strict=True):
                copy[...] = block
        own = {name: vector.copy() for name, vector in own.items()}
        self._start(state, best, self.copies, (state.h.copy(), state.c.copy(), state.lane_loss.copy()), own)
        self.count += 1
        self.stalled += time.perf_counter() - begin

    def save(self, state: State, best: bool, own: Mapping[str, Array]) -> None:
        """Save `state` before anything else happens. Nothing is copied."""
        if self.under_way:
            self.complete()
        self._start(state, best, self._cuts(state), (state.h, state.c, state.lane_loss), own)
        self.complete()

    def complete(self) -> None:
        """Wait until what is under way is whole, or cannot be."""
        self.hurry.set()
        while self.under_way:
            if self.thread is not None:
                self.thread.join()
            self.disks.finish()
            self.settle()

    def progress(self, seconds: float) -> None:
        """What is to be done between two steps, of which the last took so many seconds."""
        self.disks.progress(seconds)

    def settle(self) -> None:
        """What all ranks do once none of them is writing any more."""
        self.next()

    def abandon(self) -> list[MPI.Request]:
        """Leave what is under way unfinished: ranks have died. No communication. Returns requests in which others may wait."""
        self.abandoned = True
        self.hurry.set()
        if self.thread is not None:
            self.thread.join(PATIENCE)
        return self.disks.abandon()

    def _cuts(self, state: State) -> list[list[Cut]]:
        start, stop = self.part.slice.start, self.part.slice.stop
        return [self.layout.cut(vector, start, stop) for vector in (state.theta, *state.moments)]

    def _start(
        self, state: State, best: bool, cuts: list[list[Cut]], lanes: tuple[Array, ...], own: Mapping[str, Array]
    ) -> None:
        start, stop = self.part.slice.start, self.part.slice.stop
        names = ["theta", *(f"moment.{number}" for number in range(len(state.moments)))]
        arrays: dict[str, Any] = {
            name: hdf5.Stream(stop - start, state.theta.dtype, self.layout.parts(some, start, stop))
            for name, some in zip(names, cuts, strict=True)
        }
        if self.stays_here:
            lanes, own = tuple(map(np.zeros_like, lanes)), {}
        arrays |= dict(zip(("h", "c", "lane_loss"), lanes, strict=True))
        arrays |= {f"{checkpoint.OWN}{name}": vector for name, vector in own.items()}
        self.manifest = self.facts | {
            "dtype": state.theta.dtype.name, "moments": len(state.moments), "best": bool(best), "layers": state.h.shape[0],
            "hidden": state.h.shape[2], "scalars": state.scalars(), "own": [*self.facts["own"], *sorted(own)],
            "states": not self.stays_here,
        }  # fmt: skip
        if self.stays_here:  # they count what lane_loss adds up
            self.manifest["scalars"] |= {"tokens": 0, "bytes_sent": 0}
        self.step, self.whole, self.under_way, self.begun = state.step, True, True, time.monotonic()
        self.folder = checkpoint.folder_of(self.ownership.run, state.step)
        self.next = self._all_have_written
        self._in_background(self._write, arrays)

    def _in_background(self, work: Callable[..., Any], *arguments: Any) -> None:
        self.problem, self.result, self.hurry = None, None, threading.Event()
        self.thread = threading.Thread(target=self._work, args=(work, *arguments), daemon=True)
        self.thread.start()

    def _work(self, work: Callable[..., Any], *arguments: Any) -> None:
        interval, self.spent = sys.getswitchinterval(), time.thread_time()
        sys.setswitchinterval(SWITCH)
        try:
            self.result = work(*arguments)
        except OSError as error:
            self.problem = reason(error)
        except Exception as error:  # of HDF5: any; it must not go unnoticed in a thread
            self.problem = f"{type(error).__name__}: {error}"
        finally:
            sys.setswitchinterval(interval)

    def _rest(self) -> None:
        """After a piece of work, so that the thread takes no more than its share."""
        self._reach("piece")
        if self.abandoned:
            raise OSError("abandoned")
        now = time.thread_time()
        self.hurry.wait((now - self.spent) * (1 / BUSY - 1))
        self.spent = time.thread_time()

    def _write(self, arrays: dict[str, Any]) -> Written:
        """This rank's file."""
        begin = time.thread_time()
        self._reach("begin")
        if self.folder.is_symlink():
            raise OSError(f"{self.folder} is a link to another folder")
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / self.part.name
        digest = hdf5.write_arrays(path, arrays, self._rest)
        self._reach("end")
        return Written(digest, path.stat().st_size, time.thread_time() - begin)

    def _reach(self, stage: str) -> None:
        for hook in self.on_stage:
            hook(self, stage)

    def _all_have_written(self) -> None:
        everyone = allgather(self.comm, (self.problem, self.result), tuple[str | None, Written | None])
        self.problem = next((problem for problem, _ in everyone if problem), None)
        if self.problem:
            self._end()
            return
        slices = [written for _, written in everyone if written]
        self.cost, self.manifest["sha256"] = max(one.seconds for one in slices), [one.sha256 for one in slices]
        if self.disks.wanted:
            self.thread, self.next = None, self._copies_are_there
            self.disks.begin(self.folder, slices)
        else:
            self._begin_manifest()

    def _copies_are_there(self) -> None:
        for problem in self.disks.problems():
            self.warn(problem)
        self._begin_manifest()

    def _begin_manifest(self) -> None:
        self.next = self._manifest_is_there
        self._in_background(self._write_manifest if self.domains.leads else lambda: None)

    def _write_manifest(self) -> None:
        """By a rank for each disk: where all have written it, the checkpoint counts."""
        if not self.ownership.is_held():
            raise OSError("another job has taken over the run")
        self.manifest["seal"] = checkpoint.seal(self.manifest)
        storage.write_json(self.folder / checkpoint.MANIFEST, self.manifest)

    def _manifest_is_there(self) -> None:
        self.problem = next(filter(None, allgather(self.comm, self.problem, str | None)), None)
        if self.problem or not self.whole:
            self._end()
            return
        self.next = self._older_are_gone  # only now may they go
        prune = checkpoint.prune, self.ownership.run, self.config.keep, self.step
        self._in_background(*(prune if self.domains.leads else (lambda: None,)))

    def _older_are_gone(self) -> None:
        problems = allgather(self.comm, self.problem, str | None)  # before anybody begins with the next one
        if problem := next(filter(None, problems), None):
            self.warn(f"older checkpoints could not all be removed: {problem}")
        self.problem = None  # what was written is whole
        self._end()

    def _end(self) -> None:
        self.under_way, self.whole = False, not self.problem
        if self.problem:
            if self.domains.leads:
                shutil.rmtree(self.folder, ignore_errors=True)
            told, self.told = self.told, f"no checkpoint at step {self.step}: {self.problem}; older ones stay"
            if told != self.told:  # once, however often it is tried
                self.warn(self.told)


def _interval(config: CheckpointConfig, cost: float, ranks: int) -> float:
    """As Saver.interval. Where it is left to us, sqrt(2 x cost x mean time between failures), Young 1974."""
    if config.every_minutes >= 0:
        return config.every_minutes * 60
    best = math.sqrt(2 * cost * config.mtbf_hours * 3600 / ranks)
    return min(max(best, SHORTEST, 2 * cost / BUSY), LONGEST)
