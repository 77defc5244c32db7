"""/metrics in Prometheus's text form (https://prometheus.io/docs/instrumenting/exposition_formats)."""

import bisect
from collections import Counter, defaultdict
from collections.abc import Mapping
from typing import Any

BOUNDS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100)  # seconds


class RequestCounts:
    """How many requests were answered, by route and status, and in what time."""

    def __init__(self) -> None:
        self.counts: Counter[tuple[str, int]] = Counter()  # (route, status), status 0: no answer began
        self.within: defaultdict[str, list[int]] = defaultdict(lambda: [0] * (len(BOUNDS) + 1))
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self.inputs: defaultdict[str, float] = defaultdict(float)

    def add(self, route: str, status: int | None, seconds: float, inputs: float = 0) -> None:
        """Count a request. status None: no answer began. inputs : texts, words to tag, or seconds of sound"""
        self.counts[route, status or 0] += 1
        self.within[route][bisect.bisect_left(BOUNDS, seconds)] += 1
        self.seconds[route] += seconds
        if inputs:
            self.inputs[route] += inputs


def render(
    load: Mapping[str, float], answered: RequestCounts, table: Mapping[int, tuple[Mapping[str, Any], float, bool]],
    rank: int, up: Mapping[int, bool],
) -> str:  # fmt: skip
    """All lines: what this rank's engine and clients do, and what it knows of the others.

    Parameters
    ----------
    load : mapping
        Of this rank's engine.
    answered : RequestCounts
        Of this rank.
    table : mapping
        Of Membership.
    rank : int
        This one.
    up : mapping
        rank -> whether it answers.
    """
    lines: list[str] = []
    reports = sorted({**{other: report for other, (report, _, _) in table.items()}, rank: load}.items())
    for name, kind, what in (
        ("active", "gauge", "streams that are computed now"),
        ("queued", "gauge", "streams that wait for a slot"),
        ("slots", "gauge", "streams that can be computed at once"),
        ("tokens_per_second", "gauge", "tokens generated a second, lately"),
        ("tokens", "counter", "tokens generated"),
        ("steps", "counter", "steps of the engine"),
        ("cache_hits", "counter", "prompts that began from a state that was kept"),
        ("cache_bytes", "gauge", "bytes of states that are kept behind prefixes"),
        ("source_rows", "gauge", "tokens or frames of sources that wait or are read"),
    ):
        full = f"dllm_{name}" + ("_total" if kind == "counter" else "")
        lines += [f"# HELP {full} {what}", f"# TYPE {full} {kind}"]
        lines += [f'{full}{{rank="{other}"}} {report[name]:.15g}' for other, report in reports if name in report]
    lines += ["# HELP dllm_requests_total requests answered", "# TYPE dllm_requests_total counter"]
    for (route, status), count in sorted(answered.counts.items()):
        lines.append(f'dllm_requests_total{{rank="{rank}",route="{route}",status="{status}"}} {count}')
    lines += ["# HELP dllm_inputs_total texts, words to tag or seconds of sound answered", "# TYPE dllm_inputs_total counter"]
    lines += [
        f'dllm_inputs_total{{rank="{rank}",route="{route}"}} {count:.15g}' for route, count in sorted(answered.inputs.items())
    ]
    lines += ["# HELP dllm_request_seconds time of whole requests", "# TYPE dllm_request_seconds histogram"]
    for route, counts in sorted(answered.within.items()):
        total = 0
        for bound, count in zip((*BOUNDS, "+Inf"), counts, strict=True):
            total += count
            lines.append(f'dllm_request_seconds_bucket{{rank="{rank}",route="{route}",le="{bound}"}} {total}')
        lines.append(f'dllm_request_seconds_sum{{rank="{rank}",route="{route}"}} {answered.seconds[route]:.6f}')
        lines.append(f'dllm_request_seconds_count{{rank="{rank}",route="{route}"}} {total}')
    lines += ["# HELP dllm_peer_heard_seconds time since a rank was heard of", "# TYPE dllm_peer_heard_seconds gauge"]
    lines += [f'dllm_peer_heard_seconds{{rank="{rank}",peer="{peer}"}} {age:.3f}' for peer, (_, age, _) in table.items()]
    lines += ["# HELP dllm_peer_up whether a rank answers", "# TYPE dllm_peer_up gauge"]
    lines += [f'dllm_peer_up{{rank="{rank}",peer="{peer}"}} {int(well)}' for peer, well in up.items()]
    return "\n".join(lines) + "\n"
