"""/v1/completions and /v1/score of a model that gives targets to sources."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from ..engines.errors import Refused
from ..engines.requests import Event, Finished, SourceRequest, Token
from ..engines.streams import check_finished
from .bodies import read_body
from .completions import CompletionChoice, CompletionRun, EventStream, answer
from .fields import Fields
from .openai import Completion
from .scoring import score_body, source_and_target
from .sources import ask, check_source

if TYPE_CHECKING:
    from .service import Service


class TargetRun(CompletionRun):
    """See CompletionRun. A stream is a source, and makes all of its choices."""

    @property
    def _texts(self) -> int:
        return self._wanted.n

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
    body = await read_body(request)
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
    fields = Fields(await read_body(request), service.name)
    texts = source_and_target(service, fields)
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
    said = service.vocabulary.ended(target)
    return await service.answer(score_body(service, said, found[0].tolist(), len(source) + len(said), of_target=True), headers)
