"""What a run is made of on one rank: lanes, model, optimiser, averaging, and what watches over them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from threadpoolctl import threadpool_limits

from ..comm import methods
from ..comm.averaging import Averaging
from ..comm.heartbeat import Heartbeat, SharedHeartbeat
from ..comm.node_info import NodeInfo
from ..comm.replicas import Domains
from ..comm.runtime import agree, check_same, survivable, together
from ..comm.shared_memory import SharedMemory, share
from ..comm.upkeep import Kept, Upkeep
from ..config import Config
from ..data.corpus import Corpus
from ..data.lane_kinds import lane_files, read_lanes
from ..data.lanes import Lanes, Schedule, deal
from ..data.placing import kept_shards
from ..data.supply import supply
from ..errors import UserError
from ..inference.evaluation import Evaluation
from ..kernels.gemm import aligned
from ..kernels.processor import VECTOR
from ..kernels.team import Team
from ..kernels.types import Array
from ..model.base import Learning, Model
from ..model.kinds import make_model
from ..model.layout import Layout
from ..model.precision import DTYPES, described, uses_bf16
from ..runs import checkpoint
from ..runs.checkpoint import Checkpoint
from ..runs.checkpoint_writer import Saver
from ..runs.gathering import kept_checkpoints
from ..runs.ownership import Ownership
from ..runs.state import State, parameters_hash
from . import optim
from .beginning import Origin, Survived, Where, fill, where
from .lane_copies import LaneCopies, SentLaneCopies, take_lanes
from .metrics import Clock, Metrics
from .progress import Reporter
from .validation import SplitValidation, Validation

if TYPE_CHECKING:
    from mpi4py import MPI


@dataclass
class Rank:
    """A run on one rank: what stays the same as long as no rank dies.

    Attributes
    ----------
    comm, node : MPI.Comm, NodeInfo
    domains : Domains
        Of the run's folder: which ranks write for their disks.
    own_lanes : range
        This rank's lanes.
    lanes, schedule : Lanes, Schedule
        Their text, and what every rank knows of all lanes.
    state, spare : State
        A step reads one and writes the other; they are the same where a death cannot be survived in memory.
    resilient : bool
        It can be.
    """

    comm: MPI.Comm
    node: NodeInfo
    domains: Domains
    config: Config
    corpus: Corpus
    ownership: Ownership
    reporter: Reporter
    own_lanes: range
    lanes: Lanes
    schedule: Schedule
    layout: Layout
    model: Model
    optimizer: optim.Optimizer
    state: State
    spare: State
    resilient: bool
    averaging: Averaging
    copies: LaneCopies
    heartbeat: Heartbeat
    validation: Validation
    saver: Saver
    upkeep: Upkeep
    metrics: Metrics


def set_up(
    comm: MPI.Comm,
    node: NodeInfo,
    config: Config,
    corpus: Corpus,
    ownership: Ownership,
    reporter: Reporter,
    origin: Origin = None,
) -> Rank:
    """Make all that a rank needs for a run. Collective.

    Parameters
    ----------
    comm : MPI.Comm
    node : NodeInfo
    config : Config
    corpus : Corpus
        This rank's own where config.data.private.
    ownership : Ownership
        On the run's folder, before it is taken.
    reporter : Reporter
    origin : Checkpoint, Survived or LoadedModel, optional
        What the run goes on from, or goes on with on fewer ranks; or whose parameters are the beginning of a new one.

    Raises UserError on all ranks.
    """
    resume = origin if isinstance(origin, Checkpoint) else None
    survived = origin if isinstance(origin, Survived) else None
    begin = where(comm, corpus, config.train.seed, origin)
    own, lanes, schedule = _deal_lanes(comm, config, corpus, reporter, begin)
    layout = Layout(config.model, corpus.vocabulary, DTYPES[config.train.precision])
    plain = methods.is_plain(config)
    resilient = survivable(comm) and not config.data.private and plain
    memory = share(comm, node.comm, layout.size if plain else 1, layout.dtype)
    with together(comm):
        team = Team(node.threads)
        threadpool_limits(node.threads, "blas")  # more than there are cores stand in each other's way
        model = _make_model(config, layout, len(own), team, memory if plain else None)
        optimizer = optim.make_optimizer(config.train, layout.table, team)
        state = _make_state(layout, len(own), optimizer.moments, survived)
        model.bind(state.theta)
        fill(state, model, own, schedule, config, begin.texts[-1], origin, reporter.warn)
    if survived is not None:
        take_lanes(comm, survived.lanes, state, own, config, reporter.warn)
    copies = SentLaneCopies(comm, config, layout) if resilient else LaneCopies()
    copies.send(state.step, state.h, state.c, state.lane_loss)
    copies.complete()
    _check_ranks_agree(comm, config, corpus, state)
    averaging = methods.make_averaging(
        config, comm, node, memory=memory, theta=state.theta, gradient=model.gradient, layout=layout
    )
    averaging.step = state.step
    made_by = methods.made_by(config.averaging, node)
    if resume is not None:
        _take_own(comm, resume, averaging.own_arrays(state), made_by, config, reporter)
    clock, before = (survived.clock, survived.saver) if survived else (Clock(), None)
    domains = Domains.find(comm, ownership.run)
    metrics = Metrics(comm, node.oversubscribed, averaging, clock, reporter, ownership, domains)
    validation, evaluation = Validation(), _make_evaluation(comm, config, corpus, team, reporter)
    if evaluation is not None:
        validation = SplitValidation(evaluation, averaging, config.train, reporter, metrics.show_alive, state.best_loss)
    facts = checkpoint.facts(layout, config.train.lanes, corpus.tokenizer_hash, begin.texts, made_by)
    saver = Saver(comm, ownership, domains, layout, facts, config, reporter.warn, before)
    saver.step = state.step if resume else -1
    upkeep = Upkeep(comm, _kept(comm, config, corpus, domains, ownership.run if resume or survived else None), reporter.warn)
    return Rank(
        comm, node, domains, config, corpus, ownership, reporter, own, lanes, schedule, layout, model, optimizer, state,
        state.empty_like() if resilient else state, resilient, averaging, copies,
        _make_heartbeat(config, node, memory, reporter), validation, saver, upkeep, metrics,
    )  # fmt: skip


def _kept(comm: MPI.Comm, config: Config, corpus: Corpus, domains: Domains, run: str | None) -> list[Kept]:
    """What has copies on several disks. run, domains : its folder, None: it is new; which ranks see the disk"""
    copies, found = config.storage.copies, list[Kept]()
    if copies and run is not None and not domains.shared and not config.data.private:
        found.append(kept_checkpoints(comm, domains, run, copies))
    if copies and not corpus.private and corpus.store is None:
        found.append(kept_shards(corpus.folder, corpus.manifest, Domains.find(comm, corpus.folder), copies))
    return found


def _make_heartbeat(config: Config, node: NodeInfo, memory: SharedMemory | None, reporter: Reporter) -> Heartbeat:
    if memory is None:
        return Heartbeat()
    return SharedHeartbeat(node, memory, config.resilience.deadline, reporter.complain)


def _make_evaluation(comm: MPI.Comm, config: Config, corpus: Corpus, team: Team, reporter: Reporter) -> Evaluation | None:
    if "valid" not in corpus.manifest["splits"]:
        return None
    dtype = DTYPES[config.train.precision]
    return Evaluation(comm, corpus, "valid", config, dtype, config.data.private, team, reporter.warn)


def _deal_lanes(
    comm: MPI.Comm, config: Config, corpus: Corpus, reporter: Reporter, begin: Where
) -> tuple[range, Lanes, Schedule]:
    """This rank's lanes, their text, and what every rank knows of all of them from where training goes on."""
    train = config.train
    if comm.size > train.lanes:
        raise UserError.of_all(
            f"{comm.size} ranks share train.lanes = {train.lanes}: start at most {train.lanes} ranks, "
            f"or --set train.lanes={comm.size} or more"
        )
    if corpus.content == "pairs" and config.model.kind == "lm" and train.carry != "window":
        raise UserError.of_all("pairs begin from zero states: --preset pairs, or --set train.carry=window")
    own = deal(train.lanes, comm.size, comm.rank)
    mine, of = (range(len(own)), len(own)) if config.data.private else (own, train.lanes)
    supply(comm, corpus, agree(comm, lane_files, corpus, "train", mine, of, config.model.kind), reporter.warn)
    lanes = agree(comm, read_lanes, corpus, "train", mine, of, train.window, own.start, config.model.kind)
    lanes.arrange(begin.order, begin.epoch)
    schedule = Schedule(lanes, train.last_window, comm, begin.place)
    if not schedule.per_epoch:
        raise UserError.of_all(f"the train split of {corpus.folder} has nothing that a model could say right or wrong")
    return own, lanes, schedule


def _make_model(config: Config, layout: Layout, lanes: int, team: Team, memory: SharedMemory | None) -> Model:
    """memory : where the gradient lies, if the ranks of a node add theirs up there."""
    train = config.train
    learning = Learning(train.smoothing, train.unfreeze)
    model = make_model(layout, train.window, lanes, bf16=uses_bf16(train.precision), team=team, learning=learning)
    if memory is not None:
        model.bind_gradient(memory.mine)
    return model


def _make_state(layout: Layout, lanes: int, moments: int, survived: Survived | None) -> State:
    shape = layout.carried, lanes, layout.config.hidden
    states = np.zeros(shape, layout.dtype), np.zeros(shape, layout.dtype), np.zeros(lanes)
    if survived is not None:
        state = State(survived.theta, survived.moments, *states)
        state.set_scalars(survived.scalars)
        return state
    theta, *rest = (aligned((layout.size,), layout.dtype) for _ in range(1 + moments))
    return State(theta, rest, *states)


def _check_ranks_agree(comm: MPI.Comm, config: Config, corpus: Corpus, state: State) -> None:
    facts = {"vocabulary": corpus.tokenizer_hash, "splits": " ".join(corpus.manifest["splits"])}
    if not config.data.private:
        facts["corpus"] = corpus.hash
    if methods.keeps_one_model(config):  # other vectors add up a norm in another order
        facts["products"] = f"{described(config.train.precision)}, vectors of {VECTOR} bytes"
    check_same(comm, {**facts, "parameters": parameters_hash(state.theta), "step": state.step})


def _take_own(
    comm: MPI.Comm, resume: Checkpoint, own: Mapping[str, Array], made_by: str, config: Config, reporter: Reporter
) -> None:
    """Go on from this rank's own model and memories, where it wrote them; else from the model of all ranks."""
    if own and not checkpoint.load_own(resume, comm.rank, comm.size, own, made_by):
        reporter.warn(
            f"{resume.folder} has no {config.averaging.method} state for {comm.size} ranks: all go on from the average model"
        )
