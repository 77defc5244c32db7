"""What a rank says of itself to all others by gossip, and what they make of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, TypeAlias, TypedDict

import msgspec

SILENT = 3.0  # seconds without a word after which a rank is taken for gone
PLAIN = r"\A[A-Za-z0-9_.:%-]*\Z"
Count = Annotated[int, msgspec.Meta(ge=0, le=2**53)]
Port = Annotated[int, msgspec.Meta(ge=0, le=65535)]


class RankReport(TypedDict):
    """What a rank says of itself by gossip."""

    host: Annotated[str, msgspec.Meta(max_length=64, pattern=PLAIN)]
    pid: Count
    address: tuple[Annotated[str, msgspec.Meta(max_length=128, pattern=PLAIN)], Port]  # for other ranks
    draining: bool
    drained: bool
    active: Count
    queued: Count
    slots: Count
    tokens: Count
    tokens_per_second: Annotated[float, msgspec.Meta(ge=0)]


Entry: TypeAlias = tuple[Mapping[str, Any], float, bool]  # a rank's report, seconds since it was heard of, whether it died


def state_of(entry: Entry) -> str:
    """Of a rank's entry in the table of the gossip: "dead", "silent", "draining" or "ok"."""
    report, silence, dead = entry
    return "dead" if dead else "silent" if silence > SILENT else "draining" if report["draining"] else "ok"
