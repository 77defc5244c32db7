"""What each kind of model answers, and what a client is told who asks it for something else."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, TypeAlias

from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from . import labels, scoring, targets, tokenizing
from .completions import EventStream, complete
from .errors import Refused

if TYPE_CHECKING:
    from .app import Service

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


async def tokenizer_info(service: Service, request: HttpRequest) -> Response:
    """What the tokenizer is, where there are tokens. Raises Refused."""
    answer = tokenizing.tokenizer_info if "/tokenize" in HANDLERS[service.kind] else no_such_route
    return await answer(service, request)


async def no_such_route(service: Service, request: HttpRequest) -> Response:
    """Refuse what another kind of model does, and name what this one does."""
    if request.scope["path"].endswith(CHAT) and "/v1/completions" in HANDLERS[service.kind]:
        text = f"{service.name} holds no chats: ask it by POST /v1/completions, with a prompt"
        raise Refused(text, status=404, code="unknown_url")
    there = ", ".join(HANDLERS[service.kind])
    raise Refused(f"{service.name} is a model of kind {service.kind}: ask it by POST {there}", status=404, code="unknown_url")
