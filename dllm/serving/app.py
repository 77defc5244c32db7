"""The routes: what is asked over HTTP, and what answers it. Nothing is computed in the event loop."""

import asyncio
import base64
import collections
import functools
import hashlib
import pathlib
import re
import time

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from ..errors import UserError
from . import metrics, openapi, readings
from .completions import Events, Run
from .limits import Guard
from .openai import Answer, Completion, Refused, encode, models, read_json
from .peers import state_of
from .streams import Gone, unless_gone
from .text import Vocabulary

MOST_TOLD = 32  # times the tokens of a choice: that an answer may have, counting alternatives
PAGE = pathlib.Path(__file__).with_name("page.html")


class Service:
    """What one rank answers.

    Parameters
    ----------
    bundle : LoadedModel
    local : streams.Local
    peers : peers.Peers
    limits : limits.Limits
    log : limits.Log
    log_prompts : bool
        Whether the log has the prompts, too.
    """

    def __init__(self, bundle, local, peers, limits, log, log_prompts=False):
        self.name, self.vocabulary = bundle.name, Vocabulary(bundle.tokenizer)
        self.engine, self.peers, self.limits = local.engine, peers, limits
        self.log, self.log_prompts = log, log_prompts
        self.created, self.state, self.writing = int(time.time()), "ok", asyncio.Lock()
        self.answered = metrics.Answered()

    def app(self, token=None, hosts=None):
        """The ASGI application. token, hosts: see limits.Guard."""
        page, policy = _page()
        description = openapi.describe(self.name, self.vocabulary.size, self.limits, token is not None)

        async def show_page(request):
            headers = {"content-security-policy": policy, "cache-control": "no-cache", "referrer-policy": "no-referrer"}
            return Response(page, media_type="text/html", headers=headers)

        async def describe(request):
            return JSONResponse(description)

        routes = [
            Route("/", show_page), Route("/openapi.json", describe),
            Route("/health", self.health), Route("/metrics", self.metrics), Route("/v1/models", self.models),
            Route("/v1/completions", self.completions, methods=["POST"]),
            Route("/v1/score", functools.partial(readings.score, self), methods=["POST"]),
            Route("/v1/embeddings", functools.partial(readings.embeddings, self), methods=["POST"]),
        ]  # fmt: skip
        handlers = {Refused: _refused, HTTPException: _http_error, Gone: _gone, ClientDisconnect: _gone, UserError: _user_error}
        self.paths = {route.path for route in routes}
        inside = Starlette(routes=routes, exception_handlers=handlers)
        inside.router.redirect_slashes = False
        return Guard(inside, self.limits, token, hosts, self._finished)

    def _finished(self, scope, status, seconds):
        notes = scope["dllm"]
        route = scope["path"] if scope["path"] in self.paths else "other"
        self.answered.add(route, status, seconds)
        if route in ("/health", "/metrics") and status == 200:
            return  # asked for all the time
        notes = {name: value for name, value in notes.items() if name != "known"}
        self.log("request", method=scope["method"][:10], route=route, status=status, seconds=round(seconds, 4), **notes)

    # ---- what is there

    async def health(self, request):
        if not request.scope["dllm"]["known"]:
            return JSONResponse({"status": self.state})
        ranks, table = [], self.peers.gossip.table()
        for rank, (report, silence, _) in table.items():
            state = state_of(table[rank])
            shown = {name: value for name, value in report.items() if name not in ("address", "draining", "drained")}
            ranks.append({"rank": rank, "state": state, **shown, "heard_seconds_ago": round(silence, 3)})
        return JSONResponse({"status": self.state, "rank": self.peers.rank, "model": self.name, "ranks": ranks})

    async def metrics(self, request):
        table = self.peers.gossip.table()
        up = {rank: state_of(entry) == "ok" for rank, entry in table.items()}
        text = metrics.text(self.engine.load(), self.answered, table, self.peers.rank, up)
        return Response(text, media_type="text/plain; version=0.0.4; charset=utf-8")

    async def models(self, request):
        return JSONResponse(models(self.name, self.created))

    # ---- what is computed

    async def completions(self, request):
        body = read_json(await request.body())
        wanted = Completion.read(body, self.name, self.vocabulary.size, self.limits.tokens)
        notes = self.note(request, prompts=wanted.prompts, stream=wanted.stream)
        prompts = await self.prompts(wanted.prompts, "prompt")
        run = Run(wanted, prompts, self.vocabulary, self.peers, MOST_TOLD * self.limits.tokens)
        notes["computed_by"], answer = run.rank, Answer(self.name, wanted.seed)
        headers = {"x-dllm-rank": str(run.rank)}
        if wanted.stream:
            return Events(run, answer, wanted.include_usage, headers, notes)
        choices = await unless_gone(request.receive, run.inbox, run.whole())
        notes["prompt_tokens"], notes["completion_tokens"] = run.counts
        return await self.answer(answer.body(choices, run.counts), headers)

    async def answer(self, body, headers):
        """A response of JSON. Large ones are written one at a time, and others get their turn in between."""
        async with self.writing:
            await asyncio.sleep(0)
            return Response(encode(body), media_type="application/json", headers=headers)

    async def prompts(self, given, field):
        """The Prompts of texts and token numbers. Raises Refused."""
        if sum(map(len, given)) > 2000:  # long enough to be felt by others
            prompts = await asyncio.to_thread(lambda: [self.vocabulary.prompt(one) for one in given])
        else:
            prompts = [self.vocabulary.prompt(one) for one in given]
        count = sum(map(len, prompts))
        if count > self.limits.prompt:
            text = f"{field} has {count} tokens; {self.limits.prompt} are allowed"
            raise Refused(text, field, code="context_length_exceeded")
        return prompts

    def note(self, request, prompts, **notes):
        """What the log will say of a request: a dict to add to."""
        if self.log_prompts:
            notes["prompts"] = prompts
        request.scope["dllm"].update(notes)
        return request.scope["dllm"]


def _page():
    """The page, and a policy that lets it run its own script and styles and nothing else."""
    page = PAGE.read_text(encoding="utf-8")
    allowed = collections.defaultdict(str)
    for tag, text in re.findall(r"<(script|style)>(.*?)</\1>", page, re.DOTALL):
        allowed[tag] += f" 'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
    policy = (
        f"default-src 'none'; script-src{allowed['script']}; style-src{allowed['style']}; connect-src 'self'; img-src data:; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    return page, policy


async def _refused(request, refused):
    closing = {"connection": "close"} if refused.status in (408, 413) else {}
    headers = {**refused.headers, **closing}
    return Response(refused.data(), refused.status, headers, media_type="application/json")


async def _user_error(request, error):
    return await _refused(request, Refused(str(error)[:500]))


async def _http_error(request, error):
    what = {404: "there is nothing here", 405: f"{request.method[:20]} is not for this"}.get(error.status_code, error.detail)
    return await _refused(request, Refused(what, status=error.status_code, headers=error.headers))


async def _gone(request, error):
    return Response(status_code=499)  # nobody reads it; the log does
