"""Connections that a server bears: for how long, how many, and where their requests end."""

from __future__ import annotations

import asyncio
import re
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from ..engines.errors import Refused
from ..engines.limits import Limits

HEAD = 1 << 16  # bytes of a request head
DRAIN = 1.0  # seconds that a connection without a request stays when the server ends
LENGTHS = re.compile(rb"^(content-length|transfer-encoding)[ \t]*:([^\r\n]*)", re.IGNORECASE | re.MULTILINE)


class Requests(h11.Connection):
    """As h11 reads them, but for those whose end a proxy before this server might see elsewhere.

    RFC 9112, sections 6.1 and 11.2. h11 takes a chunked body where both lengths are given, and one of several that are the
    same. Of answers it writes chunks by itself, since a stream of tokens is many of them.
    """

    _chunked = False  # whether the answer under way is

    def next_event(self) -> Any:
        """The next event. Raises RemoteProtocolError."""
        before = self.trailing_data[0] if self.their_state is h11.IDLE else b""
        event = super().next_event()
        if isinstance(event, h11.Request):
            given = LENGTHS.findall(before[: len(before) - len(self.trailing_data[0])])  # of the head as it came
            chunked = any(name.lower() == b"transfer-encoding" for name, _ in given)
            if len(given) > 1 or any(b"," in value for _, value in given) or (chunked and event.http_version < b"1.1"):
                raise h11.RemoteProtocolError("the length of the body can be read in two ways")
        return event

    def send(self, event: Any) -> Any:
        """The bytes of an event; None: the connection is closed. Raises LocalProtocolError."""
        is_data, chunked = type(event) is h11.Data, self._chunked
        if chunked and is_data and event.data:
            return b"%x\r\n%b\r\n" % (len(event.data), event.data)  # RFC 9112, section 7.1
        self._chunked = False  # if this fails
        data = super().send(event)
        if type(event) is h11.Response:
            chunked = data is not None and b"\r\ntransfer-encoding: chunked\r\n" in data.lower()
            self._chunked = chunked and self.our_state is h11.SEND_BODY
        elif is_data:
            self._chunked = chunked
        return data


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

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.conn = Requests(h11.SERVER, self.config.h11_max_incomplete_event_size or HEAD)

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

    def send_400_response(self, msg: str) -> None:
        """Refuse what is no request, unless an answer is under way; nothing that came behind it is read."""
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            body = Refused("this is no request of HTTP/1.1, or its length can be read in two ways", code="bad_request").data()
            headers = [("content-type", "application/json"), ("content-length", str(len(body))), ("connection", "close")]
            for event in (h11.Response(status_code=400, headers=headers), h11.Data(data=body), h11.EndOfMessage()):
                self.transport.write(self.conn.send(event) or b"")
        self.close()

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
