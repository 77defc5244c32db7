"""Streams of tokens as the event loop sees them: of the engine of this rank, in whose thread everything is computed."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any, Protocol, TypeAlias

from .engine import Engine
from .errors import Disconnected, Refused, busy
from .requests import AnyRequest, Event, Finished, Stream

Cancel: TypeAlias = Callable[[], object]
PAUSE, LONGEST_PAUSE = 0.003, 0.04  # seconds in which tokens are gathered: for each stream beside the first, and at most


class Sink(Protocol):
    """Where the events of streams go. In the event loop."""

    @property
    def cancels(self) -> list[Cancel]:
        """What ends its streams."""

    def put(self, index: int, *events: Event) -> None:
        """Take the next events of a stream."""


class Inbox:
    """What came for one request, from all its streams, by their index.

    Attributes
    ----------
    cancels : list of callable
        What ends the streams.
    accepted : list of future
        Of streams that other ranks compute: whether one has taken it.
    """

    def __init__(self) -> None:
        self.cancels: list[Cancel] = []
        self.accepted: list[asyncio.Future[bool]] = []
        self._events: list[tuple[int, Event]] = []
        self._closed = False
        self._waiter: asyncio.Future[None] | None = None  # of whoever waits for more

    def put(self, index: int, *events: Event) -> None:
        """Take the next events of a stream."""
        self._events += [(index, event) for event in events]
        self._wake()

    async def get(self) -> list[tuple[int, Event]]:
        """All that has come since: a list of (index, Token or Finished), not empty. For one at a time. Raises Disconnected."""
        if not (self._events or self._closed):
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        if self._closed:
            raise Disconnected
        events, self._events = self._events, []
        return events

    async def all_accepted(self) -> None:
        """Wait until all streams have somebody who computes them. Raises Refused where one has nobody."""
        if not all(await asyncio.gather(*self.accepted)):
            self.cancel()
            raise busy()

    def close(self) -> None:
        """Nobody waits for the rest: `get` raises Disconnected."""
        self._closed = True
        self._wake()

    def _wake(self) -> None:
        waiter, self._waiter = self._waiter, None
        if waiter is not None and not waiter.done():  # who waited may have been cancelled
            waiter.set_result(None)

    def cancel(self) -> None:
        """End all streams that are still under way."""
        for cancel in self.cancels:
            cancel()
        self.cancels = []


async def collect(inbox: Inbox, count: int) -> list[list[Event]]:
    """[Token, ..., Finished] of each of `count` streams, when all have ended.

    Raises Refused where one failed, and Disconnected.
    """
    events: list[list[Event]] = [[] for _ in range(count)]
    left = count
    while left:
        for index, event in await inbox.get():
            events[index].append(event)
            if isinstance(event, Finished):
                left -= 1
                check_finished(event)
    return events


def check_finished(finished: Finished) -> None:
    """Raise Refused where a stream has failed."""
    if finished.reason == "full":
        raise busy()
    if finished.reason == "error":
        raise Refused(finished.message or "the engine failed", status=500, code="engine_failed")


class LocalStreams:
    """The engine's streams, handed to their inboxes in the event loop: one call into the loop for one or some of its steps.

    What it costs to wake the loop and to write to a connection hardly depends on how much there is to write. A stream that is
    alone gets each token at once. With others it waits until there is time for all: PAUSE for each, LONGEST_PAUSE at most;
    then all of them get what has come since. The first event of a stream and its last never wait. The next step of the engine
    ends every wait, so no clock is needed: while streams are under way, there is one.
    """

    def __init__(self, engine: Engine[Any], loop: asyncio.AbstractEventLoop) -> None:
        self.engine, self.loop = engine, loop
        self._sinks: dict[Stream[Any], tuple[Sink, int]] = {}
        # In the engine's thread:
        self._begun: set[Stream[Any]] = set()
        self._held: dict[Stream[Any], list[Event]] = {}
        self._due = 0.0  # when all is told, seconds of the monotonic clock

    def submit(self, request: AnyRequest, sink: Sink, index: int) -> Cancel:
        """Have a stream computed; its events go to `sink` as those of `index`. In the event loop.

        Returns what cancels it. Raises Full, or ValueError for tokens that the model does not have.
        """
        stream = self.engine.submit(request, self._deliver)
        self._sinks[stream] = sink, index
        sink.cancels.append(stream.cancel)
        return stream.cancel

    def _deliver(self, news: list[tuple[Stream[Any], Event]]) -> None:
        """In the engine's thread."""
        held, begun, urgent = self._held, self._begun, dict[Stream[Any], None]()
        for stream, event in news:
            held.setdefault(stream, []).append(event)
            if stream not in begun:
                begun.add(stream)
                urgent[stream] = None
            if isinstance(event, Finished):
                begun.discard(stream)
                urgent[stream] = None
        now = time.monotonic()
        if now >= self._due:
            told, self._held = held, {}
            self._due = now + min(PAUSE * (len(begun) - 1), LONGEST_PAUSE)
        else:
            told = {stream: held.pop(stream) for stream in urgent}
        if told:
            self.loop.call_soon_threadsafe(self._dispatch, told)

    def _dispatch(self, told: dict[Stream[Any], list[Event]]) -> None:
        for stream, events in told.items():
            sink, index = self._sinks[stream]
            sink.put(index, *events)
            if isinstance(events[-1], Finished):
                del self._sinks[stream]
