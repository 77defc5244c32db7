"""/v1/score and /v1/embeddings: what a model says of a text without continuing it."""

from __future__ import annotations

import base64
import math
from typing import TYPE_CHECKING

import numpy as np
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from ..inference.evaluation import perplexity
from ..kernels.types import Array
from .errors import Refused
from .openai import Fields, Json, json_number, read_json, usage
from .requests import Event, Finished, Request, Token
from .streamed_text import Prompt
from .streams import Inbox, collect, unless_disconnected
from .tokens import mixed

if TYPE_CHECKING:
    from .app import Service


async def score(service: Service, request: HttpRequest) -> Response:
    """The log-probability of each token, nats; the first has none. Raises Refused, Disconnected."""
    fields = Fields(read_json(await request.body()), service.name)
    given = [name for name in ("text", "tokens") if fields.body.get(name) is not None]
    if len(given) != 1:
        raise Refused("either text or tokens must be there")
    if isinstance(fields.body[given[0]], str) != (given[0] == "text"):
        raise Refused("text must be a string, tokens a list of token numbers", given[0])
    texts = fields.texts(given[0], service.vocabulary.size, most=1)
    salt = mixed(request.scope["dllm.salt"], fields.cache_salt)
    fields.refuse_unread()
    prompts = await service.read_prompts(texts, given[0], service.vocabulary.prompt)
    wanted = [Request(prompt=prompts[0].tokens, logprobs=0, score_only=True, salt=salt)]
    (events,), headers = await _compute(service, request, texts, prompts, wanted)
    tokens = [event for event in events if isinstance(event, Token)][prompts[0].blank :]
    values = [json_number(token.logprob) for token in tokens]
    known = [value for value in values if value is not None]
    loss = -math.fsum(known) / len(known) if known else None
    return await service.answer({
        "object": "score", "model": service.name, "loss": loss,
        "perplexity": None if loss is None else perplexity(loss),
        "tokens": [service.vocabulary.name(token.number) for token in tokens],
        "token_ids": [token.number for token in tokens], "token_logprobs": values, "usage": usage(len(prompts[0]), 0),
    }, headers)  # fmt: skip


async def embeddings(service: Service, request: HttpRequest) -> Response:
    """The top layer's output (H,) behind each text, in OpenAI's form. Raises Refused, Disconnected."""
    fields = Fields(read_json(await request.body()), service.name)
    inputs = fields.texts("input", service.vocabulary.size)
    form = fields.get("encoding_format", "float")
    if form not in ("float", "base64"):
        raise Refused("encoding_format must be float or base64", "encoding_format")
    if fields.get("dimensions") is not None:
        raise Refused("dimensions is not supported", "dimensions", code="unsupported_parameter")
    salt = mixed(request.scope["dllm.salt"], fields.cache_salt)
    fields.refuse_unread()
    prompts = await service.read_prompts(inputs, "input", service.vocabulary.prompt)
    wanted = [Request(prompt=prompt.tokens, max_tokens=0, want_state=True, salt=salt) for prompt in prompts]
    streams, headers = await _compute(service, request, inputs, prompts, wanted)
    data = [
        {"object": "embedding", "index": index, "embedding": _vector(events[-1].state, form)}
        for index, events in enumerate(streams)
        if isinstance(events[-1], Finished)
    ]
    counts = usage(sum(map(len, prompts)), 0)
    del counts["completion_tokens"]
    body: Json = {"object": "list", "data": data, "model": service.name, "usage": counts}
    return await service.answer(body, headers)


async def _compute(
    service: Service, request: HttpRequest, given: list[str | list[int]], prompts: list[Prompt], wanted: list[Request]
) -> tuple[list[list[Event]], dict[str, str]]:
    """The events of the streams `wanted`, and headers that say who computed them."""
    fields, inbox = service.log_fields(request, given), Inbox()
    rank, _ = service.peers.submit(dict(enumerate(wanted)), inbox)
    fields["computed_by"], fields["prompt_tokens"], fields["inputs"] = rank, sum(map(len, prompts)), len(prompts)
    events = await unless_disconnected(request.receive, inbox, collect(inbox, len(wanted)))
    return events, {"x-dllm-rank": str(rank)}


def _vector(state: Array | None, form: str) -> str | list[float]:
    vector = np.asarray(state, "<f4")
    if not np.isfinite(vector).all():
        raise Refused("the model gave numbers that are not finite", status=500, code="engine_failed")
    values: list[float] = vector.tolist()
    return base64.b64encode(vector.tobytes()).decode() if form == "base64" else values
