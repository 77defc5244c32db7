"""What stands before every request: who may ask at all, how much at once, how large, and for how long."""

from __future__ import annotations

import asyncio
import re
import secrets
import time
from collections.abc import Callable

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ..engines.errors import Refused, busy
from ..engines.limits import Limits
from .origins import Headers, Origins
from .tokens import Clients

OPEN = {"/", "/health", "/health/ready"}  # answered without a token; they then say no more than whether it is there
ONCE = {b"authorization", b"host", b"origin"}
REQUEST_ID = re.compile(rb"[\w.:/+=@-]{1,128}")  # one that others have made and that is taken over
ALWAYS = {b"x-content-type-options": b"nosniff", b"cache-control": b"no-store"}  # where an answer does not say it
STREAMED = {b"cache-control": b"no-cache", b"x-accel-buffering": b"no"}  # no proxy may wait for more events, as nginx would
LINGER, LINGER_BYTES = 2.0, 8 << 20  # seconds and bytes of a body that is not wanted, read so that the client sees the refusal


class Guard:
    """ASGI middleware: refuses what is too much or not allowed before anything is read, ends what takes too long.

    Parameters
    ----------
    app : ASGI application
        Answers `Refused` itself; handlers add to the dict scope["dllm"], which is logged. Once an answer has begun that is not
        refused, scope["dllm.send"] sends its body past all that only looks at how it begins.
    limits : Limits
    clients : tokens.Clients
        Who may ask. A client's salt is in scope["dllm.salt"].
    origins : origins.Origins
        How clients may call this server: else a page anywhere could reach a loopback server by a name of its own.
    finished : callable
        Takes (scope, status or None: no answer began, seconds) of each request.
    root : str
        What may stand before every path, such as /llm; handlers do not see it.
    """

    def __init__(
        self, app: ASGIApp, limits: Limits, clients: Clients, origins: Origins,
        finished: Callable[[Scope, int | None, float], None], root: str = "",
    ) -> None:  # fmt: skip
        self.app, self.limits, self.clients, self.origins, self.finished = app, limits, clients, origins, finished
        self.root, self.running = root, 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        begin, name = time.monotonic(), request_id(scope)
        answer = _Answer(send, receive, [(b"x-request-id", name.encode())])
        path: str = scope["path"]
        below = path.removeprefix(self.root) if path.startswith(f"{self.root}/") else path
        scope = {**scope, "path": below, "dllm": {"request_id": name}, "dllm.send": send}
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
        return None

    async def _answer(self, scope: Scope, receive: Receive, answer: _Answer) -> None:
        headers: dict[bytes, bytes] = dict(scope["headers"])
        names = [name for name, _ in scope["headers"] if name in ONCE]
        if len(names) > len(set(names)):  # a proxy may have looked at another of them
            raise Refused("a header that says who asks is there more than once", code="bad_request")
        answer.headers += self.origins.check(headers)
        if (preflight := self.origins.preflight(scope["method"], headers)) is not None:  # browsers send no token with it
            return await answer.give(204, preflight)
        if scope["path"] == self.root != "":  # the page finds what it needs beside itself
            return await answer.give(308, [(b"location", self.root.rpartition("/")[2].encode() + b"/")])
        salt = self.clients.salt_of(headers.get(b"authorization", b""))
        scope["dllm"]["authenticated"], scope["dllm.salt"] = salt is not None, salt
        if not scope["dllm"]["authenticated"] and scope["path"] not in OPEN:
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
        return None

    def _limited(self, receive: Receive) -> Receive:
        """`receive` of one request, which raises Refused where the body is too large or too slow."""
        size = 0
        end: float | None = asyncio.get_running_loop().time() + self.limits.upload

        async def limited() -> Message:
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

    def _too_large(self) -> Refused:
        text = f"the body is larger than {self.limits.body} bytes, as --max-body says"
        return Refused(text, status=413, code="too_large")


def request_id(scope: Scope) -> str:
    """The name of a request in answers and logs: its X-Request-Id where that is well formed, else a new one."""
    given = [value for name, value in scope["headers"] if name == b"x-request-id"]
    well = len(given) == 1 and REQUEST_ID.fullmatch(given[0])
    return given[0].decode() if well else secrets.token_hex(16)


class _Answer:
    """`send` of one request, with what was sent kept in mind, and headers that all its answers have."""

    def __init__(self, send: Send, receive: Receive, headers: Headers) -> None:
        self.send, self.receive, self.headers = send, receive, headers
        self.status: int | None = None

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            given: Headers = list(message.get("headers", []))
            events = any(name == b"content-type" and value.startswith(b"text/event-stream") for name, value in given)
            there = {name for name, _ in given}
            more = {**ALWAYS, **(STREAMED if events else {})}
            message["headers"] = [*given, *self.headers, *(one for one in more.items() if one[0] not in there)]
        if self.status == 413 and message["type"] == "http.response.body":
            await self.send({**message, "more_body": True})
            await self._linger()
            message = {"type": "http.response.body", "body": b""}
        await self.send(message)

    async def give(self, status: int, headers: Headers) -> None:
        """Answer with headers alone."""
        length = [(b"content-length", b"0")] if status != 204 else []
        await self({"type": "http.response.start", "status": status, "headers": [*headers, *length]})
        await self({"type": "http.response.body", "body": b""})

    async def refuse(self, refused: Refused) -> None:
        """Answer with an error, unless an answer has begun: then the connection ends in the middle of it."""
        if self.status is None:
            body = refused.data()
            names = {"content-type": "application/json", "content-length": str(len(body)), "connection": "close"}
            headers = [(name.lower().encode(), value.encode()) for name, value in {**names, **refused.headers}.items()]
            await self({"type": "http.response.start", "status": refused.status, "headers": headers})
            await self({"type": "http.response.body", "body": body})

    async def _linger(self) -> None:
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
