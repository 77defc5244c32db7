"""What a rank says of itself to all others by gossip, and what they make of it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, Generic, NotRequired, TypeAlias, TypedDict, TypeVar

import msgspec

from .counts import Place, Row

if TYPE_CHECKING:
    from ..comm.membership import Membership

Engines = TypeVar("Engines")
MOST_MODELS = 64
RANK, MODEL = 8192, 4096  # bytes of JSON that a report may have of its rank, and of each model
SILENT = 3.0  # seconds without a word after which a rank is taken for gone
NEWS = 2.5  # seconds in which all ranks that are well have said something new; usually a tenth of it
LOOK = 0.02  # seconds between looks at what they have said
PLAIN = r"\A[A-Za-z0-9_.:%-]*\Z"
Count = Annotated[int, msgspec.Meta(ge=0, le=2**53)]
Port = Annotated[int, msgspec.Meta(ge=0, le=65535)]
Seconds = Annotated[float, msgspec.Meta(ge=0, le=2**53)]


class EngineReport(TypedDict):
    """What a rank says of one of its models."""

    address: tuple[Annotated[str, msgspec.Meta(max_length=128, pattern=PLAIN)], Port]  # for other ranks
    active: Count
    queued: Count
    slots: Count
    tokens: Count
    tokens_per_second: Annotated[float, msgspec.Meta(ge=0)]
    steps: Count
    cache_hits: NotRequired[Count]  # these three as the kind of engine has them
    cache_bytes: NotRequired[Count]
    source_rows: NotRequired[Count]
    rows: dict[Place, Row]  # of the model's routes that were asked for


class RankReport(TypedDict, Generic[Engines]):
    """What a rank says of itself by gossip: at most `room` bytes of JSON, and about a tenth of that as a rule."""

    host: Annotated[str, msgspec.Meta(max_length=64, pattern=PLAIN)]
    pid: Count
    door: NotRequired[tuple[Annotated[str, msgspec.Meta(max_length=128, pattern=PLAIN)], Port]]  # where ranks can be replaced
    public: NotRequired[Annotated[str, msgspec.Meta(max_length=64, pattern=r"\A[0-9a-f]*\Z")]]  # key, in a later life
    made: Seconds  # since 1970, of its clock
    draining: bool
    drained: bool
    rows: dict[Place, Row]  # of requests that reached no model
    models: Engines  # in the order of the command


def report_of(models: int) -> Any:
    """The type of reports of ranks with so many models, for msgspec."""
    return RankReport[Annotated[list[EngineReport], msgspec.Meta(min_length=models, max_length=models)]]


def room(models: int) -> int:
    """Bytes that a report may have as JSON."""
    return RANK + models * MODEL


Entry: TypeAlias = tuple[Mapping[str, Any], float, bool]  # a rank's report, seconds since it was heard of, whether it died
LOAD = ("active", "queued", "slots", "tokens", "tokens_per_second")  # of a model, by /health


def state_of(entry: Entry) -> str:
    """Of a rank's entry in the table of the gossip: "dead", "silent", "draining" or "ok"."""
    report, silence, dead = entry
    return "dead" if dead else "silent" if silence > SILENT else "draining" if report["draining"] else "ok"


async def news(gossip: Membership) -> None:
    """Wait until all ranks that speak have said how they are since now, for NEWS seconds at most.

    So whoever looks at one rank and then at another does not see the past there, where their clocks agree.
    """
    since, end = time.time(), time.monotonic() + NEWS
    while True:
        speaking = [report for report, silence, dead in gossip.table().values() if not dead and silence <= SILENT]
        if time.monotonic() >= end or all(report["made"] > since for report in speaking):
            return
        await asyncio.sleep(LOOK)
