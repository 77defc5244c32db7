"""What each kind of model answers, and what a client is told who asks it for something else."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import TYPE_CHECKING, TypeAlias

from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from ..engines.errors import Refused
from . import labels, scoring, targets, tokenizing
from .bodies import named_model
from .completions import EventStream, complete
from .fields import listed, no_such_model

if TYPE_CHECKING:
    from .service import Service

Handler: TypeAlias = Callable[["Service", HttpRequest], Awaitable[Response | EventStream]]

TOKENS: dict[str, Handler] = {"/tokenize": tokenizing.tokenize, "/detokenize": tokenizing.detokenize}
HANDLERS: dict[str, dict[str, Handler]] = {  # kind -> path -> handler of POST
    "lm": {"/v1/completions": complete, "/v1/score": scoring.score, "/v1/embeddings": scoring.embeddings, **TOKENS},
    "seq2seq": {"/v1/completions": targets.complete, "/v1/score": targets.score, **TOKENS},
    "tagger": {"/v1/tag": labels.tag},
    "classifier": {"/v1/classify": labels.classify},
    "ctc": {"/v1/audio/transcriptions": labels.transcribe},
}
CHAT = "/v1/chat/completions"  # which many clients try first
PATHS = sorted({CHAT, *(path for paths in HANDLERS.values() for path in paths)})
INFO = "/tokenizer_info"  # of GET, where there are TOKENS


def answered_by(kind: str) -> dict[str, Handler]:
    """path -> handler of all that a kind of model answers."""
    info: dict[str, Handler] = {INFO: tokenizing.tokenizer_info}
    return HANDLERS[kind] | (info if "/tokenize" in HANDLERS[kind] else {})


async def choose(services: Sequence[Service], request: HttpRequest) -> tuple[Service, Handler]:
    """The model that a request is for, and what answers it. Raises Refused, Disconnected.

    The only model reads the request itself. Of several it is the one that is named, or the only one that has this path.
    """
    path: str = request.scope["path"]
    having = [one for one in services if path in answered_by(one.kind)]
    chosen = services[0] if len(services) == 1 else await _named(services, having, request)
    handler = answered_by(chosen.kind).get(path)
    if handler is None:
        raise no_such_route([chosen], path)
    return chosen, handler


async def _named(services: Sequence[Service], having: Sequence[Service], request: HttpRequest) -> Service:
    """The one of several that a request names, or the only one of `having`. Raises Refused, Disconnected."""
    if not having:
        raise no_such_route(services, request.scope["path"])
    wanted = await named_model(request, any(one.features for one in having))
    if wanted is not None:
        for one in services:
            if one.name == wanted:
                return one
        raise no_such_model(wanted, *(one.name for one in services), param="model")
    if len(having) > 1:
        there = listed([one.name for one in having])
        raise Refused(f"say which model shall answer, by model: there {there}", "model", code="missing_required_parameter")
    return having[0]


def no_such_route(services: Sequence[Service], path: str) -> Refused:
    """The error of a request for what other kinds of models do: it names what these ones do."""
    texts = [one.name for one in services if "/v1/completions" in HANDLERS[one.kind]]
    if path.endswith(CHAT) and texts:
        who, whom = (f"{' and '.join(texts)} hold", "them") if len(texts) > 1 else (f"{texts[0]} holds", "it")
        text = f"{who} no chats: ask {whom} by POST /v1/completions, with a prompt"
    else:
        told = [f"{one.name} is a model of kind {one.kind}: ask it by POST {', '.join(HANDLERS[one.kind])}" for one in services]
        text = "; ".join(told)
    return Refused(text, status=404, code="unknown_url")
