"""Sources that are asked for something as a whole: how long they may be, and what comes of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from starlette.requests import Request as HttpRequest

from ..engines.errors import Refused
from ..engines.requests import Finished, SourceRequest
from ..engines.streams import Inbox, collect
from ..kernels.types import Array
from .bodies import unless_disconnected

if TYPE_CHECKING:
    from .service import Service


def check_source(service: Service, source: Array, field: str) -> None:
    """Raise Refused where a source is empty, or longer than this server reads."""
    if not len(source):
        raise Refused(f"{field} is empty: there is nothing to read", field)
    most = service.limits.source
    if len(source) > most:
        raise Refused(
            f"{field} has {len(source)} tokens or frames; {most} are read as a whole, as --max-source says",
            field,
            status=413,
            code="too_large",
        )


async def ask(
    service: Service, request: HttpRequest, given: Sequence[Any], wanted: Sequence[SourceRequest]
) -> tuple[list[tuple[Array, ...]], dict[str, str]]:
    """What was found of each source, and headers that say who computed it. Raises Refused, Disconnected.

    given : what the client has sent, for the log
    """
    fields, inbox = service.log_fields(request, given), Inbox()
    rank, _ = service.peers.submit(dict(enumerate(wanted)), inbox)
    fields["computed_by"], fields["prompt_tokens"] = rank, sum(len(one.source) for one in wanted)
    streams = await unless_disconnected(request.receive, inbox, collect(inbox, len(wanted)))
    return [events[-1].found for events in streams if isinstance(events[-1], Finished)], {"x-dllm-rank": str(rank)}
