"""/metrics in Prometheus's text form (https://prometheus.io/docs/instrumenting/exposition_formats).

Which lines there are depends on the kind of model and the number of ranks alone: not on what was asked, nor on who answers.
"""

from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate
from typing import Any

from .counts import BOUNDS, INPUTS, ROW, SECONDS, STATUSES, TIMES
from .reports import Entry, state_of

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


def render(names: Sequence[str], routes: Sequence[str], table: Mapping[int, Entry], size: int) -> str:
    """All lines.

    Parameters
    ----------
    names : sequence of str
        What an engine of this kind says of itself.
    routes : sequence of str
        Of this kind of model, by their places.
    table : mapping
        Of Membership, with counters that do not fall.
    size : int
        Ranks there are. Of those that are not in the table all is 0.
    """
    ranks = range(size)
    return "\n".join([*_engines(names, table, ranks), *_requests(routes, table, ranks), *_states(table, ranks)]) + "\n"


def _about(name: str, kind: str, what: str) -> list[str]:
    return [f"# HELP {name} {what}", f"# TYPE {name} {kind}"]


def _engines(names: Sequence[str], table: Mapping[int, Entry], ranks: Sequence[int]) -> Iterator[str]:
    for name, kind, what in GAUGES_AND_COUNTERS:
        if name not in names:
            continue
        full = f"dllm_{name}" + ("_total" if kind == "counter" else "")
        yield from _about(full, kind, what)
        for rank in ranks:
            gone = rank not in table or (kind == "gauge" and state_of(table[rank]) in GONE)
            value: Any = 0 if gone else table[rank][0].get(name, 0)
            yield f'{full}{{rank="{rank}"}} {value:.15g}'


def _requests(routes: Sequence[str], table: Mapping[int, Entry], ranks: Sequence[int]) -> Iterator[str]:
    nothing = [0.0] * ROW
    rows = [
        (f'rank="{rank}",route="{route}"', table[rank][0]["rows"].get(place, nothing) if rank in table else nothing)
        for rank in ranks
        for place, route in enumerate(routes)
    ]
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
