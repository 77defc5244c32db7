"""What a rank does and when, for a trace of some steps: spans of its calls, messages from start to end, clocks of hosts.

Nothing here is called where no trace is taken: a Recorder puts itself between an object and those that call it, and steps aside
when the trace is over.
"""

from __future__ import annotations

import functools
import itertools
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np

from ..kernels.types import Array
from .allreduce import Allreduce
from .averaging import Averaging
from .messages import allgather
from .shared_memory import READY, SUMMED

if TYPE_CHECKING:
    from mpi4py import MPI

    from .node_allreduce import NodeAllreduce

ROUNDS = 20  # in which clocks are compared
SHORTEST = 20e-6  # seconds of a call that is worth a span, of those that are called again and again
ROOM = "dllm.comm"


class Span(NamedTuple):
    """A call, or a part of one."""

    name: str
    track: str  # what it runs on: spans of one track lie one behind the other or one inside the other
    begin: float  # by time.perf_counter of its host
    end: float


class Message(NamedTuple):
    """What was under way, to or from other ranks, while the rank did something else."""

    name: str
    size: int  # bytes that this rank gave
    begin: float
    end: float


class Recorder:
    """Keeps what happens on this rank, of the objects that it watches.

    Attributes
    ----------
    spans, messages : list of Span, list of Message
    marks : list of (int, int, float)
        Of ranks that add up in shared memory: READY or SUMMED, how many stages are, since when.
    """

    def __init__(self) -> None:
        self.spans: list[Span] = []
        self.messages: list[Message] = []
        self.marks: list[tuple[int, int, float]] = []
        self._undo: list[Callable[[], None]] = []

    def put(self, owner: Any, name: str, value: Any) -> None:
        """Give an object another attribute until `end`."""
        there, before = name in vars(owner), getattr(owner, name)
        setattr(owner, name, value)
        self._undo.append(lambda: setattr(owner, name, before) if there else delattr(owner, name))

    def watch(self, owner: Any, name: str, called: str, shortest: float = 0.0) -> None:
        """Record the calls of a method of an object that take at least `shortest` seconds."""
        method = getattr(owner, name)

        def recorded(*arguments: Any, **options: Any) -> Any:
            begin = time.perf_counter()
            try:
                return method(*arguments, **options)
            finally:
                self.span(called, begin, shortest)

        self.put(owner, name, recorded)

    def span(self, name: str, begin: float, shortest: float = 0.0, track: str = "compute") -> None:
        """Record what began at `begin` and ends now."""
        end = time.perf_counter()
        if end - begin >= shortest:
            self.spans.append(Span(name, track, begin, end))

    def end(self) -> None:
        """Put everything back."""
        while self._undo:
            self._undo.pop()()

    def watch_messages(self, averaging: Averaging) -> None:
        """Record the messages of a method of averaging, and what it does for them."""
        from .node_allreduce import NodeAllreduce  # which imports MPI

        for owner, name, value in list(_communicators(averaging, set())):
            several = isinstance(value, list)
            recorded = [(_Comm(comm, self), *rest) for comm, *rest in value] if several else _Comm(value, self)
            self.put(owner, name, recorded)
        if isinstance(averaging, NodeAllreduce):
            self._watch_memory(averaging)
        elif isinstance(averaging, Allreduce):
            self.watch(averaging, "_arrived", "take in a bucket")

    def _watch_memory(self, averaging: NodeAllreduce) -> None:
        say, advance = averaging._say, averaging._advance

        def marked(what: int, count: int) -> None:
            say(what, count)
            self.marks.append((what, count, time.perf_counter()))

        def adding() -> bool:
            begin = time.perf_counter()
            done = advance()
            if done:
                self.span("add up a shard", begin)
            return done

        for what in (READY, SUMMED):  # all stages of earlier steps
            self.marks.append((what, averaging.before, time.perf_counter()))
        self.put(averaging, "_say", marked)
        self.put(averaging, "_advance", adding)


def stages(averaging: Averaging) -> list[tuple[str, int]]:
    """(name, bytes) of the stages of a step that `marks` count; none where ranks do not add up in shared memory."""
    from .node_allreduce import NodeAllreduce

    if not isinstance(averaging, NodeAllreduce):
        return []
    size = averaging.vector.itemsize
    buckets = [(f"bucket {number:02d}", (one.stop - one.start) * size) for number, one in enumerate(averaging.buckets)]
    return [*buckets, *[("rows of the embedding", 0)] * averaging.sparse]


def in_memory(marks: list[list[tuple[int, int, float]]], stages: list[tuple[str, int]]) -> list[list[Message]]:
    """By rank of a node, the stages from when it was ready until all ranks had added theirs up."""
    first = [{what: _firsts(told, what) for what in (READY, SUMMED)} for told in marks]
    found: list[list[Message]] = [[] for _ in marks]
    for stage in sorted(set.intersection(*(set(one[SUMMED]) & set(one[READY]) for one in first))):
        name, size = stages[(stage - 1) % len(stages)]
        end = max(one[SUMMED][stage] for one in first)
        for messages, one in zip(found, first, strict=True):
            messages.append(Message(name, size, one[READY][stage], end))
    return found


def _firsts(marks: list[tuple[int, int, float]], what: int) -> dict[int, float]:
    """Stage -> when it was said first that it, and all before it, are done. The first mark says where they begin."""
    counts = [(count, when) for kind, count, when in marks if kind == what]
    found: dict[int, float] = {}
    for (before, _), (count, when) in itertools.pairwise(counts):
        found |= dict.fromkeys(range(before + 1, count + 1), when)
    return found


def clock_offsets(comm: MPI.Comm) -> tuple[Array, Array]:
    """By how much the clock of each rank is ahead of rank 0's, and how far that may be wrong: (ranks,) seconds. Collective.

    Whoever leaves a round does so after everybody has come to it. That gives bounds, and their middle is taken (Cristian 1989,
    "Probabilistic clock synchronization"). Where they allow that clocks are the same, as on one host, they are.
    """
    rounds = []
    for _ in range(ROUNDS):
        begin = time.perf_counter()
        allgather(comm, True, bool)
        rounds.append((begin, time.perf_counter()))
    times = np.array(allgather(comm, rounds, list[tuple[float, float]]))
    least, most = (times[:, :, 0] - times[0, :, 1]).max(axis=1), (times[:, :, 1] - times[0, :, 0]).min(axis=1)
    return np.where((least <= 0) & (most >= 0), 0.0, (least + most) / 2), (most - least) / 2


def _communicators(thing: Any, seen: set[int]) -> Iterator[tuple[Any, str, Any]]:
    """(owner, attribute, its value) of the communicators that an object of this room holds, and of lists of tuples with one."""
    from mpi4py import MPI

    seen.add(id(thing))
    for name, value in list(vars(thing).items()):
        first = value[0][:1] if isinstance(value, list) and value and isinstance(value[0], tuple) else (value,)
        if first and isinstance(first[0], MPI.Comm):
            yield thing, name, value
        elif type(value).__module__.startswith(ROOM) and hasattr(value, "__dict__") and id(value) not in seen:
            yield from _communicators(value, seen)


class _Comm:
    """A communicator whose nonblocking operations are recorded."""

    def __init__(self, comm: MPI.Comm, recorder: Recorder) -> None:
        self._comm, self._recorder = comm, recorder

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._comm, name)
        if not (name.startswith("I") and callable(found)) or name.startswith(("Iprobe", "Is_", "Irecv")):
            return found

        def start(*arguments: Any, **options: Any) -> MPI.Request:
            begin = time.perf_counter()
            size = arguments[0].nbytes if arguments and isinstance(arguments[0], np.ndarray) else 0
            request: MPI.Request = _recorded_request()(found(*arguments, **options), name, size, begin, self._recorder)
            return request

        return start


@functools.cache
def _recorded_request() -> Any:
    """The class of requests whose end is recorded when this rank learns of it. MPI's own functions take them, too."""
    from mpi4py import MPI

    class Recorded(MPI.Request):
        def __new__(cls, request: MPI.Request, *of: Any) -> Recorded:
            return super().__new__(cls, request)

        def __init__(self, request: MPI.Request, name: str, size: int, begin: float, recorder: Recorder) -> None:
            self.of: tuple[str, int, float, Recorder] | None = (name, size, begin, recorder)

        def Test(self, *arguments: Any) -> bool:
            done = super().Test(*arguments)
            if done:
                self.ended()
            return done

        def Wait(self, *arguments: Any) -> Literal[True]:
            begin = time.perf_counter()
            super().Wait(*arguments)
            if self.of is not None:
                name, _, _, recorder = self.of
                recorder.span(f"wait for {name}", begin, SHORTEST)
            self.ended()
            return True

        def ended(self) -> None:
            if self.of is not None:
                name, size, begin, recorder = self.of
                recorder.messages.append(Message(name, size, begin, time.perf_counter()))
                self.of = None

    return Recorded
