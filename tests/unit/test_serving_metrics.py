"""What /metrics says, what ranks tell each other for it, and how fast tokens come."""

import math
import types
from itertools import pairwise

import pytest
from prometheus_client.parser import text_string_to_metric_families

from dllm.comm import membership
from dllm.comm.messages import pack, unpack
from dllm.serving import throughput
from dllm.serving.counts import MOST_ROUTES, OTHER, ROW, STATUSES, Ledger, RequestCounts
from dllm.serving.metrics import GAUGES_AND_COUNTERS, render
from dllm.serving.reports import RankReport
from dllm.serving.routes import HANDLERS
from dllm.serving.throughput import Throughput

NAMES = [name for name, _, _ in GAUGES_AND_COUNTERS]
ROUTES = ["/health", "/v1/score", "/v1/tag"]


def report(answered, **changes):
    """What a rank says of itself."""
    numbers = dict.fromkeys(NAMES, 0) | {"slots": 64, "tokens_per_second": 1.5, "tokens": 70, "cache_hits": 3} | changes
    fixed = {"host": "here", "pid": 7, "address": ("10.0.0.1", 9), "made": 1e9, "draining": False, "drained": False}
    return fixed | numbers | {"rows": answered.rows()}


def read(text):
    """(name, labels) -> value, as Prometheus's parser has it, and name -> kind."""
    families = list(text_string_to_metric_families(text))
    found = [(sample.name, frozenset(sample.labels.items()), sample.value) for one in families for sample in one.samples]
    assert len({one[:2] for one in found}) == len(found)
    return {one[:2]: one[2] for one in found}, {one.name: one.type for one in families}


def key(name, **labels):
    return name, frozenset((name, str(value)) for name, value in labels.items())


def answers(*requests):
    counts = RequestCounts(ROUTES)
    for request in requests:
        counts.add(*request)
    return counts


def test_metrics_have_what_all_ranks_do_and_have_answered():
    mine = answers(*[("/v1/score", 200, second) for second in (0.02, 0.02, 200.0)], ("/nothing", None, 0.5))
    others = answers(("/v1/tag", 200, 0.5, 7), ("/v1/tag", 200, 0.5, 1.25), ("/v1/tag", 418, 0.5))
    table = {0: (report(mine), 0.0, False), 1: (report(others, tokens=50, queued=5), 0.25, True)}
    found, kinds = read(render(NAMES, mine.routes, table, 2))
    assert (kinds["dllm_tokens"], kinds["dllm_slots"], kinds["dllm_request_seconds"]) == ("counter", "gauge", "histogram")
    for rank, tokens in enumerate((70, 50)):
        assert found[key("dllm_tokens_total", rank=rank)] == tokens
        assert found[key("dllm_cache_hits_total", rank=rank)] == 3
    assert [found[key("dllm_slots", rank=rank)] for rank in (0, 1)] == [64, 0]  # a dead rank has no room
    assert found[key("dllm_queued", rank=1)] == 0
    assert found[key("dllm_requests_total", rank=0, route="/v1/score", status=200)] == 3
    assert found[key("dllm_requests_total", rank=0, route=OTHER, status=0)] == 1
    assert found[key("dllm_requests_total", rank=1, route="/v1/tag", status=400)] == 1  # one that is not in the table
    inputs = {name: value for name, value in found.items() if name[0] == "dllm_inputs_total" and value}
    assert inputs == {key("dllm_inputs_total", rank=1, route="/v1/tag"): 8.25}
    times = [found[key("dllm_request_seconds_bucket", rank=0, route="/v1/score", le=le)] for le in ("0.01", "0.03", "+Inf")]
    assert times == [0, 2, 3]
    assert found[key("dllm_request_seconds_sum", rank=0, route="/v1/score")] == pytest.approx(200.04)
    assert found[key("dllm_request_seconds_count", rank=0, route="/v1/score")] == 3
    assert [found[key("dllm_peer_up", peer=peer)] for peer in (0, 1)] == [1, 0]
    assert found[key("dllm_peer_heard_seconds", peer=1)] == 0.25


def test_every_series_is_there_before_anything_is_asked_and_before_a_rank_is_heard_of():
    mine = answers()
    first, kinds = read(render(NAMES, mine.routes, {}, 3))
    assert len(kinds) == len(NAMES) + 5
    assert all(value == 0 or math.isnan(value) for value in first.values())
    busy = answers(*[(route, status, 0.1, 1) for route in (*ROUTES, "/x") for status in (*STATUSES, 302, 599)])
    later, _ = read(render(NAMES, mine.routes, {rank: (report(busy), 0.1, False) for rank in range(3)}, 3))
    assert later.keys() == first.keys()


def test_no_counter_falls_when_a_rank_begins_anew_or_says_less_than_before():
    ledger, shown = Ledger(), []
    for requests, tokens in ((3, 70), (5, 90), (0, 0), (2, 10), (4, 5)):
        said = report(answers(*[("/v1/score", 200, 0.1, 2)] * requests), tokens=tokens)
        shown.append(read(render(NAMES, answers().routes, {0: (ledger.take(0, said), 0.0, False)}, 1))[0])
    for before, after in pairwise(shown):
        assert all(after[name] >= value for name, value in before.items() if name[0].endswith(("_total", "_bucket", "_count")))
    name = key("dllm_requests_total", rank=0, route="/v1/score", status=200)
    assert [one[name] for one in shown] == [3, 5, 5, 7, 11]
    assert [one[key("dllm_tokens_total", rank=0)] for one in shown] == [70, 90, 90, 100, 105]


@pytest.mark.parametrize("kind", HANDLERS)
def test_the_longest_report_finds_room(kind):
    plain = "/", "/openapi.json", "/health", "/health/ready", "/metrics", "/v1/models", "/one", "/more", "/another"
    counts = RequestCounts([*plain, *HANDLERS[kind]])
    assert len(counts.routes) <= MOST_ROUTES
    most = dict.fromkeys(NAMES, 2**53) | {"tokens_per_second": 1e15 + 0.5}
    longest = report(counts, **most) | {"host": "h" * 64, "address": ("a" * 128, 65535), "made": 1e9 + 0.1234567}
    longest["rows"] = {place: [2**53] * (ROW - 2) + [1e12 + 0.123] * 2 for place in range(len(counts.routes))}
    message = pack({1023: (2**53, longest)})
    assert len(message) < membership.ENTRY
    assert unpack(message, dict[int, tuple[int, RankReport]])[1023][1] == longest


@pytest.mark.parametrize(
    "wrong",
    [
        {"rows": {0: [0] * (ROW - 1)}}, {"rows": {0: [0] * (ROW + 1)}}, {"rows": {MOST_ROUTES: [0] * ROW}},
        {"rows": {-1: [0] * ROW}}, {"rows": {0: [-1] + [0] * (ROW - 1)}}, {"rows": {0: ["1"] + [0] * (ROW - 1)}}, {"rows": []},
        {"rows": {0: [1e300] * ROW}}, {"rows": None}, {"steps": -1}, {"cache_hits": 1.5}, {"made": "now"}, {"made": -1.0},
    ],
    ids=str,
)  # fmt: skip
def test_a_report_that_is_none_is_not_taken(wrong):
    fine = report(answers(("/v1/tag", 200, 0.1)))
    assert unpack(pack(fine), RankReport) == fine
    with pytest.raises(ValueError, match="not a message"):
        unpack(pack(fine | wrong), RankReport)


def test_a_report_of_another_version_is_not_taken():
    fine = report(answers())
    for name in ("rows", "made", "steps"):
        with pytest.raises(ValueError, match="not a message"):
            unpack(pack({other: value for other, value in fine.items() if other != name}), RankReport)


def test_the_rate_is_of_the_last_seconds_and_nothing_after_a_rest(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(throughput, "time", types.SimpleNamespace(monotonic=lambda: now[0]))
    counter = Throughput()
    for _ in range(100):  # ten tokens each tenth of a second
        now[0] += 0.1
        counter.add(10)
    assert counter.tokens == 1000
    assert counter.per_second() == pytest.approx(100, rel=0.02)
    for _ in range(100):
        now[0] += 0.1
        counter.add(20)
    assert counter.per_second() == pytest.approx(200, rel=0.02)
    now[0] += throughput.SECONDS + 1
    assert counter.per_second() == 0
    counter.add(7)
    now[0] += 1
    assert counter.per_second() == pytest.approx(7)
