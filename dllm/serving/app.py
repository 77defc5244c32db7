"""The routes: what is asked over HTTP, and what answers it. Nothing is computed in the event loop.

To add a route: a handler here or in a file beside this, its Route in Service.app, or, where something is computed, its line in
routes.py, and its description in openapi.py. limits.py lists the paths that need no token.
"""

from __future__ import annotations

import asyncio
import base64
import collections
import functools
import hashlib
import pathlib
import re
import time
from collections.abc import Callable, Mapping, Sequence, Sized
from typing import Any, TypeVar

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Scope

from ..errors import UserError
from ..inference.loaded_model import LoadedModel
from . import metrics, openapi
from .counts import OTHER, Ledger, RequestCounts
from .errors import Disconnected, Refused
from .fields import CHOICES, Json
from .limits import Guard, Limits
from .log import Log
from .openai import encode, model_body, models_body
from .origins import Origins
from .peers import Peers
from .reports import SHOWN, Entry, news, state_of
from .routes import HANDLERS, INFO, PATHS, no_such_route, tokenizer_info
from .streamed_text import Vocabulary
from .streams import LocalStreams
from .tokens import Clients

Given = TypeVar("Given", bound=Sized)
Readable = TypeVar("Readable", bound=Sized)
WITH_PAGE = "lm", "seq2seq"  # kinds that the page for people is of
WATCHED = "/health", "/health/ready", "/metrics"  # asked for all the time
PAGE = pathlib.Path(__file__).with_name("page.html")


class Service:
    """What one rank answers.

    Parameters
    ----------
    model : LoadedModel
    local : streams.LocalStreams
    peers : peers.Peers
    limits : limits.Limits
    log : log.Log
    log_prompts : bool
        Whether the log has the prompts, too.

    Attributes
    ----------
    state : str
        "ok", or "draining": no new requests should come.
    """

    def __init__(
        self, model: LoadedModel, local: LocalStreams, peers: Peers, limits: Limits, log: Log, log_prompts: bool = False
    ) -> None:
        self.name, self.kind, self.vocabulary = model.name, model.config.kind, Vocabulary(model.tokenizer)
        self.labels, self.features, self.window = model.tokenizer.labels, model.config.features, model.window
        self.engine, self.peers, self.limits = local.engine, peers, limits
        self.log, self.log_prompts = log, log_prompts
        self.created, self.state = int(time.time()), "ok"
        self._writing, self._scraping, self._ledger = asyncio.Lock(), asyncio.Lock(), Ledger()
        self._answered = RequestCounts([])  # until its routes are known
        self._names = [name for name, _, _ in metrics.GAUGES_AND_COUNTERS if name in self.engine.load()]

    def app(self, clients: Clients, origins: Origins | None = None, root: str = "") -> ASGIApp:
        """The ASGI application. clients, origins, root: see limits.Guard."""
        page, policy = _page()
        kind = openapi.described_as(self.kind, self.features > 0, self.vocabulary.tokenizer.pairs)
        beams = min(CHOICES, self.engine.slots)
        description = openapi.describe(self.name, self.vocabulary.size, self.limits, clients.needed, kind, beams)
        description |= {"servers": [{"url": root}]} if root else {}

        async def show_page(request: HttpRequest) -> Response:
            if request.scope["dllm"]["authenticated"] and self.kind not in WITH_PAGE:  # which strangers are not to learn
                return await no_such_route(self, request)
            headers = {"content-security-policy": policy, "cache-control": "no-cache", "referrer-policy": "no-referrer"}
            return Response(page, media_type="text/html", headers=headers)

        async def describe(request: HttpRequest) -> Response:
            return JSONResponse(description)

        routes = [
            Route("/", show_page), Route("/openapi.json", describe),
            Route("/health", self.health), Route("/health/ready", self.ready), Route("/metrics", self.metrics),
            Route("/v1/models", self.models), Route("/v1/models/{model:path}", self.model),
            Route(INFO, functools.partial(tokenizer_info, self)),
        ]  # fmt: skip
        for path in PATHS:
            handler = HANDLERS[self.kind].get(path, no_such_route)
            routes.append(Route(path, functools.partial(handler, self), methods=["POST"]))
        kinds = Refused, HTTPException, Disconnected, ClientDisconnect, UserError
        others = {path for path in PATHS if path not in HANDLERS[self.kind]}
        self._answered = RequestCounts([one.path for one in routes if one.path not in others and "{" not in one.path])
        inside = Starlette(routes=routes, exception_handlers=dict.fromkeys(kinds, _answer_error))
        inside.router.redirect_slashes = False
        return Guard(inside, self.limits, clients, origins or Origins(), self._finished, root)

    def _finished(self, scope: Scope, status: int | None, seconds: float) -> None:
        fields = {name: value for name, value in scope["dllm"].items() if name != "authenticated"}
        route = scope["path"] if scope["path"] in self._answered.routes else OTHER
        self._answered.add(route, status, seconds, fields.get("inputs", 0) if status == 200 else 0)
        if route in WATCHED and status in (200, 503):
            return
        line = {"method": scope["method"][:10], "route": route, "status": status, "seconds": round(seconds, 4), **fields}
        if scope["dllm"].get("authenticated"):
            self.log("request", **line)
        else:
            self.log.limited("requests of strangers", "request", **line)

    # ---- what is there

    async def health(self, request: HttpRequest) -> Response:
        """How this rank and, for those who have the token, all others are."""
        if not request.scope["dllm"]["authenticated"]:
            return JSONResponse({"status": self.state})
        ranks, table = [], self.peers.gossip.table()
        for rank, (report, silence, _) in table.items():
            state = state_of(table[rank])
            shown = {name: report[name] for name in SHOWN}
            ranks.append({"rank": rank, "state": state, **shown, "heard_seconds_ago": round(silence, 3)})
        return JSONResponse({"status": self.state, "rank": self.peers.rank, "model": self.name, "ranks": ranks})

    async def ready(self, request: HttpRequest) -> Response:
        """Whether requests should come to this rank. /health is about whether it is there at all."""
        well = self.state == "ok" and self.engine.load()["alive"]
        return JSONResponse({"status": "ok" if well else "draining"}, 200 if well else 503)

    def numbers(self) -> dict[str, Any]:
        """What this rank tells all others of what it does: in the thread of the gossip, too."""
        load = self.engine.load()
        rate = round(load["tokens_per_second"], 1)
        whole = {name: int(load[name]) for name in self._names}
        return {**whole, "tokens_per_second": rate, "draining": self.state != "ok", "rows": self._answered.rows()}

    async def metrics(self, request: HttpRequest) -> Response:
        """What all ranks do and have done, for Prometheus."""
        size = self.peers.gossip.size
        if size > 1:
            await news(self.peers.gossip)
        async with self._scraping:  # so that the ledger sees reports in their order
            table: Mapping[int, Entry] = self.peers.gossip.table() if size > 1 else {0: (self.numbers(), 0.0, False)}
            text = await asyncio.to_thread(self._render, table, size)
        return Response(text, media_type="text/plain; version=0.0.4; charset=utf-8")

    def _render(self, table: Mapping[int, Entry], size: int) -> str:
        known = {rank: (self._ledger.take(rank, report), age, dead) for rank, (report, age, dead) in table.items()}
        return metrics.render(self._names, self._answered.routes, known, size)

    async def models(self, request: HttpRequest) -> Response:
        """The only model, in OpenAI's form."""
        return JSONResponse(models_body(self.name, self.created))

    async def model(self, request: HttpRequest) -> Response:
        """The one that a client names."""
        return JSONResponse(model_body(request.path_params["model"], self.name, self.created))

    # ---- of what is computed

    async def answer(self, body: Json, headers: Mapping[str, str]) -> Response:
        """A response of JSON. Large ones are written one at a time, and others get their turn in between."""
        async with self._writing:
            await asyncio.sleep(0)
            return Response(encode(body), media_type="application/json", headers=headers)

    async def read_prompts(
        self, given: Sequence[Given], field: str, read: Callable[[Given], Readable], each: bool = False
    ) -> list[Readable]:
        """What `read` makes of each text or its token numbers, not too many in all or `each`. Raises Refused, UserError."""
        if sum(map(len, given)) > 2000:  # long enough to be felt by others
            prompts = await asyncio.to_thread(lambda: [read(one) for one in given])
        else:
            prompts = [read(one) for one in given]
        count = (max if each else sum)(map(len, prompts))
        if count > self.limits.prompt:
            text = f"{field} has {'a text of ' if each else ''}{count} tokens; {self.limits.prompt} are allowed"
            raise Refused(text, field, code="context_length_exceeded")
        return prompts

    def log_fields(self, request: HttpRequest, prompts: Sequence[Any]) -> Json:
        """What the log will say of a request: a dict to add to."""
        fields: Json = request.scope["dllm"]
        if self.log_prompts:
            fields["prompts"] = prompts
        return fields


def _page() -> tuple[str, str]:
    """The page, and a policy that lets it run its own script and styles and nothing else."""
    page = PAGE.read_text(encoding="utf-8")
    allowed: collections.defaultdict[str, str] = collections.defaultdict(str)
    for tag, text in re.findall(r"<(script|style)>(.*?)</\1>", page, re.DOTALL):
        allowed[tag] += f" 'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
    policy = (
        f"default-src 'none'; script-src{allowed['script']}; style-src{allowed['style']}; connect-src 'self'; img-src data:; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    return page, policy


async def _answer_error(request: HttpRequest, error: Exception) -> Response:
    """The answer to a request that failed."""
    match error:
        case Refused():
            refused = error
        case UserError():
            refused = Refused(str(error)[:500])
        case HTTPException(status_code=status):
            what = {404: "there is nothing here", 405: f"{request.method[:20]} is not for this"}.get(status, error.detail)
            refused = Refused(what, status=status, headers=error.headers)
        case Disconnected() | ClientDisconnect():
            return Response(status_code=499)  # nobody reads it; the log does
        case _:
            raise error
    closing = {"connection": "close"} if refused.status in (408, 413) else {}
    return Response(refused.data(), refused.status, {**refused.headers, **closing}, media_type="application/json")
