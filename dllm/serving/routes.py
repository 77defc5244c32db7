"""What each kind of model answers, and what a client is told who asks it for something else."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, TypeAlias

from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from . import labels, scoring, targets
from .completions import EventStream, complete
from .errors import Refused

if TYPE_CHECKING:
    from .app import Service

Handler: TypeAlias = Callable[["Service", HttpRequest], Awaitable[Response | EventStream]]

HANDLERS: dict[str, dict[str, Handler]] = {  # kind -> path -> handler of POST
    "lm": {"/v1/completions": complete, "/v1/score": scoring.score, "/v1/embeddings": scoring.embeddings},
    "seq2seq": {"/v1/completions": targets.complete, "/v1/score": targets.score},
    "tagger": {"/v1/tag": labels.tag},
    "classifier": {"/v1/classify": labels.classify},
    "ctc": {"/v1/audio/transcriptions": labels.transcribe},
}
PATHS = sorted({path for paths in HANDLERS.values() for path in paths})


async def no_such_route(service: Service, request: HttpRequest) -> Response:
    """Refuse what another kind of model does, and name what this one does."""
    there = ", ".join(HANDLERS[service.kind])
    raise Refused(f"{service.name} is a model of kind {service.kind}: ask it by POST {there}", status=404, code="unknown_url")
