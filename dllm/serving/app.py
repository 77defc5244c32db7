"""The routes: what is asked over HTTP, and what answers it. Nothing is computed in the event loop."""

import asyncio
import base64
import collections
import hashlib
import json
import math
import pathlib
import re
import time

import numpy as np
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from ..errors import UserError
from . import metrics, openapi
from .completions import Run
from .engine import Finished, Full, Request
from .limits import Guard
from .openai import Answer, Completion, Fields, Refused, busy, finite, models, read_json, usage
from .peers import LOST
from .streams import Gone, Inbox
from .text import Vocabulary

PAGE = pathlib.Path(__file__).with_name("page.html")
RANK = "x-dllm-rank"  # which rank computed an answer
encode = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode


class Service:
    """What one rank answers.

    Parameters
    ----------
    bundle : Bundle
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
        self.created, self.state = int(time.time()), "ok"
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
            Route("/v1/score", self.score, methods=["POST"]),
            Route("/v1/embeddings", self.embeddings, methods=["POST"]),
        ]  # fmt: skip
        handlers = {Refused: _refused, HTTPException: _http_error, Gone: _gone, ClientDisconnect: _gone, UserError: _user_error}
        inside = Starlette(routes=routes, exception_handlers=handlers)
        inside.router.redirect_slashes = False
        return Guard(inside, self.limits, token, hosts, self._finished)

    def _finished(self, scope, status, seconds):
        notes = scope["dllm"]
        route = getattr(scope.get("route"), "path", "other")
        self.answered.add(route, status, seconds)
        if route in ("/health", "/metrics") and status == 200:
            return  # asked for all the time
        notes = {name: value for name, value in notes.items() if name != "known"}
        self.log("request", method=scope["method"][:10], route=route, status=status, seconds=round(seconds, 4), **notes)

    # ---- what is there

    async def health(self, request):
        if not request.scope["dllm"]["known"]:
            return JSONResponse({"status": self.state})
        ranks = []
        for rank, (report, silence, dead) in self.peers.gossip.table().items():
            state = "dead" if dead else "silent" if silence > LOST else "draining" if report["draining"] else "ok"
            shown = {name: value for name, value in report.items() if name not in ("address", "draining", "drained")}
            ranks.append({"rank": rank, "state": state, **shown, "heard_seconds_ago": round(silence, 3)})
        return JSONResponse({"status": self.state, "rank": self.peers.rank, "model": self.name, "ranks": ranks})

    async def metrics(self, request):
        text = metrics.text(self.engine.load(), self.answered, self.peers.gossip.table(), self.peers.rank)
        return Response(text, media_type="text/plain; version=0.0.4; charset=utf-8")

    async def models(self, request):
        return JSONResponse(models(self.name, self.created))

    # ---- what is computed

    async def completions(self, request):
        body = read_json(await request.body())
        wanted = Completion.read(body, self.name, self.vocabulary.size, self.limits.tokens)
        notes = self._note(request, prompts=wanted.prompts, stream=wanted.stream)
        prompts = await self._prompts(wanted.prompts, "prompt")
        run = Run(wanted, prompts, self.vocabulary, self.peers, Inbox())
        notes["computed_by"], answer = run.rank, Answer(self.name, wanted.seed)
        headers = {RANK: str(run.rank)}
        if wanted.stream:
            return Events(run, answer, wanted.include_usage, headers, notes)
        choices = await _unless_gone(request.receive, run.inbox, run.whole())
        notes["prompt_tokens"], notes["completion_tokens"] = run.counts
        return _json(answer.body(choices, run.counts), headers)

    async def score(self, request):
        fields = Fields(read_json(await request.body()), self.name)
        given = [name for name in ("text", "tokens") if fields.body.get(name) is not None]
        if len(given) != 1:
            raise Refused("either text or tokens must be there")
        if isinstance(fields.body[given[0]], str) != (given[0] == "text"):
            raise Refused("text must be a string, tokens a list of token numbers", given[0])
        texts = fields.texts(given[0], self.vocabulary.size, most=1)
        fields.done()
        notes = self._note(request, prompts=texts)
        prompt = (await self._prompts(texts, given[0]))[0]
        inbox, tokens = Inbox(), []
        notes["computed_by"] = rank = self.peers.choose(1)
        try:
            self.peers.submit(rank, Request(prompt=prompt.tokens, max_tokens=0, logprobs=0, score_only=True), inbox, 0)
        except Full:
            raise busy() from None

        async def collect():
            while True:
                for _, event in await inbox.get():
                    if isinstance(event, Finished):
                        if event.reason == "error":
                            raise Refused(event.message, status=500, code="engine_failed")
                        return
                    tokens.append(event)

        await _unless_gone(request.receive, inbox, collect())
        tokens = tokens[prompt.blank :]
        values = [finite(token.logprob) for token in tokens]
        told = [value for value in values if value is not None]
        loss = -math.fsum(told) / len(told) if told else None
        notes["prompt_tokens"] = len(prompt)
        return _json({
            "object": "score", "model": self.name, "loss": loss,
            "perplexity": None if loss is None else math.exp(min(loss, 700)),
            "tokens": [self.vocabulary.name(token.number) for token in tokens],
            "token_ids": [int(token.number) for token in tokens],
            "token_logprobs": values, "usage": usage(len(prompt), 0),
        }, {RANK: str(rank)})  # fmt: skip

    async def embeddings(self, request):
        fields = Fields(read_json(await request.body()), self.name)
        inputs = fields.texts("input", self.vocabulary.size)
        form = fields.take("encoding_format", "float")
        if form not in ("float", "base64"):
            raise Refused("encoding_format must be float or base64", "encoding_format")
        if fields.take("dimensions") is not None:
            raise Refused("dimensions is not supported", "dimensions", code="unsupported_parameter")
        fields.done()
        notes = self._note(request, prompts=inputs)
        prompts = await self._prompts(inputs, "input")
        states = await self._states(prompts)
        notes["prompt_tokens"] = count = sum(map(len, prompts))
        data = [
            {"object": "embedding", "index": index, "embedding": _vector(state, form)} for index, state in enumerate(states)
        ]  # fmt: skip
        counts = {"prompt_tokens": count, "total_tokens": count}
        body = {"object": "list", "data": data, "model": self.name, "usage": counts}
        return _json(body, {RANK: str(self.peers.rank)})

    async def _states(self, prompts):
        """The final hidden state of each prompt, (n, H) float32."""
        try:
            return await asyncio.to_thread(self.engine.embeddings, [prompt.tokens for prompt in prompts])
        except Full:
            raise busy() from None

    async def _prompts(self, given, field):
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

    def _note(self, request, prompts, **notes):
        """What the log will say of a request: a dict to add to."""
        if self.log_prompts:
            notes["prompts"] = prompts
        request.scope["dllm"].update(notes)
        return request.scope["dllm"]


class Events:
    """A response of server-sent events: a Run as it comes."""

    def __init__(self, run, answer, include_usage, headers, notes):
        self.run, self.answer, self.include_usage, self.headers, self.notes = run, answer, include_usage, headers, notes

    async def __call__(self, scope, receive, send):
        names = {"content-type": "text/event-stream; charset=utf-8", "cache-control": "no-store", **self.headers}
        headers = [(name.encode(), value.encode()) for name, value in names.items()]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await _unless_gone(receive, self.run.inbox, self._stream(send))
        await send({"type": "http.response.body", "body": b""})

    async def _stream(self, send):
        more = {"usage": None} if self.include_usage else {}
        try:
            async for parts in self.run.parts():
                text = "".join(f"data: {encode(self.answer.body([part]) | more)}\n\n" for part in parts)
                await send({"type": "http.response.body", "body": text.encode(), "more_body": True})
            end = "data: [DONE]\n\n"
            if self.include_usage:
                end = f"data: {encode(self.answer.body([], self.run.counts))}\n\n{end}"
        except Refused as refused:
            end = f"data: {encode(refused.body())}\n\n"
        finally:
            self.notes["prompt_tokens"], self.notes["completion_tokens"] = self.run.counts
        await send({"type": "http.response.body", "body": end.encode(), "more_body": True})


async def _unless_gone(receive, inbox, work):
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


def _vector(state, form):
    state = np.asarray(state, "<f4")
    return base64.b64encode(state.tobytes()).decode() if form == "base64" else [float(value) for value in state]


def _json(body, headers):
    return Response(encode(body), media_type="application/json", headers=headers)


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
    closing = {"connection": "close"} if refused.status == 413 else {}
    return JSONResponse(refused.body(), refused.status, {**(refused.headers or {}), **closing})


async def _user_error(request, error):
    return await _refused(request, Refused(str(error)[:500]))


async def _http_error(request, error):
    what = {404: "there is nothing here", 405: f"{request.method[:20]} is not for this"}.get(error.status_code, error.detail)
    return await _refused(request, Refused(what, status=error.status_code, headers=error.headers))


async def _gone(request, error):
    return Response(status_code=499)  # nobody reads it; the log does
