"""Connections that a server bears: for how long, and how many."""

from __future__ import annotations

import asyncio

from uvicorn.protocols.http.h11_impl import H11Protocol

from .limits import Limits

DRAIN = 1.0  # seconds that a connection without a request stays when the server ends


class Connection(H11Protocol):
    """Closed where it does not send a whole request head in time, or waits longest where there are too many.

    Attributes
    ----------
    limits : Limits
        Set on a subclass, since uvicorn makes the objects.
    """

    limits = Limits()
    _timer: asyncio.TimerHandle | None = None  # until it is closed for want of a request head
    _idle_since = 0.0  # seconds, of the event loop's clock
    _draining = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as in uvicorn
        """Give a new connection its time."""
        super().connection_made(transport)
        self._idle_since = self.loop.time()
        self._set_timer()
        if len(self.connections) > self.limits.connections:
            idle = [other for other in self.connections if isinstance(other, Connection) and other.is_idle()]
            min(idle, key=lambda other: other._idle_since).close()  # at least this one

    def data_received(self, data: bytes) -> None:
        """Take in bytes of a request."""
        super().data_received(data)
        self._set_timer()
        if self._draining and self.cycle is not None:
            self.cycle.keep_alive = False

    def connection_lost(self, exc: Exception | None) -> None:
        """The connection is gone."""
        self.close()
        super().connection_lost(exc)

    def shutdown(self) -> None:
        """The server ends. A request may be on its way: it is still answered."""
        self._draining = True
        if self.is_idle():
            self.loop.call_later(DRAIN, self._close_if_idle)
        else:
            self.cycle.keep_alive = False

    def is_idle(self) -> bool:
        """Whether no request is under way."""
        return self.cycle is None or self.cycle.response_complete

    def close(self) -> None:
        """End it, whatever is under way."""
        self._stop_timer()
        if not self.transport.is_closing():
            self.transport.close()

    def _close_if_idle(self) -> None:
        if self.is_idle():
            self.close()

    def _set_timer(self) -> None:
        if not self.is_idle():
            self._idle_since = self.loop.time()
            self._stop_timer()
        elif self._timer is None:
            self._timer = self.loop.call_later(self.limits.head, self.close)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
