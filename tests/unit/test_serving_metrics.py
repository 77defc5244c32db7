"""What /metrics says, and how fast tokens come."""

import types

import pytest

from dllm.serving import throughput
from dllm.serving.metrics import RequestCounts, render
from dllm.serving.throughput import Throughput

LOAD = {
    "active": 1, "queued": 0, "slots": 64, "tokens": 50, "tokens_per_second": 12.5, "steps": 9, "cache_bytes": 4096,
    "cache_hits": 3, "alive": 1,
}  # fmt: skip
REPORT = {"active": 2, "queued": 5, "slots": 64, "tokens": 70, "tokens_per_second": 1.0}


def values(text):
    """name{labels} -> value of each line, and name -> kind of each metric."""
    lines = text.splitlines()
    found = {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in lines if not line.startswith("#")}
    return found, dict(line.split(" ")[2:4] for line in lines if line.startswith("# TYPE"))


def test_metrics_have_this_ranks_engine_and_what_is_known_of_others():
    answered = RequestCounts()
    for seconds in (0.02, 0.02, 200.0):
        answered.add("/v1/score", 200, seconds)
    answered.add("other", None, 0.5)
    answered.add("/v1/tag", 200, 0.5, 7)
    answered.add("/v1/audio/transcriptions", 200, 0.5, 1.25)
    table = {0: (REPORT, 0.0, False), 1: (REPORT, 0.25, False)}
    found, kinds = values(render(LOAD, answered, table, 0, {0: True, 1: False}))
    assert (found['dllm_cache_hits_total{rank="0"}'], found['dllm_cache_bytes{rank="0"}']) == (3, 4096)
    assert (kinds["dllm_cache_hits_total"], kinds["dllm_cache_bytes"]) == ("counter", "gauge")
    assert not any(name.startswith("dllm_cache") and 'rank="1"' in name for name in found)  # which nobody has told
    assert (found['dllm_tokens_total{rank="0"}'], found['dllm_tokens_total{rank="1"}']) == (50, 70)
    assert found['dllm_queued{rank="1"}'] == 5
    assert found['dllm_requests_total{rank="0",route="/v1/score",status="200"}'] == 3
    assert found['dllm_requests_total{rank="0",route="other",status="0"}'] == 1
    assert {name: value for name, value in found.items() if name.startswith("dllm_inputs")} == {
        'dllm_inputs_total{rank="0",route="/v1/tag"}': 7,
        'dllm_inputs_total{rank="0",route="/v1/audio/transcriptions"}': 1.25,
    }
    buckets = [found[f'dllm_request_seconds_bucket{{rank="0",route="/v1/score",le="{le}"}}'] for le in ("0.01", "0.03", "+Inf")]
    assert buckets == [0, 2, 3]
    assert found['dllm_request_seconds_sum{rank="0",route="/v1/score"}'] == pytest.approx(200.04)
    assert (found['dllm_peer_up{rank="0",peer="0"}'], found['dllm_peer_up{rank="0",peer="1"}']) == (1, 0)
    assert found['dllm_peer_heard_seconds{rank="0",peer="1"}'] == 0.25


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
