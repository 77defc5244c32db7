"""/metrics in Prometheus's text form (https://prometheus.io/docs/instrumenting/exposition_formats).

Which lines there are depends on the models and the number of ranks alone: not on what was asked, nor on who answers.
"""

from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate
from typing import Any, NamedTuple

from ..peers.counts import BOUNDS, INPUTS, ROW, SECONDS, STATUSES, TIMES
from ..peers.reports import Entry, state_of

GONE = ("dead", "silent")  # states of ranks that do nothing any more
GAUGES_AND_COUNTERS = (  # of an engine, as its rank reports them
    ("active", "gauge", "streams that are computed now"),
    ("queued", "gauge", "streams that wait for a slot"),
    ("slots", "gauge", "streams that can be computed at once"),
    ("tokens_per_second", "gauge", "tokens generated a second, lately"),
    ("tokens", "counter", "tokens generated"),
    ("steps", "counter", "steps of the engine"),
    ("cache_hits", "counter", "prompts that began from a state that was kept"),
    ("cache_bytes", "gauge", "bytes of states that are kept behind prefixes"),
    ("source_rows", "gauge", "tokens or frames of sources that wait or are read"),
)


class Series(NamedTuple):
    """Which series there are of a model."""

    model: str  # its name
    numbers: Sequence[str]  # what an engine of its kind says of itself
    routes: Sequence[str]  # of its kind, by their places


def render(models: Sequence[Series], routes: Sequence[str], table: Mapping[int, Entry], size: int) -> str:
    """All lines.

    Parameters
    ----------
    models : sequence of Series
        In the order in which reports have them.
    routes : sequence of str
        Of requests that reached no model, by their places.
    table : mapping
        Of Membership, with counters that do not fall.
    size : int
        Ranks there are. Of those that are not in the table all is 0.
    """
    ranks = range(size)
    return "\n".join([*_engines(models, table, ranks), *_requests(models, routes, table, ranks), *_states(table, ranks)]) + "\n"


def _about(name: str, kind: str, what: str) -> list[str]:
    return [f"# HELP {name} {what}", f"# TYPE {name} {kind}"]


def _label(rank: int, model: str) -> str:
    """The labels of what a rank says of a model; "": of none, as Prometheus has it where there is no label."""
    escaped = model.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    return f'rank="{rank}",model="{escaped}"'


def _engines(models: Sequence[Series], table: Mapping[int, Entry], ranks: Sequence[int]) -> Iterator[str]:
    for name, kind, what in GAUGES_AND_COUNTERS:
        having = [(place, one.model) for place, one in enumerate(models) if name in one.numbers]
        if not having:
            continue
        full = f"dllm_{name}" + ("_total" if kind == "counter" else "")
        yield from _about(full, kind, what)
        for rank in ranks:
            gone = rank not in table or (kind == "gauge" and state_of(table[rank]) in GONE)
            for place, model in having:
                value: Any = 0 if gone else table[rank][0]["models"][place].get(name, 0)
                yield f"{full}{{{_label(rank, model)}}} {value:.15g}"


def _requests(
    models: Sequence[Series], routes: Sequence[str], table: Mapping[int, Entry], ranks: Sequence[int]
) -> Iterator[str]:
    nothing, rows = [0.0] * ROW, list[tuple[str, Sequence[float]]]()
    for rank in ranks:
        report = table[rank][0] if rank in table else {"rows": {}, "models": [{"rows": {}}] * len(models)}
        parts = [("", routes, report["rows"])]
        parts += [(one.model, one.routes, said["rows"]) for one, said in zip(models, report["models"], strict=True)]
        for model, known, counted in parts:
            start = _label(rank, model)
            rows += [(f'{start},route="{route}"', counted.get(place, nothing)) for place, route in enumerate(known)]
    yield from _about("dllm_requests_total", "counter", "requests answered; status 0: no answer began")
    for labels, row in rows:
        for status, count in zip(STATUSES, row[:TIMES], strict=True):
            yield f'dllm_requests_total{{{labels},status="{status}"}} {count:.15g}'
    yield from _about("dllm_inputs_total", "counter", "texts, words to tag or seconds of sound answered")
    yield from (f"dllm_inputs_total{{{labels}}} {row[INPUTS]:.15g}" for labels, row in rows)
    yield from _about("dllm_request_seconds", "histogram", "time of whole requests")
    for labels, row in rows:
        totals = list(accumulate(row[TIMES:SECONDS]))
        for bound, total in zip((*BOUNDS, "+Inf"), totals, strict=True):
            yield f'dllm_request_seconds_bucket{{{labels},le="{bound}"}} {total:.15g}'
        yield f"dllm_request_seconds_sum{{{labels}}} {row[SECONDS]:.15g}"
        yield f"dllm_request_seconds_count{{{labels}}} {totals[-1]:.15g}"


def _states(table: Mapping[int, Entry], ranks: Sequence[int]) -> Iterator[str]:
    yield from _about("dllm_peer_heard_seconds", "gauge", "time since a rank was heard of; NaN: never")
    for rank in ranks:
        yield f'dllm_peer_heard_seconds{{peer="{rank}"}} ' + (f"{table[rank][1]:.3f}" if rank in table else "NaN")
    yield from _about("dllm_peer_up", "gauge", "whether a rank answers")
    for rank in ranks:
        yield f'dllm_peer_up{{peer="{rank}"}} {int(rank in table and state_of(table[rank]) == "ok")}'
