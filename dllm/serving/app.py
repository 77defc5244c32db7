"""The routes of a rank: what is asked over HTTP, and which model answers it. Nothing is computed in the event loop.

To add a route: a handler here or in a file beside this, its Route in App.asgi, or, where something is computed, its line in
routes.py, and its description in openapi.py. guard.py lists the paths that need no token.
"""

from __future__ import annotations

import asyncio
import base64
import collections
import hashlib
import pathlib
import re
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Scope

from ..engines.errors import Disconnected, Refused
from ..engines.limits import Limits
from ..errors import UserError
from ..peers.counts import OTHER, Ledger, RequestCounts
from ..peers.reports import LOAD, Entry, news, state_of
from . import metrics, openapi
from .completions import EventStream
from .fields import CHOICES
from .guard import Guard
from .log import Log
from .openai import model_body, models_body
from .origins import Origins
from .routes import INFO, PATHS, answered_by, choose, no_such_route
from .service import Service
from .tokens import Clients

if TYPE_CHECKING:
    from ..comm.membership import Membership

WITH_PAGE = "lm", "seq2seq"  # kinds that the page for people is of
ONE = "/v1/models/"  # and the name of a model
WATCHED = "/health", "/health/ready", "/metrics"  # asked for all the time
PAGE = pathlib.Path(__file__).with_name("page.html")


class App:
    """What one rank answers.

    Parameters
    ----------
    services : sequence of Service
        The models, in the order of the command.
    gossip : comm.membership.Membership
    limits : limits.Limits
    log : log.Log

    Attributes
    ----------
    state : str
        "ok", or "draining": no new requests should come.
    """

    def __init__(self, services: Sequence[Service], gossip: Membership, limits: Limits, log: Log) -> None:
        self.services, self.gossip, self.limits, self.log = services, gossip, limits, log
        self.names = [one.name for one in services]
        self.created, self.state = int(time.time()), "ok"
        self._scraping, self._ledger = asyncio.Lock(), Ledger()
        self._answered = RequestCounts([])  # of requests that reach no model, until its routes are known

    def asgi(self, clients: Clients, origins: Origins | None = None, root: str = "") -> ASGIApp:
        """The ASGI application. clients, origins, root: see guard.Guard."""
        page, policy = _page()
        description = openapi.describe([_described(one) for one in self.services], self.limits, clients.needed)
        description |= {"servers": [{"url": root}]} if root else {}

        async def show_page(request: HttpRequest) -> Response:
            of_texts = any(one.kind in WITH_PAGE for one in self.services)
            if request.scope["dllm"]["authenticated"] and not of_texts:  # which strangers are not to learn
                raise no_such_route(self.services, "/")
            headers = {"content-security-policy": policy, "cache-control": "no-cache", "referrer-policy": "no-referrer"}
            return Response(page, media_type="text/html", headers=headers)

        async def describe(request: HttpRequest) -> Response:
            return JSONResponse(description)

        routes = [
            Route("/", show_page), Route("/openapi.json", describe),
            Route("/health", self.health), Route("/health/ready", self.ready), Route("/metrics", self.metrics),
            Route("/v1/models", self.models), Route(ONE + "{model:path}", self.model), Route(INFO, self.answer),
            *(Route(path, self.answer, methods=["POST"]) for path in PATHS),
        ]  # fmt: skip
        kinds = Refused, HTTPException, Disconnected, ClientDisconnect, UserError
        others = set(PATHS).difference(*(answered_by(one.kind) for one in self.services))
        self._answered = RequestCounts([_counted(one.path) for one in routes if one.path not in others])
        inside = Starlette(routes=routes, exception_handlers=dict.fromkeys(kinds, _answer_error))
        inside.router.redirect_slashes = False
        return Guard(inside, self.limits, clients, origins or Origins(), self._finished, root)

    def _finished(self, scope: Scope, status: int | None, seconds: float) -> None:
        fields = {name: value for name, value in scope["dllm"].items() if name != "authenticated"}
        asked = _counted(scope["path"])
        route = asked if asked in self._answered.routes else OTHER
        reached = next((one.answered for one in self.services if one.name == fields.get("model")), self._answered)
        counts = reached if route in reached.routes else self._answered
        counts.add(route, status, seconds, fields.get("inputs", 0) if status == 200 else 0)
        if route in WATCHED and status in (200, 503):
            return
        line = {"method": scope["method"][:10], "route": route, "status": status, "seconds": round(seconds, 4), **fields}
        if scope["dllm"].get("authenticated"):
            self.log("request", **line)
        else:
            self.log.limited("requests of strangers", "request", **line)

    async def answer(self, request: HttpRequest) -> Response | EventStream:
        """What a model answers. Raises Refused, Disconnected."""
        service, handler = await choose(self.services, request)
        request.scope["dllm"]["model"] = service.name
        return await handler(service, request)

    # ---- what is there

    async def health(self, request: HttpRequest) -> Response:
        """How this rank and, for those who have the token, all others are."""
        if not request.scope["dllm"]["authenticated"]:
            return JSONResponse({"status": self.state})
        ranks, several = [], len(self.services) > 1
        for rank, entry in self.gossip.table().items():
            report, silence, _ = entry
            loads = [{name: one[name] for name in LOAD} for one in report["models"]]
            told = {name: sum(load[name] for load in loads) for name in LOAD}
            about = {"rank": rank, "state": state_of(entry), "host": report["host"], "pid": report["pid"], **told}
            ranks.append(about | {"heard_seconds_ago": round(silence, 3)})
            if several:
                ranks[-1]["models"] = [{"model": name, **load} for name, load in zip(self.names, loads, strict=True)]
        models = [{"model": one.name, "kind": one.kind} for one in self.services]
        which = {"models": models} if several else {"model": self.names[0]}
        return JSONResponse({"status": self.state, "rank": self.gossip.rank, **which, "ranks": ranks})

    async def ready(self, request: HttpRequest) -> Response:
        """Whether requests should come to this rank. /health is about whether it is there at all."""
        well = self.state == "ok" and all(one.alive for one in self.services)
        return JSONResponse({"status": "ok" if well else "draining"}, 200 if well else 503)

    def report(self) -> dict[str, Any]:
        """What this rank tells all others of what it does: in the thread of the gossip, too."""
        rows, models = self._answered.rows(), [one.numbers() for one in self.services]
        return {"draining": self.state != "ok", "rows": rows, "models": models}

    async def metrics(self, request: HttpRequest) -> Response:
        """What all ranks do and have done, for Prometheus."""
        size = self.gossip.size
        if size > 1:
            await news(self.gossip)
        async with self._scraping:  # so that the ledger sees reports in their order
            table: Mapping[int, Entry] = self.gossip.table() if size > 1 else {0: (self.report(), 0.0, False)}
            text = await asyncio.to_thread(self._render, table, size)
        return Response(text, media_type="text/plain; version=0.0.4; charset=utf-8")

    def _render(self, table: Mapping[int, Entry], size: int) -> str:
        known = {rank: (self._ledger.take(rank, report), age, dead) for rank, (report, age, dead) in table.items()}
        return metrics.render([one.series for one in self.services], self._answered.routes, known, size)

    async def models(self, request: HttpRequest) -> Response:
        """All models, in OpenAI's form."""
        return JSONResponse(models_body(self.names, self.created))

    async def model(self, request: HttpRequest) -> Response:
        """The one that a client names."""
        return JSONResponse(model_body(request.path_params["model"], self.names, self.created))


def _counted(path: str) -> str:
    """The route that a path is counted as: any name of a model is one."""
    return f"{ONE}NAME" if path.startswith(ONE) else path


def _described(service: Service) -> openapi.Described:
    """What the description says of a model."""
    tokenizer = service.vocabulary.tokenizer
    kind = openapi.described_as(service.kind, service.features > 0, tokenizer.pairs)
    return openapi.Described(service.name, service.vocabulary.size, kind, min(CHOICES, service.engine.slots))


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
