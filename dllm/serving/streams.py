"""Streams of tokens as the event loop sees them: of the engine of this rank, in whose thread everything is computed."""

import asyncio

from .engine import Finished


class Gone(OSError):
    """Whoever asked is not there any more."""


class Inbox:
    """What came for one request, from all its streams, by their index."""

    def __init__(self):
        self.events, self.there, self.cancels, self.closed = [], asyncio.Event(), [], False

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

    def close(self):
        """Nobody waits for the rest."""
        self.closed = True
        self.there.set()

    def cancel(self):
        """End all streams that are still under way."""
        for cancel in self.cancels:
            cancel()
        self.cancels = []


class Local:
    """The engine's streams, handed to their inboxes in the event loop: one call into the loop for each step of the engine."""

    def __init__(self, engine, loop):
        self.engine, self.loop, self.inboxes = engine, loop, {}  # stream -> (inbox, index)

    def submit(self, request, inbox, index):
        """Raises engine.Full. In the event loop. Returns a function that cancels."""
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
