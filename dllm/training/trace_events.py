"""A trace as Perfetto and Chrome read it, of what the ranks have recorded.

Each rank is a process with these tracks:

    compute               forward, backward by layers, optimiser, evaluation, waits; one inside the other
    checkpoint writer     the thread that writes this rank's file
    messages              each from when it starts until this rank learns that it has ended: under the backward, if all is well

Format: "Trace Event Format", Google, https://docs.google.com/document/d/1CvAClvFfyA5R-PhYUmn5OOQtYMH4h6I0nSsKchNAySU. Times of
other hosts are moved by what their clocks are ahead (comm/tracing.py).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from ..comm.tracing import Message, Span, in_memory
from ..errors import printable

# To Perfetto process 0 is the idle one, a thread is known by its number alone, and one that has its process's is the main one.
THREADS = {"compute": 0, "checkpoint writer": 1, "messages": 2}  # numbers beyond that of the process
Event = dict[str, Any]


class Told(NamedTuple):
    """What a rank says of the steps that were traced."""

    host: str
    node: list[int]  # the ranks of its node
    spans: list[Span]
    messages: list[Message]
    marks: list[tuple[int, int, float]]
    stages: list[tuple[str, int]]


def events(everyone: list[Told], offsets: list[float]) -> list[Event]:
    """The events of a trace, in microseconds from its beginning.

    everyone : by rank
    offsets : seconds by which the clock of each rank is ahead of rank 0's
    """
    messages = [list(told.messages) for told in everyone]
    for nodes in {tuple(told.node) for told in everyone if told.stages}:
        shared = in_memory([everyone[rank].marks for rank in nodes], everyone[nodes[0]].stages)
        for rank, found in zip(nodes, shared, strict=True):
            messages[rank] += found
    origin = min(span.begin - offset for told, offset in zip(everyone, offsets, strict=True) for span in told.spans)
    return [
        event
        for rank, (told, offset) in enumerate(zip(everyone, offsets, strict=True))
        for event in (*_names(rank, told.host), *_of_rank(rank, told.spans, messages[rank], origin + offset))
    ]


def _of_rank(rank: int, spans: list[Span], messages: list[Message], origin: float) -> Iterator[Event]:
    """The events of a rank by whose clock the trace begins at `origin`."""

    def at(moment: float) -> float:
        return round((moment - origin) * 1e9) / 1e3

    process = process_of(rank)
    for span in sorted(spans, key=lambda span: (span.begin, -span.end)):
        begin, place = at(span.begin), {"pid": process, "tid": process + THREADS[span.track]}
        duration = round(at(span.end) - begin, 3)
        yield {"ph": "X", "name": span.name, "cat": "rank", "ts": begin, "dur": duration, **place}
    place = {"pid": process, "tid": process + THREADS["messages"]}
    for number, one in enumerate(sorted(messages, key=lambda one: one.begin)):
        shown = {"cat": "message", "name": one.name, "id": f"{rank}.{number}", **place}
        yield {"ph": "b", "ts": at(one.begin), "args": {"bytes": one.size} if one.size else {}, **shown}
        yield {"ph": "e", "ts": at(one.end), **shown}


def process_of(rank: int) -> int:
    """The number of the process that stands for a rank."""
    return 10 * (rank + 1)


def _names(rank: int, host: str) -> Iterator[Event]:
    """The events that name a rank and its tracks."""
    process = process_of(rank)
    for what, thread, value in (
        ("process_name", 0, {"name": f"rank {rank} on {printable(host)}"}),
        ("process_sort_index", 0, {"sort_index": rank}),
        *(("thread_name", number, {"name": track}) for track, number in THREADS.items()),
    ):
        yield {"ph": "M", "name": what, "pid": process, "tid": process + thread, "args": value}
