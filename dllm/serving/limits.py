"""What a server puts up with: connections, bodies, requests at once, time; who may ask at all; a line for each request."""

import asyncio
import hmac
import json
import os
import time
from dataclasses import dataclass

from uvicorn.protocols.http.h11_impl import H11Protocol

from .openai import Refused, busy

OPEN = {"/", "/health"}  # answered without a token; /health then says no more than that it is there
LOOPBACK = {"127.0.0.1", "localhost", "::1"}
LAST = 1.0  # seconds that a connection without a request stays when the server ends
LINGER, LINGER_BYTES = 2.0, 8 << 20  # seconds and bytes of a body that is not wanted, read so that the client sees the refusal


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Of one rank. Times in seconds."""

    body: int = 1 << 20  # bytes
    prompt: int = 32768  # tokens
    tokens: int = 4096  # that a request may ask for, each choice
    requests: int = 256  # that generate, score or embed at once
    connections: int = 512  # beyond it those that have waited longest go
    head: float = 10.0  # for a whole request head
    upload: float = 20.0  # for a whole body
    deadline: float = 600.0  # for a whole request


class Connection(H11Protocol):
    """Closed where it does not send a whole request head in time, or waits longest where there are too many.

    `limits`: set on a subclass.
    """

    limits = Limits()
    timer, since, last = None, 0.0, False

    def connection_made(self, transport):
        super().connection_made(transport)
        self.since = self.loop.time()
        self._time()
        if len(self.connections) > self.limits.connections:
            idle = [other for other in self.connections if other.is_idle()]
            min(idle, key=lambda other: other.since).end()  # at least this one

    def data_received(self, data):
        super().data_received(data)
        self._time()
        if self.last and self.cycle is not None:
            self.cycle.keep_alive = False

    def connection_lost(self, exc):
        self.end()
        super().connection_lost(exc)

    def shutdown(self):
        """The server ends. A request may be on its way: it is still answered."""
        self.last = True
        if self.is_idle():
            self.loop.call_later(LAST, lambda: self.is_idle() and self.end())
        else:
            self.cycle.keep_alive = False

    def is_idle(self):
        """Whether no request is under way."""
        return self.cycle is None or self.cycle.response_complete

    def _time(self):
        if not self.is_idle():
            self.since = self.loop.time()
            self._stop()
        elif self.timer is None:
            self.timer = self.loop.call_later(self.limits.head, self.end)

    def _stop(self):
        if self.timer is not None:
            self.timer.cancel()
            self.timer = None

    def end(self):
        self._stop()
        if not self.transport.is_closing():
            self.transport.close()


class Guard:
    """ASGI middleware: refuses what is too much or not allowed before anything is read, ends what takes too long, logs.

    Parameters
    ----------
    app : ASGI application
        Answers `Refused` itself; handlers add to the dict scope["dllm"], which is logged.
    limits : Limits
    token : str or None
        That clients must have; None: they need none.
    hosts : set of str or None
        Names by which clients may call this server: else a page anywhere could reach a loopback server by a name of its own.
    finished : callable
        Takes (scope, status, seconds) of each request.
    """

    def __init__(self, app, limits, token, hosts, finished):
        self.app, self.limits, self.token, self.hosts, self.finished = app, limits, token, hosts, finished
        self.running = 0

    async def __call__(self, scope, receive, send):
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        begin, answer = time.monotonic(), _Answer(send, receive)
        scope["dllm"] = {}
        try:
            async with asyncio.timeout(self.limits.deadline):
                await self._answer(scope, receive, answer)
        except Refused as refused:
            await answer.refuse(refused)
        except TimeoutError:
            too_late = f"this took longer than {self.limits.deadline:g} s"
            headers = {"x-should-retry": "false"}  # which OpenAI's clients know
            await answer.refuse(Refused(too_late, status=504, code="deadline_exceeded", headers=headers))
        finally:
            self.finished(scope, answer.status, time.monotonic() - begin)

    async def _answer(self, scope, receive, answer):
        headers = dict(scope["headers"])
        self._check_origin(headers)
        scope["dllm"]["known"] = self._is_known(headers)
        if not scope["dllm"]["known"] and scope["path"] not in OPEN:
            wanted = {"WWW-Authenticate": "Bearer"}
            raise Refused("this needs the right bearer token", status=401, code="invalid_api_key", headers=wanted)
        if scope["method"] != "POST":
            return await self.app(scope, receive, answer)
        if int(headers.get(b"content-length", 0)) > self.limits.body:  # which h11 has checked
            raise self._too_large()
        if self.running >= self.limits.requests:
            raise busy()
        self.running += 1
        try:
            await self.app(scope, self._limited(receive), answer)
        finally:
            self.running -= 1

    def _check_origin(self, headers):
        host = headers.get(b"host", b"").decode("latin-1")
        name = host.rpartition(":")[0] if not host.endswith("]") and ":" in host else host
        if self.hosts is not None and name.strip("[]").lower() not in self.hosts:
            raise Refused(f"this server is not called {name[:100]!r}", status=403, code="wrong_host")
        origin = headers.get(b"origin", b"").decode("latin-1")
        if origin and origin.partition("://")[2] != host:
            raise Refused("pages of other sites may not ask", status=403, code="wrong_origin")

    def _is_known(self, headers):
        if self.token is None:
            return True
        kind, _, given = headers.get(b"authorization", b"").partition(b" ")
        return kind.lower() == b"bearer" and hmac.compare_digest(given.strip(), self.token.encode())

    def _limited(self, receive):
        size, end = 0, asyncio.get_running_loop().time() + self.limits.upload

        async def limited():
            nonlocal size, end
            try:
                async with asyncio.timeout_at(end):
                    message = await receive()
            except TimeoutError:
                raise Refused(f"the body took longer than {self.limits.upload:g} s", status=408, code="too_slow") from None
            end = end if message.get("more_body") else None
            size += len(message.get("body", b""))
            if size > self.limits.body:
                raise self._too_large()
            return message

        return limited

    def _too_large(self):
        return Refused(f"the body is larger than {self.limits.body} bytes", status=413, code="too_large")


class _Answer:
    """`send` of one request, with what was sent kept in mind."""

    def __init__(self, send, receive):
        self.send, self.receive, self.status = send, receive, None

    async def __call__(self, message):
        if message["type"] == "http.response.start":
            self.status = message["status"]
            message["headers"] = [*message.get("headers", []), (b"x-content-type-options", b"nosniff")]
        if self.status == 413 and message["type"] == "http.response.body":
            await self.send(message | {"more_body": True})
            await self._linger()
            message = {"type": "http.response.body", "body": b""}
        await self.send(message)

    async def refuse(self, refused):
        """Answer with an error, unless an answer has begun: then the connection ends in the middle of it."""
        if self.status is None:
            body = refused.data()
            names = {"content-type": "application/json", "content-length": str(len(body)), "connection": "close"}
            headers = [(name.lower().encode(), value.encode()) for name, value in {**names, **refused.headers}.items()]
            await self({"type": "http.response.start", "status": refused.status, "headers": headers})
            await self({"type": "http.response.body", "body": body})

    async def _linger(self):
        """Closing a connection with something unread in it would take the answer away from the client."""
        size = 0
        try:
            async with asyncio.timeout(LINGER):
                while size < LINGER_BYTES:
                    message = await self.receive()
                    size += len(message.get("body", b""))
                    if not message.get("more_body"):
                        return
        except TimeoutError:
            pass


class Log:
    """Lines of JSON on standard error, one write each, so that those of several ranks do not mix."""

    def __init__(self, rank):
        self.rank = rank

    def __call__(self, what, **values):
        line = {"time": round(time.time(), 3), "rank": self.rank, "event": what, **values}
        os.write(2, (json.dumps(line, ensure_ascii=False) + "\n").encode(errors="replace"))
