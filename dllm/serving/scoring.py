"""/v1/score and /v1/embeddings: what a model says of a text without continuing it."""

from __future__ import annotations

import asyncio
import base64
import math
import time
from collections.abc import AsyncIterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
from starlette.requests import Request as HttpRequest
from starlette.responses import Response, StreamingResponse

from ..engines.errors import BUSY, Refused
from ..engines.requests import Event, Finished, Request, Token
from ..engines.streams import Inbox, collect
from ..inference.evaluation import perplexity
from ..kernels.types import Array
from .bodies import read_body, unless_disconnected
from .fields import CHOICES, Fields, Json
from .openai import encode, json_number, usage
from .streamed_text import Prompt
from .tokens import mixed

if TYPE_CHECKING:
    from .service import Service

EMBEDDED = 2048  # texts of a request, as OpenAI has it
PATIENCE, NAP = 20.0, 0.05  # seconds that a turn of a request waits for room, and between its tries


async def score(service: Service, request: HttpRequest) -> Response:
    """The log-probability of each token, nats; the first has none. Raises Refused, Disconnected."""
    fields = Fields(await read_body(request), service.name)
    if service.vocabulary.tokenizer.pairs and fields.body.get("tokens") is None:
        return await _score_target(service, request, fields)
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
    tokens = [event for event in events if isinstance(event, Token)][prompts[0].before :]
    body = score_body(service, [token.number for token in tokens], [token.logprob for token in tokens], len(prompts[0]))
    return await service.answer(body, headers)


async def _score_target(service: Service, request: HttpRequest, fields: Fields) -> Response:
    """The log-probability of each token of a target behind its source, and of its end. Raises Refused, Disconnected."""
    texts = source_and_target(service, fields)
    salt = mixed(request.scope["dllm.salt"], fields.cache_salt)
    fields.refuse_unread()
    (source,) = await service.read_prompts(texts[:1], "source", service.vocabulary.prompt)
    if not len(source):
        raise Refused("source is empty", "source")
    (target,) = await service.read_prompts(texts[1:], "target", service.vocabulary.target)
    said = service.vocabulary.ended(target)
    whole = Prompt(np.concatenate([source.tokens, said]).astype(np.int64))
    if len(whole) > service.limits.prompt:
        raise Refused(f"source and target have {len(whole)} tokens; {service.limits.prompt} are allowed", "target")
    wanted = [Request(prompt=whole.tokens, logprobs=0, score_only=True, salt=salt)]
    (events,), headers = await _compute(service, request, texts, [whole], wanted)
    values = [event.logprob for event in events if isinstance(event, Token)][len(source.tokens) :]
    return await service.answer(score_body(service, said, values, len(source) + len(said), of_target=True), headers)


def source_and_target(service: Service, fields: Fields) -> list[str]:
    """The two texts of a request to a model of pairs. Raises Refused."""
    for name in ("source", "target"):
        if not isinstance(fields.body.get(name), str):
            why = f"{service.name} was trained on pairs, so it says how probable a target is after a source"
            raise Refused(f"{name} must be there, a string: {why}", name)
    return [str(fields.texts(name, service.vocabulary.size, most=1)[0]) for name in ("source", "target")]


def score_body(
    service: Service, tokens: Sequence[int], values: Sequence[float | None], read: int, of_target: bool = False
) -> Json:
    """What there is to say of log-probabilities, nats, of tokens in a row; of a target log P, too.

    read : tokens that count as read
    """
    values = [json_number(value) for value in values]
    known = [value for value in values if value is not None]
    total = math.fsum(known)
    loss = -total / len(known) if known else None
    return {
        "object": "score", "model": service.name, **({"logprob": total} if of_target else {}),
        "loss": loss, "perplexity": None if loss is None else perplexity(loss),
        "tokens": service.vocabulary.names(tokens), "token_ids": [*tokens],
        "token_logprobs": values, "usage": usage(read, 0),
    }  # fmt: skip


async def embeddings(service: Service, request: HttpRequest) -> Response:
    """The top layer's output (H,) behind each text, in OpenAI's form. Raises Refused, Disconnected.

    Many texts are computed some at a time, so that others have their turn, and are written some at a time. The prompt's limit
    is that of each text, since clients send as many as they have; in all they are limited by the body.
    """
    fields = Fields(await read_body(request), service.name)
    inputs = fields.texts("input", service.vocabulary.size, EMBEDDED)
    form = fields.get("encoding_format", "float")
    if form not in ("float", "base64"):
        raise Refused("encoding_format must be float or base64", "encoding_format")
    if fields.get("dimensions") is not None:
        raise Refused("dimensions is not supported", "dimensions", code="unsupported_parameter")
    salt = mixed(request.scope["dllm.salt"], fields.cache_salt)
    fields.refuse_unread()
    prompts = await service.read_prompts(inputs, "input", service.vocabulary.prompt, each=True)
    wanted = [Request(prompt=prompt.tokens, max_tokens=0, want_state=True, salt=salt) for prompt in prompts]
    streams, headers = await _compute(service, request, inputs, prompts, wanted)
    states = [np.asarray(events[-1].state, "<f4") for events in streams if isinstance(events[-1], Finished)]
    if not all(np.isfinite(state).all() for state in states):
        raise Refused("the model gave numbers that are not finite", status=500, code="engine_failed")
    counts = usage(sum(map(len, prompts)), 0)
    del counts["completion_tokens"]
    tail = encode({"model": service.name, "usage": counts})[1:]
    return StreamingResponse(_embedding_list(states, form, tail), media_type="application/json", headers=headers)


async def _embedding_list(states: Sequence[Array], form: str, tail: str) -> AsyncIterator[str]:
    """The JSON of a list of states, in parts. tail : what is behind it, with the brace that ends all"""
    start = '{"object":"list","data":['
    for index, state in enumerate(states):
        vector = base64.b64encode(state.tobytes()).decode() if form == "base64" else state.tolist()
        yield start + encode({"object": "embedding", "index": index, "embedding": vector})
        start = ","
        await asyncio.sleep(0)
    yield "]," + tail


async def _compute(
    service: Service, request: HttpRequest, given: Sequence[str | list[int]], prompts: list[Prompt], wanted: list[Request]
) -> tuple[list[list[Event]], dict[str, str]]:
    """The events of the streams `wanted`, some at a time, and headers that say who computed the last of them."""
    fields, found, rank = service.log_fields(request, given), list[list[Event]](), service.peers.rank
    fields["prompt_tokens"], fields["inputs"] = sum(map(len, prompts)), len(prompts)
    turn = max(1, min(CHOICES, service.engine.slots, service.engine.queue))
    for start in range(0, len(wanted), turn):
        part, until = dict(enumerate(wanted[start : start + turn])), time.monotonic() + PATIENCE
        while True:
            inbox = Inbox()
            try:
                rank, _ = service.peers.submit(part, inbox)
                found += await unless_disconnected(request.receive, inbox, collect(inbox, len(part)))
                break
            except Refused as refused:  # who has begun waits a while for room
                if refused.code != BUSY or not start or time.monotonic() > until:
                    raise
            await asyncio.sleep(NAP)
    fields["computed_by"] = rank
    return found, {"x-dllm-rank": str(rank)}
