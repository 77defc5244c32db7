"""What /metrics says, what ranks tell each other for it, and how fast tokens come."""

import math
import types
from itertools import pairwise

import pytest
from prometheus_client.parser import text_string_to_metric_families

from dllm.comm.messages import pack, unpack
from dllm.engines import throughput
from dllm.engines.throughput import Throughput
from dllm.peers.counts import MOST_ROUTES, OTHER, ROW, STATUSES, Ledger, RequestCounts
from dllm.peers.reports import report_of, room
from dllm.serving.metrics import GAUGES_AND_COUNTERS, Series, render
from dllm.serving.routes import HANDLERS, PATHS, answered_by

NAMES = [name for name, _, _ in GAUGES_AND_COUNTERS]
ROUTES = ["/health", "/v1/score", "/v1/tag"]  # of a rank
POSTS = ROUTES[1:]  # of its models
ONE = [Series("m", NAMES, POSTS)]


def of_model(*requests, **changes):
    """What a rank says of a model."""
    numbers = dict.fromkeys(NAMES, 0) | {"slots": 64, "tokens_per_second": 1.5, "tokens": 70, "cache_hits": 3} | changes
    return numbers | {"address": ("10.0.0.1", 9), "rows": answers(*requests, routes=POSTS, other=False).rows()}


def report(*models, of_none=()):
    """What a rank says of itself. of_none : requests that reached no model"""
    fixed = {"host": "here", "pid": 7, "made": 1e9, "draining": False, "drained": False}
    return fixed | {"rows": answers(*of_none).rows(), "models": list(models)}


def read(text):
    """(name, labels) -> value, as Prometheus's parser has it, and name -> kind."""
    families = list(text_string_to_metric_families(text))
    found = [(sample.name, frozenset(sample.labels.items()), sample.value) for one in families for sample in one.samples]
    assert len({one[:2] for one in found}) == len(found)
    return {one[:2]: one[2] for one in found}, {one.name: one.type for one in families}


def key(name, **labels):
    return name, frozenset((name, str(value)) for name, value in labels.items())


def answers(*requests, routes=ROUTES, other=True):
    counts = RequestCounts(routes, other)
    for request in requests:
        counts.add(*request)
    return counts


def test_metrics_have_what_all_ranks_do_and_have_answered():
    mine = report(of_model(*[("/v1/score", 200, second) for second in (0.02, 0.02, 200.0)]), of_none=[("/nothing", None, 0.5)])
    asked = ("/v1/tag", 200, 0.5, 7), ("/v1/tag", 200, 0.5, 1.25), ("/v1/tag", 418, 0.5)
    others = report(of_model(*asked, tokens=50, queued=5), of_none=[("/v1/tag", 401, 0.5)])
    found, kinds = read(render(ONE, answers().routes, {0: (mine, 0.0, False), 1: (others, 0.25, True)}, 2))
    assert (kinds["dllm_tokens"], kinds["dllm_slots"], kinds["dllm_request_seconds"]) == ("counter", "gauge", "histogram")
    for rank, tokens in enumerate((70, 50)):
        assert found[key("dllm_tokens_total", rank=rank, model="m")] == tokens
        assert found[key("dllm_cache_hits_total", rank=rank, model="m")] == 3
    assert [found[key("dllm_slots", rank=rank, model="m")] for rank in (0, 1)] == [64, 0]  # a dead rank has no room
    assert found[key("dllm_queued", rank=1, model="m")] == 0
    score, tag = {"model": "m", "route": "/v1/score"}, {"model": "m", "route": "/v1/tag"}
    assert found[key("dllm_requests_total", rank=0, **score, status=200)] == 3
    assert found[key("dllm_requests_total", rank=0, model="", route=OTHER, status=0)] == 1
    assert found[key("dllm_requests_total", rank=1, **tag, status=400)] == 1  # one that is not in the table
    assert found[key("dllm_requests_total", rank=1, model="", route="/v1/tag", status=401)] == 1
    inputs = {name: value for name, value in found.items() if name[0] == "dllm_inputs_total" and value}
    assert inputs == {key("dllm_inputs_total", rank=1, **tag): 8.25}
    times = [found[key("dllm_request_seconds_bucket", rank=0, **score, le=le)] for le in ("0.01", "0.03", "+Inf")]
    assert times == [0, 2, 3]
    assert found[key("dllm_request_seconds_sum", rank=0, **score)] == pytest.approx(200.04)
    assert found[key("dllm_request_seconds_count", rank=0, **score)] == 3
    assert [found[key("dllm_peer_up", peer=peer)] for peer in (0, 1)] == [1, 0]
    assert found[key("dllm_peer_heard_seconds", peer=1)] == 0.25


def test_every_series_is_there_before_anything_is_asked_and_before_a_rank_is_heard_of():
    models, routes = [*ONE, Series('a "model"\\', NAMES[:6], POSTS[:1])], answers().routes
    first, kinds = read(render(models, routes, {}, 3))
    assert len(kinds) == len(NAMES) + 5
    assert all(value == 0 or math.isnan(value) for value in first.values())
    assert {dict(labels).get("model") for _, labels in first} == {"m", 'a "model"\\', "", None}
    all_of = lambda routes: [(route, status, 0.1, 1) for route in routes for status in (*STATUSES, 302, 599)]
    busy = report(of_model(*all_of(POSTS)), of_model(*all_of(POSTS[:1])), of_none=all_of((*ROUTES, "/x")))
    later, _ = read(render(models, routes, dict.fromkeys(range(3), (busy, 0.1, False)), 3))
    assert later.keys() == first.keys()


def test_no_counter_falls_when_a_rank_begins_anew_or_says_less_than_before():
    ledger, shown = Ledger(), []
    for requests, tokens in ((3, 70), (5, 90), (0, 0), (2, 10), (4, 5)):
        other = of_model(*[("/v1/tag", 200, 0.1)] * requests, tokens=7)  # of which no tokens say that the rank began anew
        said = report(of_model(*[("/v1/score", 200, 0.1, 2)] * requests, tokens=tokens), other)
        models = [*ONE, Series("other", NAMES, POSTS)]
        shown.append(read(render(models, answers().routes, {0: (ledger.take(0, said), 0.0, False)}, 1))[0])
    for before, after in pairwise(shown):
        assert all(after[name] >= value for name, value in before.items() if name[0].endswith(("_total", "_bucket", "_count")))
    for model, route in (("m", "/v1/score"), ("other", "/v1/tag")):
        name = key("dllm_requests_total", rank=0, model=model, route=route, status=200)
        assert [one[name] for one in shown] == [3, 5, 5, 7, 11]
    for model, tokens in (("m", [70, 90, 90, 100, 105]), ("other", [7, 7, 14, 14, 21])):
        assert [one[key("dllm_tokens_total", rank=0, model=model)] for one in shown] == tokens


@pytest.mark.parametrize("models", [1, 5])
def test_the_longest_report_finds_room(models):
    plain = "/", "/openapi.json", "/health", "/health/ready", "/metrics", "/v1/models", "/tokenizer_info"
    counts = RequestCounts([*plain, *PATHS])
    assert len(counts.routes) <= MOST_ROUTES
    rows = lambda count: {place: [2**53] * (ROW - 2) + [1e12 + 0.123] * 2 for place in range(count)}
    most = dict.fromkeys(NAMES, 2**53) | {"tokens_per_second": 1e15 + 0.5, "address": ("a" * 128, 65535)}
    most["rows"] = rows(max(len(answered_by(kind)) for kind in HANDLERS))
    longest = report(*[most] * models) | {"host": "h" * 64, "made": 1e9 + 0.1234567, "rows": rows(len(counts.routes))}
    message = pack({1023: (2**53, longest)})
    assert len(message) < room(models)
    assert unpack(message, dict[int, tuple[int, report_of(models)]])[1023][1] == longest


OF_RANK = {"rows": None}, {"rows": []}, {"made": "now"}, {"made": -1.0}, {"models": []}, {"models": None}, {"models": [{}]}
OF_MODEL = (
    {"rows": {0: [0] * (ROW - 1)}}, {"rows": {0: [0] * (ROW + 1)}}, {"rows": {MOST_ROUTES: [0] * ROW}},
    {"rows": {-1: [0] * ROW}}, {"rows": {0: [-1] + [0] * (ROW - 1)}}, {"rows": {0: ["1"] + [0] * (ROW - 1)}},
    {"rows": {0: [1e300] * ROW}}, {"rows": None}, {"steps": -1}, {"cache_hits": 1.5}, {"address": ("a b", 1)},
)  # fmt: skip


@pytest.mark.parametrize(("of_rank", "of_one"), [*((one, {}) for one in OF_RANK), *(({}, one) for one in OF_MODEL)], ids=str)
def test_a_report_that_is_none_is_not_taken(of_rank, of_one):
    fine = report(of_model(("/v1/tag", 200, 0.1)), of_model())
    assert unpack(pack(fine), report_of(2)) == fine
    with pytest.raises(ValueError, match="not a message"):
        unpack(pack(report(of_model(), of_model() | of_one) | of_rank), report_of(2))


def test_a_report_of_another_version_or_of_other_models_is_not_taken():
    fine, without = report(of_model()), lambda said, name: {other: value for other, value in said.items() if other != name}
    odd = [without(fine, name) for name in ("rows", "made", "models")]
    odd += [fine | {"models": [without(of_model(), name)]} for name in ("rows", "steps", "address")]
    for said in (*odd, report(), report(of_model(), of_model())):
        with pytest.raises(ValueError, match="not a message"):
            unpack(pack(said), report_of(1))


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
