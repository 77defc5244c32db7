"""Streams of tokens as the event loop sees them: of the engine of this rank, in whose thread everything is computed."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, Protocol, TypeAlias, TypeVar

from starlette.types import Receive

from .engine import Engine
from .errors import Disconnected, Refused, busy
from .requests import AnyRequest, Event, Finished, Stream

Result = TypeVar("Result")
Cancel: TypeAlias = Callable[[], object]


class Sink(Protocol):
    """Where the events of streams go. In the event loop."""

    @property
    def cancels(self) -> list[Cancel]:
        """What ends its streams."""

    def put(self, index: int, event: Event) -> None:
        """Take the next event of a stream."""


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
        self._ready, self._closed = asyncio.Event(), False

    def put(self, index: int, event: Event) -> None:
        """Take the next event of a stream."""
        self._events.append((index, event))
        self._ready.set()

    async def get(self) -> list[tuple[int, Event]]:
        """All that has come since: a list of (index, Token or Finished), not empty. Raises Disconnected."""
        await self._ready.wait()
        if self._closed:
            raise Disconnected
        self._ready.clear()
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
        self._ready.set()

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
    """The engine's streams, handed to their inboxes in the event loop: one call into the loop for each step of the engine."""

    def __init__(self, engine: Engine[Any], loop: asyncio.AbstractEventLoop) -> None:
        self.engine, self.loop = engine, loop
        self._sinks: dict[Stream[Any], tuple[Sink, int]] = {}

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
        self.loop.call_soon_threadsafe(self._dispatch, news)

    def _dispatch(self, news: list[tuple[Stream[Any], Event]]) -> None:
        for stream, event in news:
            sink, index = self._sinks[stream]
            sink.put(index, event)
            if isinstance(event, Finished):
                del self._sinks[stream]


async def unless_disconnected(receive: Receive, inbox: Inbox, work: Coroutine[Any, Any, Result]) -> Result:
    """What the coroutine `work`, which reads from an inbox, returns; it gets Disconnected where the client leaves."""

    async def watch() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        inbox.close()

    watcher = asyncio.create_task(watch())
    try:
        return await work
    finally:
        watcher.cancel()
        inbox.cancel()
