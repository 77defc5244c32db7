"""What is told of texts without continuing them: /v1/score and /v1/embeddings."""

import base64
import math

import numpy as np

from .openai import Fields, Refused, finite, read_json, usage
from .requests import Request
from .streams import Inbox, gather, unless_gone


async def score(service, request):
    """The log-probability of each token, nats; the first has none."""
    fields = Fields(read_json(await request.body()), service.name)
    given = [name for name in ("text", "tokens") if fields.body.get(name) is not None]
    if len(given) != 1:
        raise Refused("either text or tokens must be there")
    if isinstance(fields.body[given[0]], str) != (given[0] == "text"):
        raise Refused("text must be a string, tokens a list of token numbers", given[0])
    texts = fields.texts(given[0], service.vocabulary.size, most=1)
    fields.done()
    prompt = (await service.prompts(texts, given[0]))[0]
    what = {0: Request(prompt=prompt.tokens, logprobs=0, score_only=True)}
    found, headers = await _compute(service, request, texts, [prompt], what)
    tokens = found[0][prompt.blank : -1]
    values = [finite(token.logprob) for token in tokens]
    told = [value for value in values if value is not None]
    loss = -math.fsum(told) / len(told) if told else None
    return await service.answer({
        "object": "score", "model": service.name, "loss": loss,
        "perplexity": None if loss is None else math.exp(min(loss, 700)),
        "tokens": [service.vocabulary.name(token.number) for token in tokens],
        "token_ids": [token.number for token in tokens], "token_logprobs": values, "usage": usage(len(prompt), 0),
    }, headers)  # fmt: skip


async def embeddings(service, request):
    """The top layer's output (H,) behind each text, in OpenAI's form."""
    fields = Fields(read_json(await request.body()), service.name)
    inputs = fields.texts("input", service.vocabulary.size)
    form = fields.take("encoding_format", "float")
    if form not in ("float", "base64"):
        raise Refused("encoding_format must be float or base64", "encoding_format")
    if fields.take("dimensions") is not None:
        raise Refused("dimensions is not supported", "dimensions", code="unsupported_parameter")
    fields.done()
    prompts = await service.prompts(inputs, "input")
    what = {index: Request(prompt=prompt.tokens, max_tokens=0, want_state=True) for index, prompt in enumerate(prompts)}
    found, headers = await _compute(service, request, inputs, prompts, what)
    data = [
        {"object": "embedding", "index": index, "embedding": _vector(events[-1].state, form)} for index, events in found.items()
    ]
    counts = usage(sum(map(len, prompts)), 0)
    del counts["completion_tokens"]
    return await service.answer({"object": "list", "data": data, "model": service.name, "usage": counts}, headers)


async def _compute(service, request, given, prompts, what):
    """What `gather` returns for the requests `what`, and headers that say who computed it."""
    notes, inbox = service.note(request, given), Inbox()
    rank, _ = service.peers.begin(what, inbox)
    notes["computed_by"], notes["prompt_tokens"] = rank, sum(map(len, prompts))
    return await unless_gone(request.receive, inbox, gather(inbox, len(what))), {"x-dllm-rank": str(rank)}


def _vector(state, form):
    state = np.asarray(state, "<f4")
    return base64.b64encode(state.tobytes()).decode() if form == "base64" else state.tolist()
