"""One model that is served: what its handlers need of it. routes.py says which handlers that are."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence, Sized
from typing import Any, TypeVar

from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from ..engines.errors import Refused
from ..engines.limits import Limits
from ..engines.streams import LocalStreams
from ..inference.loaded_model import LoadedModel
from ..peers.counts import RequestCounts
from ..peers.peers import Peers
from .fields import Json
from .metrics import GAUGES_AND_COUNTERS, Series
from .openai import encode
from .routes import answered_by
from .streamed_text import Vocabulary

Given = TypeVar("Given", bound=Sized)
Readable = TypeVar("Readable", bound=Sized)


class Service:
    """What one rank answers of one model.

    Parameters
    ----------
    model : LoadedModel
    local : streams.LocalStreams
    peers : peers.Peers
    limits : limits.Limits
    log_prompts : bool
        Whether the log has the prompts, too.
    """

    def __init__(
        self, model: LoadedModel, local: LocalStreams, peers: Peers, limits: Limits, log_prompts: bool = False
    ) -> None:
        self.name, self.kind, self.vocabulary = model.name, model.config.kind, Vocabulary(model.tokenizer)
        self.labels, self.features, self.window = model.tokenizer.labels, model.config.features, model.window
        self.engine, self.peers, self.limits, self.log_prompts = local.engine, peers, limits, log_prompts
        self.answered = RequestCounts([*answered_by(self.kind)], other=False)
        self._numbers = [name for name, _, _ in GAUGES_AND_COUNTERS if name in self.engine.load()]
        self._writing = asyncio.Lock()

    @property
    def alive(self) -> bool:
        """Whether its engine works."""
        return bool(self.engine.load()["alive"])

    @property
    def series(self) -> Series:
        """What /metrics has of it."""
        return Series(self.name, self._numbers, self.answered.routes)

    def numbers(self) -> dict[str, Any]:
        """What this rank tells all others of what the model does: in the thread of the gossip, too."""
        load = self.engine.load()
        whole = {name: int(load[name]) for name in self._numbers}
        return {**whole, "tokens_per_second": round(load["tokens_per_second"], 1), "rows": self.answered.rows()}

    # ---- for handlers

    async def answer(self, body: Json, headers: Mapping[str, str]) -> Response:
        """A response of JSON. Large ones are written one at a time, and others get their turn in between."""
        async with self._writing:
            await asyncio.sleep(0)
            return Response(encode(body), media_type="application/json", headers=headers)

    async def read_prompts(
        self, given: Sequence[Given], field: str, read: Callable[[Given], Readable], each: bool = False
    ) -> list[Readable]:
        """What `read` makes of each text or its token numbers, not too many in all or `each`. Raises Refused, UserError."""
        if sum(map(len, given)) > 2000:  # long enough to be felt by others
            prompts = await asyncio.to_thread(lambda: [read(one) for one in given])
        else:
            prompts = [read(one) for one in given]
        count = (max if each else sum)(map(len, prompts))
        if count > self.limits.prompt:
            text = f"{field} has {'a text of ' if each else ''}{count} tokens; {self.limits.prompt} are allowed"
            raise Refused(text, field, code="context_length_exceeded")
        return prompts

    def log_fields(self, request: HttpRequest, prompts: Sequence[Any]) -> Json:
        """What the log will say of a request: a dict to add to."""
        fields: Json = request.scope["dllm"]
        if self.log_prompts:
            fields["prompts"] = prompts
        return fields
