"""A run through the death of ranks: those that are left find each other, share the lanes anew and go on.

This decides what follows from a death that can be survived in memory. A policy reads its settings from config.resilience. How
survivors find each other stands in comm/survivors.py, and which LSTM states they have in lane_copies.py. All other deaths
end the job, and launching/training_supervisor.py decides how it starts anew.

To add a policy: a field in ResilienceConfig of config/sections.py, and its decision in `_go_on` here, where GiveUp ends the
run, or in `take_lanes` of lane_copies.py. `set_up` of setup.py says which runs survive at all.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ..comm import runtime, survivors
from ..comm.node_info import find_node
from ..errors import BAD_INPUT, UserError
from .beginning import Survived
from .progress import Reporter
from .setup import set_up
from .trainer import Trainer

if TYPE_CHECKING:
    from mpi4py import MPI


def run(
    trainer: Trainer, max_steps: int, max_seconds: float, stop: Callable[[], bool], progress: str
) -> tuple[Trainer, bool, dict[str, Any]]:
    """Train through all deaths that can be survived. Collective.

    Parameters as in Trainer.run; progress : of Reporter. Returns the last Trainer, whether it came to its end, its summary.
    """
    while True:
        try:
            done = trainer.run(max_steps, max_seconds, stop)
            return trainer, done, trainer.summary()
        except survivors.Failure:
            if not trainer.rank.resilient:
                raise
            trainer = _go_on(trainer, progress)
        except UserError as error:
            if error.shared:  # then no rank is missing: what is under way has an end
                trainer.rank.upkeep.end()
                trainer.rank.saver.disks.end()
            trainer.rank.saver.abandon()
            if not trainer.deaths or not error.shared:
                raise
            trainer.rank.reporter.warn(str(error))
            runtime.finish(trainer.comm, BAD_INPUT)


def survive(trainer: Trainer) -> tuple[MPI.Comm, Survived, list[int]]:
    """After a failure: the survivors' communicator, what they go on with, and who died. Collective over the survivors.

    Raises survivors.GiveUp on all of them.
    """
    rank, comm = trainer.rank, trainer.comm
    writes = [*rank.saver.abandon(), *rank.upkeep.abandon()]
    rank.heartbeat.end()
    averaging, copies = trainer.averaging.under_way(), rank.copies.under_way()
    communicators = [*averaging[0], rank.node.comm, *copies[0]]
    requests = [*averaging[1], *copies[1], *writes]
    new, step, alive = survivors.shrink(comm, communicators, trainer.finished.step, requests, rank.node.pids)
    state = next(version for version in (trainer.state, trainer.spare) if version.step == step)
    lanes = rank.copies.pieces(state, rank.own_lanes.start, alive)
    dead = sorted(set(range(comm.size)) - set(alive))
    return new, Survived(state.theta, state.moments, state.scalars(), lanes, rank.metrics.clock, rank.saver), dead


def _go_on(trainer: Trainer, progress: str) -> Trainer:
    """The survivors' Trainer, at the last step that all of them had finished. Collective over the survivors."""
    begin, before = time.monotonic(), trainer.rank
    run = before.ownership.run
    before.reporter.end()
    try:
        while True:
            comm, survived, dead = survive(trainer)
            if comm.size < before.config.resilience.min_ranks:
                raise survivors.GiveUp(f"{comm.size} ranks are left, fewer than resilience.min_ranks")
            successor = None
            with survivors.watchdog(), contextlib.suppress(survivors.Failure):
                reporter = Reporter(comm.rank == 0, progress, before.reporter)
                node = find_node(comm, before.node.threads)
                made = set_up(comm, node, before.config, before.corpus, before.ownership, reporter, survived)
                successor = Trainer(made)
            if survivors.all_agree(comm, successor is not None) and successor is not None:
                break
            comm.Revoke()  # another death meanwhile: once more from where we were
    except survivors.GiveUp as problem:
        before.reporter.complain(f"rank {trainer.comm.rank}: {problem}; go on with --resume {run}")
        runtime.kill_self()
    except UserError as problem:  # such as text that only the dead rank had
        if comm.rank == 0:
            before.reporter.complain(str(problem))
        runtime.exit_now(BAD_INPUT)
    step = successor.state.step
    reporter.begin(run, step, successor.total_steps, successor.rank.domains.leads)
    ranks = f"rank{'s' if len(dead) > 1 else ''} {', '.join(map(str, dead))} of {trainer.comm.size} died"
    reporter.warn(f"{ranks}; {comm.size} go on from step {step}, {time.monotonic() - begin:.2f} s later")
    successor.deaths, successor.taken = trainer.deaths + len(dead), trainer.taken
    return successor
