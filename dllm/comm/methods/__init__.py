"""The methods of averaging, each in a file that reads like its paper; which one a Config means, and what it must not combine.

To add one: a file with a class like those here, and a line in METHODS. The class overrides the steps that base.py names, and
says in its class attributes what it can do and what it needs (comm/averaging.py has the list). Import MPI in functions only:
the launcher asks the classes, too, and must not start MPI.
"""

from __future__ import annotations

import functools
import importlib
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Protocol

from ...config import AveragingConfig, Config
from ...errors import UserError
from ...kernels.types import Array
from ..averaging import Averaging, Table, Tensors

if TYPE_CHECKING:
    from mpi4py import MPI

    from ..node_info import NodeInfo
    from ..shared_memory import SharedMemory
    from .base import WholeVector

METHODS = {  # averaging.method: file and class
    "allreduce": ("compressed", "CompressedAllreduce"),  # where gradients are compressed; plain: is_plain
    "dpsgd": ("dpsgd", "DPSGD"),
    "dpsgd-atc": ("dpsgd", "DPSGDAdaptThenCombine"),
    "sgp": ("push_sum", "StochasticGradientPush"),
    "gradient-tracking": ("gradient_tracking", "GradientTracking"),
    "exact-diffusion": ("exact_diffusion", "ExactDiffusion"),
    "qg-momentum": ("quasi_global", "QuasiGlobalMomentum"),
    "relaysum": ("relaysum", "RelaySum"),
    "local-sgd": ("local_sgd", "LocalSGD"),
    "diloco": ("local_sgd", "DiLoCo"),
    "choco": ("choco", "Choco"),
    "async-gossip": ("async_gossip", "AsyncGossip"),
}
IN_NODE, BETWEEN_NODES = 4.0, 0.5  # MiB of a bucket: many small ones keep slow links busy


class Layout(Tensors, Protocol):
    """What `make_averaging` wants of a model's layout: how compression sees its vectors, and where the embedding lies."""

    @property
    def table(self) -> Table | None:
        """The embedding at the end of the vectors, where it is not tied to the output."""


def method(name: str) -> type[WholeVector]:
    """The class of an averaging.method. Importing it does not start MPI."""
    file, kind = METHODS[name]
    found: type[WholeVector] = getattr(importlib.import_module(f".{file}", __name__), kind)
    return found


def keeps_one_model(config: Config) -> bool:
    """Whether all ranks keep the same parameters, to the bit."""
    return is_plain(config) or method(config.averaging.method).identical


def is_plain(config: Config) -> bool:
    """Whether a Config means the sum of all gradients as they are, by Allreduce or NodeAllreduce."""
    averaging = config.averaging
    return averaging.method == "allreduce" and averaging.compression == "none" and config.train.clip_by != "own"


def check(config: Config) -> None:
    """Raise UserError where a Config asks of its method what that cannot do."""
    averaging, train = config.averaging, config.train
    if averaging.method not in METHODS:
        raise UserError(f"averaging.method = {averaging.method}: it is one of {', '.join(METHODS)}")
    kind, prefix = method(averaging.method), f"averaging.method = {averaging.method}"
    if averaging.compression not in ("none", *kind.compressions):
        _refuse_compression(averaging, kind)
    if averaging.topology and not kind.neighbours:
        raise UserError(f"{prefix} has no neighbours: leave out averaging.topology")
    if averaging.weights and not kind.weighted:
        raise UserError(f"{prefix} has no choice of weights: leave out averaging.weights")
    if averaging.hierarchical and not kind.between_nodes:
        raise UserError(f"averaging.hierarchical does not go with {prefix}; with dpsgd, for example")
    if averaging.period > 1 and not kind.periodic:
        able = ", ".join(name for name in METHODS if method(name).periodic)
        raise UserError(f"averaging.period goes with {able}, not with {prefix}")
    if kind.needs_sgd and (train.optimizer != "sgd" or (kind.needs_no_momentum and train.momentum)):
        extra = " and train.momentum = 0: it has a momentum of its own" if kind.needs_no_momentum else ""
        raise UserError(f"{prefix} needs train.optimizer = sgd{extra}")


def choices() -> dict[str, tuple[str, ...]]:
    """What a Config may choose from: averaging.method, averaging.compression."""
    able = dict.fromkeys(one for name in METHODS for one in method(name).compressions)
    return {"averaging.method": tuple(METHODS), "averaging.compression": ("none", *able)}


def _refuse_compression(averaging: AveragingConfig, kind: type[Averaging]) -> None:
    name, known = averaging.compression, choices()["averaging.compression"]
    if name not in known:
        raise UserError(f"averaging.compression = {name}: it is one of {', '.join(known)}")
    able = [other for other in METHODS if method(other).compressions]
    instead = f"it takes {', '.join(kind.compressions)}" if kind.compressions else f"{' and '.join(able)} compress"
    raise UserError(f"averaging.compression = {name} does not go with averaging.method = {averaging.method}: {instead}")


def made_by(config: AveragingConfig, node: NodeInfo) -> str:
    """What must be the same for arrays that a rank has of its own to be of use to a run that goes on from them."""
    names = ("method", "topology", "weights", "degree", "compression", "rank", "fraction")
    words = " ".join(f"{name}={getattr(config, name)}" for name in names)
    return f"{words} ranks of a node={node.ranks}" if config.hierarchical else words


def make_averaging(
    config: Config,
    comm: MPI.Comm,
    node: NodeInfo,
    *,
    memory: SharedMemory | None,
    theta: Array,
    gradient: Array,
    layout: Layout,
) -> Averaging:
    """The method that a Config means, on this rank. Collective.

    Parameters
    ----------
    config : Config
    comm : MPI.Comm
        Of all ranks.
    node : NodeInfo
    memory : SharedMemory, optional
        Of the node; with a plain Allreduce its row of this rank is `gradient`.
    theta, gradient : (P,) arrays
        The parameters, the same on all ranks, and this rank's gradient.
    layout : object with table, shapes, pack, unpack
        Where the embedding lies in these vectors, and how compression sees them.
    """
    averaging, train = config.averaging, config.train
    bucket_mb = averaging.bucket_mb or (IN_NODE if node.ranks == comm.size else BETWEEN_NODES)
    if is_plain(config):
        from ..allreduce import Allreduce
        from ..node_allreduce import NodeAllreduce

        tokens = train.window * -(-train.lanes // comm.size)  # of a rank at most
        others = layout.table, tokens, int(bucket_mb * 2**20), node.oversubscribed
        if memory is None:
            return Allreduce(comm, gradient, *others)
        return NodeAllreduce(comm, node.comm, memory, *others)
    kind: Any = method(averaging.method)
    if averaging.hierarchical:
        from .hierarchical import Hierarchical

        kind = functools.partial(Hierarchical, kind, node.comm)
    averaging = replace(averaging, bucket_mb=bucket_mb)
    made: Averaging = kind(comm, theta, gradient, layout.table, averaging, train, node.oversubscribed, layout)
    return made
