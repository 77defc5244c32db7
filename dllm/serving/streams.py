"""Streams of tokens as the event loop sees them: of the engine of this rank, in whose thread everything is computed."""

import asyncio

from .openai import Refused, busy
from .requests import Finished


class Gone(OSError):
    """Whoever asked is not there any more."""


class Inbox:
    """What came for one request, from all its streams, by their index."""

    def __init__(self):
        self.events, self.there, self.cancels, self.closed = [], asyncio.Event(), [], False
        self.asked = []  # of other ranks: futures that tell whether they have taken a stream

    def put(self, index, events):
        self.events += [(index, event) for event in events]
        self.there.set()

    async def get(self):
        """All that has come since: a list of (index, Token or Finished), not empty. Raises Gone."""
        await self.there.wait()
        if self.closed:
            raise Gone
        self.there.clear()
        events, self.events = self.events, []
        return events

    async def taken(self):
        """Wait until all streams have somebody who computes them. Raises Refused where one has nobody."""
        if not all(await asyncio.gather(*self.asked)):
            self.cancel()
            raise busy()

    def close(self):
        """Nobody waits for the rest."""
        self.closed = True
        self.there.set()

    def cancel(self):
        """End all streams that are still under way."""
        for cancel in self.cancels:
            cancel()
        self.cancels = []


async def gather(inbox, count):
    """index -> [Token, ..., Finished] of `count` streams, when all have ended. Raises Refused where one failed, and Gone."""
    found, left = {index: [] for index in range(count)}, count
    while left:
        for index, event in await inbox.get():
            found[index].append(event)
            if isinstance(event, Finished):
                left -= 1
                check(event)
    return found


def check(finished):
    """Raises Refused where a stream has failed."""
    if finished.reason == "full":
        raise busy()
    if finished.reason == "error":
        raise Refused(finished.message or "the engine failed", status=500, code="engine_failed")


class Local:
    """The engine's streams, handed to their inboxes in the event loop: one call into the loop for each step of the engine."""

    def __init__(self, engine, loop):
        self.engine, self.loop, self.inboxes = engine, loop, {}  # stream -> (inbox, index)

    def submit(self, request, inbox, index):
        """Raises Full. In the event loop. Returns a function that cancels."""
        stream = self.engine.submit(request, self._deliver)
        self.inboxes[stream] = inbox, index
        inbox.cancels.append(stream.cancel)
        return stream.cancel

    def _deliver(self, news):
        """In the engine's thread."""
        self.loop.call_soon_threadsafe(self._spread, news)

    def _spread(self, news):
        for stream, event in news:
            inbox, index = self.inboxes[stream]
            inbox.put(index, [event])
            if isinstance(event, Finished):
                del self.inboxes[stream]


async def unless_gone(receive, inbox, work):
    """What the coroutine `work`, which reads from an inbox, returns; it gets Gone where the client leaves."""

    async def watch():
        while (await receive())["type"] != "http.disconnect":
            pass
        inbox.close()

    watcher = asyncio.create_task(watch())
    try:
        return await work
    finally:
        watcher.cancel()
        inbox.cancel()
