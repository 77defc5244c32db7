"""The contract of all methods by which ranks come to one model. A training step calls, in this order:

    begin(tokens, control)     the step begins; what ranks tell each other is under way
    ready(part)                from inside the backward: that slice of the gradient is final on this rank
    progress()                 called often from inside the backward: no MPI moves a message on its own
    gradient()                 the Gradient that the optimiser gets
    clear()                    the optimiser has read it
    mix(theta, lr)             what the parameters become after the optimiser's step
    agreed()                   what all ranks told each other
    verdict(norm, sound)       whether the step counts

The base class fits methods in which every rank gets the same gradient, and so keeps the same parameters.
comm/methods/__init__.py says how to add a method.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, NamedTuple, Protocol, TypeVar

import numpy as np

from ..kernels.types import Array
from .control import Control, ControlExchange
from .messages import allgather

if TYPE_CHECKING:
    from mpi4py import MPI


class Moving(Protocol):
    """What a method may see of a training state: theta (P,) and the optimiser's moments, vectors (P,)."""

    theta: Array
    moments: list[Array]


S = TypeVar("S", bound=Moving)


class Table(Protocol):
    """Where the embedding (V,E) lies: at the end of the flat vector, from element `start` on."""

    @property
    def start(self) -> int:
        """Its first element."""

    @property
    def shape(self) -> tuple[int, ...]:
        """(V,E)."""


class Tensors(Protocol):
    """How compression sees flat vectors: as tensors of these shapes, one after the other in a standard vector."""

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        """Of the tensors."""

    def pack(self, vector: Array) -> Array:
        """The standard vector of a flat vector (P,), a copy."""

    def unpack(self, standard: Array, vector: Array) -> None:
        """Put all of a standard vector into a flat vector (P,)."""


@dataclass(frozen=True)
class Gradient:
    """What the optimiser gets."""

    parts: list[tuple[int, Array]]  # (first element, array), one behind the other; with `rows` the last is the embedding's
    rows: Array | None = None  # (n,) int64, rows of the embedding that may differ from zero; None: all of them
    squares: float | None = None  # the sum of squares without those rows, where it is known already


class Verdict(NamedTuple):
    """Whether a step counts on all ranks."""

    sound: bool | None  # None: not known yet, since ranks have not met
    ranks: tuple[int, ...] = ()  # whose gradients were not finite
    steps_ago: int = 0  # 0: the step just taken


class Averaging(ABC):
    """A method of averaging on this rank. Collective: every rank makes one and makes the same calls.

    Parameters
    ----------
    comm : MPI.Comm
        Duplicated, so that no other message can come in between.
    gradient : (P,) array
        This rank's own; its sum over ranks, or whatever the method makes of it, may replace it.
    oversubscribed : bool
        Ranks outnumber cores: sleep while waiting.

    Attributes
    ----------
    scale : int
        Each rank multiplies its loss by it: where gradients are averaged instead of added up, the number of ranks.
    step : int
        How many steps were taken, for methods in which what is sent depends on it.
    unsound : bool
        This rank's own share of the gradient is known not to be finite.
    arrays : dict
        name -> vector that a checkpoint must hold for this rank.
    bytes_sent : int
        By this rank, since it was made.
    exposed_seconds, flight_seconds : float
        In which this rank did nothing but wait for messages; in which messages were under way. The caller resets them.
    """

    # What a method can do, and what it needs; comm.methods.check compares it with a Config.
    identical: ClassVar[bool] = True  # all ranks keep the same parameters
    neighbours: ClassVar[bool] = False  # it goes by averaging.topology
    weighted: ClassVar[bool] = False  # it takes averaging.weights
    periodic: ClassVar[bool] = False  # ranks are alone but for every averaging.period-th step
    between_nodes: ClassVar[bool] = False  # it takes averaging.hierarchical
    compressions: ClassVar[tuple[str, ...]] = ()  # values of averaging.compression that it takes, beside none
    needs_sgd: ClassVar[bool] = False  # it is what its name says with train.optimizer = sgd alone
    needs_no_momentum: ClassVar[bool] = False  # and with train.momentum = 0, since it has a momentum of its own

    def __init__(self, comm: MPI.Comm, gradient: Array, oversubscribed: bool = False) -> None:
        self.comm, self.vector, self.oversubscribed = comm.Dup(), gradient, oversubscribed
        self.control = ControlExchange()
        self.arrays: dict[str, Array] = {}
        self.scale, self.step, self.unsound = 1, 0, False
        self.final = 0  # elements of the gradient that this step has announced
        self.bytes_sent, self.exposed_seconds, self.flight_seconds = 0, 0.0, 0.0

    @abstractmethod
    def begin(self, tokens: Array, control: Control) -> None:
        """Start a step. tokens: (n,) embedding rows that this rank uses; control: this rank's word."""

    @abstractmethod
    def ready(self, part: slice) -> None:
        """`part` of the gradient is final; parts come in order and without gaps."""

    def advance(self, part: slice) -> None:
        """Note that `part` is final. Raises RuntimeError where it does not follow what was."""
        if part.start != self.final:
            raise RuntimeError(f"the gradient is final up to {self.final}, but {part} is announced")
        self.final = part.stop

    @abstractmethod
    def progress(self) -> None:
        """Move messages on."""

    @abstractmethod
    def gradient(self) -> Gradient:
        """Wait for what is under way; the gradient that the optimiser gets."""

    @abstractmethod
    def describe(self) -> str:
        """A few words for the header of a run."""

    def clear(self) -> None:
        """The optimiser has read the gradient: embedding rows that are added to become zero again."""

    def mix(self, theta: Array, lr: float) -> None:
        """The optimiser has moved theta (P,) at the rate lr; neighbours may have their say."""

    def agreed(self) -> Control:
        """The maximum over ranks of the Controls given to `begin`."""
        return self.control.agreed()

    def verdict(self, norm: float, sound: bool) -> Verdict:
        """Whether the step counts. Collective where it does not.

        norm : of the gradient that the optimiser got, the same on all ranks; where it is not finite nothing has moved
        sound : this rank's losses were finite
        """
        if np.isfinite(norm):
            return Verdict(True)
        well = allgather(self.comm, bool(sound and not self.unsound), bool)
        return Verdict(False, tuple(rank for rank, one in enumerate(well) if not one))

    def model(self, theta: Array) -> Array:
        """Parameters (P,) of the model that all ranks make up. Collective."""
        return theta

    def consensus(self, state: S) -> S:
        """The state with the model that all ranks make up, and the moments that go with it. Collective."""
        return state

    def own_arrays(self, state: Moving) -> Mapping[str, Array]:
        """name -> vector: what only this rank has, and a checkpoint must hold."""
        return self.arrays

    def disagreement(self, theta: Array, mean: Array, loss: Callable[[Array], float]) -> dict[str, float]:
        """Figures of how far ranks are apart, where they may be. Collective.

        theta, mean : (P,) this rank's parameters, and those of the model that all ranks make up
        loss : of parameters, on the validation split
        """
        return {}

    def round_trips(self) -> dict[int, float]:
        """neighbour -> seconds that it takes to answer, where ranks have neighbours. Collective."""
        return {}

    def under_way(self) -> tuple[list[MPI.Comm], list[MPI.Request]]:
        """Communicators and requests in which this rank, or another, may still wait when a rank has died."""
        return [self.comm], [] if self.control.request is None else [self.control.request]

    def end(self) -> None:
        """The run is over."""
