"""What a rank has answered, as it counts it and as it tells it, and counters of all ranks that never fall.

The numbers of a route stand in one row, in this order: requests by status, requests by the time that they took, all their
seconds, all their inputs. Ranks tell each other rows by the place of the route, since all of them have the same routes. The
model that a request reaches counts it, and the rank where it has reached none.
"""

from __future__ import annotations

import bisect
import operator
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, TypeAlias

import msgspec

STATUSES = (0, 200, 204, 308, 400, 401, 403, 404, 405, 408, 413, 499, 500, 503, 504)  # 0: no answer began
BOUNDS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100)  # seconds
TIMES = len(STATUSES)  # where the requests by time begin
SECONDS = TIMES + len(BOUNDS) + 1
INPUTS = SECONDS + 1
ROW = INPUTS + 1  # numbers
MOST_ROUTES = 24
OTHER = "other"  # every path that is not served

Place = Annotated[int, msgspec.Meta(ge=0, lt=MOST_ROUTES)]
Number = Annotated[float, msgspec.Meta(ge=0, le=2**53)]
Row = Annotated[list[Number], msgspec.Meta(min_length=ROW, max_length=ROW)]
Rows: TypeAlias = Mapping[int, Sequence[float]]
Parts: TypeAlias = list[Mapping[str, Any]]  # what a report says of its rank, and of each model
COUNTERS = ("tokens", "steps", "cache_hits")  # of a model, beside its rows


class RequestCounts:
    """How many requests were answered, by route and status, and in what time. One thread adds, any may ask.

    Parameters
    ----------
    routes : sequence of str
        In an order that all ranks have.
    other : bool
        Whether OTHER is added, which every further route is counted as.
    """

    def __init__(self, routes: Sequence[str], other: bool = True) -> None:
        self.routes = (*routes, OTHER) if other else (*routes,)
        self._rows = {route: [0.0] * ROW for route in self.routes}

    def add(self, route: str, status: int | None, seconds: float, inputs: float = 0) -> None:
        """Count a request. status None: no answer began. inputs : texts, words to tag, or seconds of sound"""
        row, known = self._rows[route if route in self._rows else OTHER], status or 0
        row[STATUSES.index(known if known in STATUSES else 500 if known > 500 else 400 if known > 400 else 200)] += 1
        row[TIMES + bisect.bisect_left(BOUNDS, seconds)] += 1
        row[SECONDS] += seconds
        row[INPUTS] += inputs

    def rows(self) -> dict[int, list[float]]:
        """Place of a route -> its numbers, of those that were asked for: whole ones, and thousandths of others."""
        return {
            place: [int(one) if one == int(one) else round(one, 3) for one in row]
            for place, row in enumerate(self._rows.values())
            if any(row)
        }


class Ledger:
    """Counters of all ranks, none of which is ever less than it was: what a rank had counted before it began anew is added.

    A report has counters of its own, and those of each model in its list `models`.
    """

    def __init__(self) -> None:
        self._last: dict[int, Parts] = {}  # rank -> its newest report
        self._before: dict[int, Parts] = {}  # rank -> the sums of the last reports of its lives that are over

    def take(self, rank: int, report: Mapping[str, Any]) -> Mapping[str, Any]:
        """A report of a rank, newer than the ones before, with all that the rank has ever counted."""
        parts, last = [report, *report["models"]], self._last.get(rank)
        if last is not None and any(map(_fell, last, parts)):  # a life ends for all of a rank at once
            self._before[rank] = [*map(_sum, last, self._before[rank])] if rank in self._before else last
        self._last[rank] = parts
        own, *models = map(_sum, parts, self._before[rank]) if rank in self._before else parts
        return {**own, "models": models}


def _fell(last: Mapping[str, Any], new: Mapping[str, Any]) -> bool:
    """Whether a counter is less than it was."""
    rows: Rows = new["rows"]
    if any(new.get(name, 0) < last.get(name, 0) for name in COUNTERS):
        return True
    return any(place not in rows or any(map(operator.lt, rows[place], row)) for place, row in last["rows"].items())


def _sum(one: Mapping[str, Any], other: Mapping[str, Any]) -> Mapping[str, Any]:
    """A report with the counters of another one added."""
    counters = {name: one.get(name, 0) + other.get(name, 0) for name in COUNTERS if name in {**one, **other}}
    rows, more = one["rows"], other["rows"]
    nothing = [0.0] * ROW
    places = sorted({*rows, *more})
    added = {place: list(map(operator.add, rows.get(place, nothing), more.get(place, nothing))) for place in places}
    return {**one, **counters, "rows": added}
