"""Train a language model over all ranks: mpirun -n N python -m dllm.train."""

from __future__ import annotations

import os
import signal
import sys
import time
from typing import TYPE_CHECKING, Any

from . import cli, config
from .comm import runtime
from .comm.messages import broadcast
from .comm.node_info import find_node, leader_first
from .errors import DONE, NOT_SAVED, STOPPED_EARLY, reason

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable

    from mpi4py import MPI

    from .data.corpus import Corpus
    from .inference.loaded_model import LoadedModel
    from .runs.checkpoint import Checkpoint
    from .runs.ownership import Ownership
    from .training.trainer import Trainer


def main(argv: list[str] | None = None) -> int:
    """The command. Returns its exit code."""
    stopping: list[bool] = []
    signal.signal(signal.SIGUSR1, lambda *_: stopping.append(True))  # before long imports: a starting rank must not die
    return cli.collective(lambda argv, comm: train(argv, comm, stopping), argv)


def train(argv: list[str], comm: MPI.Comm, stopping: list[bool]) -> int:
    """Train by the options `argv`, until `stopping` is not empty on any rank. Collective. Returns the exit code."""
    from .files import storage
    from .inference import model_folder
    from .inference.loaded_model import open_parent
    from .runs.gathering import gather_run
    from .training.options import of_corpus, parent_of, print_settings, said_by_user, train_config, train_options
    from .training.progress import Reporter

    begin = time.monotonic()
    with runtime.together(comm):
        options = train_options(argv, comm.rank)
        origin = parent_of(options)
    reporter = Reporter(comm.rank == 0, options.progress)
    gathered, parent = False, None
    if options.resume and not options.settings:
        runtime.check_same(comm, {"--resume": options.resume})
        gathered = gather_run(comm, options.resume, reporter.warn, best=False)
    elif origin:
        parent = open_parent(comm, origin, reporter.warn)
    with runtime.together(comm):
        configuration = train_config(options, model_folder.shape_for(parent.config if parent else None))
    if options.settings:
        print_settings(configuration, comm.rank)
        return DONE
    if configuration.data.private or (parent and config.is_private(parent.data or "")):
        storage.owner_only()  # states of lanes and a model say much about a text
    reporter.tensorboard = configuration.log.tensorboard
    node = find_node(comm, configuration.train.threads)

    from .data.corpus import open_corpus
    from .model import blocks
    from .runs import marks, run_folder
    from .training import announcements, recovery, trace
    from .training.setup import set_up
    from .training.trainer import Trainer
    from .training.warmup import AT_ONCE, code_hash, warm_up

    facts = {"code": code_hash(), "--resume": options.resume, "--max-steps": options.max_steps, "--trace": options.trace}
    runtime.check_same(comm, facts | config.flat(configuration))  # before anything communicates by them
    ownership, resume = _open_folder(comm, options, reporter.warn, gathered)
    run = ownership.run
    corpus = open_corpus(comm, node, configuration.data.path, reporter.say, configuration.storage)
    configuration = runtime.agree(comm, of_corpus, configuration, corpus, said_by_user(options))
    reporter.units = blocks.units(configuration.model)
    runtime.agree(comm, _check_fits, corpus, resume, run, parent, origin)
    compiling = time.monotonic()
    with leader_first(node, AT_ONCE):
        warm_up(configuration, node.rank)
    compiling = time.monotonic() - compiling
    trainer = Trainer(set_up(comm, node, configuration, corpus, ownership, reporter, resume or parent))
    del parent  # whose parameters would stay in memory
    writes = trainer.rank.domains.leads
    with runtime.together(comm):  # only now: a refused command leaves nothing behind and changes nothing
        if writes:
            run_folder.create(run, configuration, corpus.tokenizer, new=resume is None)
            ownership.take()
    reporter.say(announcements.header(trainer, compiling, time.monotonic() - begin, resume is not None))
    reporter.begin(run, trainer.state.step, trainer.total_steps, writes)
    trace.install(trainer, options.trace)
    if writes:
        marks.not_done(run)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stopping.append(True))
    limits = options.max_steps, options.max_seconds
    trainer, done, summary = recovery.run(trainer, *limits, lambda: bool(stopping), options.progress)
    return _finish(trainer, done, summary)


def _check_fits(corpus: Corpus, resume: Checkpoint | None, run: str, parent: LoadedModel | None, origin: str) -> None:
    """Raise UserError where tokens and labels of a corpus are not those of what the run goes on from or begins with."""
    from .data.tokenizer_files import load_tokenizer

    if resume:
        corpus.check_vocabulary(resume.manifest["tokenizer"], run)
        corpus.check_labels(load_tokenizer(run).labels, run)
    if parent:
        corpus.check_vocabulary(parent.vocabulary, origin)
        if parent.tokenizer.labels:
            corpus.check_labels(parent.tokenizer.labels, origin)


def _open_folder(
    comm: MPI.Comm, options: argparse.Namespace, warn: Callable[[str], None], gathered: bool
) -> tuple[Ownership, Checkpoint | None]:
    """The right to write to the run's folder, not yet taken, and the checkpoint that the run goes on from. Collective.

    gathered : it was said already which checkpoints were passed over
    """
    from .runs import checkpoint, run_folder
    from .runs.ownership import Ownership

    with runtime.together(comm):
        run = options.resume or (run_folder.claim(options.out, options.preset or "default") if comm.rank == 0 else "")
        resume, warnings = checkpoint.intact(options.resume) if options.resume else (None, [])
    ownership = broadcast(comm, Ownership.of_this_job(run), Ownership)
    if not options.resume:
        runtime.agree(comm, run_folder.check_new, ownership.run)
    for warning in () if gathered else warnings:
        warn(warning)
    return ownership, resume


def _finish(trainer: Trainer, done: bool, summary: dict[str, Any]) -> int:
    """What is left to write and to say. Returns the exit code."""
    from .runs import marks
    from .training import announcements

    comm, reporter, ownership = trainer.comm, trainer.rank.reporter, trainer.rank.ownership
    trainer.close()
    reporter.end()
    saver, writes = trainer.rank.saver, trainer.rank.domains.leads
    if trainer.taken or not os.path.exists(os.path.join(ownership.run, "summary.json")):
        reporter.summarise(summary, writes)
    code = NOT_SAVED if not saver.whole else DONE if done else STOPPED_EARLY
    if writes and code == DONE and ownership.is_held():  # before anything is told: telling may fail
        try:
            marks.done(ownership.run, summary["steps"])
        except OSError as error:
            reporter.warn(f"cannot write {ownership.run}/DONE: {reason(error)}; a launcher will not know that the run is done")
    if not saver.whole:
        reporter.warn(announcements.not_saved(trainer))
    elif reporter.mode != "none":
        announcements.farewell(trainer, summary, done)
    runtime.finish(comm, code if trainer.deaths else None)
    return code


if __name__ == "__main__":
    sys.exit(main())
