"""/v1/completions and /v1/score of a model that gives targets to sources."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from ..inference.evaluation import perplexity
from .completions import CompletionChoice, CompletionRun, EventStream, answer
from .errors import Refused
from .openai import Completion, Fields, json_number, read_json, usage
from .requests import Event, Finished, SourceRequest, Token
from .sources import ask, check_source
from .streams import check_finished

if TYPE_CHECKING:
    from .app import Service


class TargetRun(CompletionRun):
    """See CompletionRun. A stream is a source, and makes all of its choices."""

    def _requests(self) -> Mapping[int, SourceRequest]:
        wanted, found = self._wanted, dict[int, SourceRequest]()
        for one in self._left:
            stream = one.index // wanted.n
            found[stream] = SourceRequest(
                source=one.prompt.tokens, max_tokens=wanted.max_tokens, beams=wanted.best_of, best=wanted.n,
                logprobs=wanted.logprobs,
            )  # fmt: skip
        return found

    def _choices(self, stream: int) -> list[CompletionChoice]:
        n = self._wanted.n
        return self.choices[stream * n : stream * n + n]

    def _add(self, stream: int, event: Event) -> None:
        if not isinstance(event, Finished):
            self._choices(stream)[0].add(event)
            return
        check_finished(event)
        facts, *texts = event.found or (np.zeros((3, 0)),)
        for choice, tokens, ended in zip(self._choices(stream), texts, facts[0], strict=False):
            end = [choice.vocabulary.end] if ended else []
            for token in [*tokens.tolist(), *end]:
                choice.add(Token(token, None, []))
        for choice in self._choices(stream):
            choice.add(event)


async def complete(service: Service, request: HttpRequest) -> Response | EventStream:
    """Targets of sources: the likeliest token each time, as they come where that is wanted, or the best of a search.

    Raises Refused, Disconnected.
    """
    body = read_json(await request.body())
    wanted = Completion.read(body, service.name, service.vocabulary.size, service.limits.tokens, searched=True)
    prompts = await service.read_prompts(wanted.prompts, "prompt", service.vocabulary.source)
    for prompt in prompts:
        check_source(service, prompt.tokens, "prompt")
    if wanted.best_of > service.engine.slots:
        raise Refused(f"best_of may be {service.engine.slots} here, as many as --slots has", "best_of")
    rows, most = wanted.best_of * max(len(prompt.tokens) for prompt in prompts), service.limits.attention
    if rows > most:
        raise Refused(f"best_of x tokens of a source are {rows}; {most} are allowed", "best_of")
    return await answer(service, request, wanted, prompts, TargetRun)


async def score(service: Service, request: HttpRequest) -> Response:
    """How probable a target is after its source: log P of its tokens and its end, nats. Raises Refused, Disconnected."""
    fields = Fields(read_json(await request.body()), service.name)
    for name in ("source", "target"):
        if not isinstance(fields.body.get(name), str):
            raise Refused(f"{name} must be there, a string: this model says how probable a target is after a source", name)
    texts = [str(fields.texts(name, service.vocabulary.size, most=1)[0]) for name in ("source", "target")]
    fields.refuse_unread()
    (source,) = await service.read_prompts(texts[:1], "source", service.vocabulary.source)
    (target,) = await service.read_prompts(texts[1:], "target", service.vocabulary.target)
    check_source(service, source.tokens, "source")
    if len(target) > service.limits.tokens:
        what = f"target has {len(target)} tokens; {service.limits.tokens} are allowed"
        raise Refused(what, "target", status=413, code="too_large")
    wanted = [SourceRequest(source=source.tokens, target=target.tokens)]
    request.scope["dllm"]["inputs"] = 1
    (found,), headers = await ask(service, request, texts, wanted)
    values, tokens = found[0].tolist(), [*target.tokens.tolist(), service.vocabulary.end]
    total = math.fsum(values)
    loss = -total / len(values)
    return await service.answer({
        "object": "score", "model": service.name, "logprob": json_number(total), "loss": json_number(loss),
        "perplexity": perplexity(loss), "tokens": [service.vocabulary.name(token) for token in tokens], "token_ids": tokens,
        "token_logprobs": [*map(json_number, values)], "usage": usage(len(source) + len(tokens), 0),
    }, headers)  # fmt: skip
