"""What stands between clients and a server: scrapers, browsers of other sites, probes, names of requests, prefixes of paths."""

import itertools
import json
import math
import re
import signal
import threading
import time
import urllib.parse

import httpx
import pytest
from helpers.scraper import falls, scrape, total
from helpers.server import Server

TOKEN = "a-token-of-these-tests"
APP, HOST, ROOT = "https://app.example.com", "llm.example.com", "/some/llm"


@pytest.fixture(scope="module")
def server(world):
    """Two ranks behind what a proxy would have them know."""
    options = "--allow-host", HOST, "--allow-origin", APP, "--root-path", ROOT, "--max-tokens", 10**5
    with Server(world / "run", *options, ranks=2, token=TOKEN) as server:
        yield server


def test_whoever_is_scraped_shows_the_requests_of_all_ranks_at_once(server):
    first = scrape(server)
    ranks = [server.complete(max_tokens=5).headers["x-dllm-rank"] for _ in range(40)]
    assert set(ranks) == {"0", "1"}
    for _ in range(6):  # of either rank
        found = scrape(server)
        assert found.keys() == first.keys()
        for name in ("dllm_inputs_total", "dllm_request_seconds_count"):
            grown = total(found, name, route="/v1/completions") - total(first, name, route="/v1/completions")
            assert grown == 40
        asked = [total(found, "dllm_requests_total", route="/v1/completions", status=200, rank=rank) for rank in (0, 1)]
        assert min(asked) > 0
        assert sum(asked) - total(first, "dllm_requests_total", route="/v1/completions", status=200) == 40
        assert total(found, "dllm_tokens_total") - total(first, "dllm_tokens_total") >= 200
    assert total(found, "dllm_peer_up") == 2
    assert not any(math.isnan(value) for value in found.values())


def test_no_counter_falls_while_scrapers_go_from_rank_to_rank(server):
    over = threading.Event()

    def ask():
        while not over.is_set():
            server.complete(max_tokens=3)

    clients = [threading.Thread(target=ask) for _ in range(4)]
    for client in clients:
        client.start()
    shown = [scrape(server) for _ in range(15)]
    over.set()
    for client in clients:
        client.join(20)
    for before, after in itertools.pairwise(shown):
        assert falls(before, after) == []
        assert before.keys() == after.keys()
    name = "dllm_requests_total"
    assert total(shown[-1], name, route="/v1/completions") > total(shown[0], name, route="/v1/completions")
    assert total(shown[-1], name, route="/metrics") == total(shown[0], name, route="/metrics") + 14


def test_a_page_of_an_allowed_site_may_ask_and_read_all_answers(server):
    ask = lambda method, path, **more: httpx.request(method, server.url + path, headers={"Origin": APP} | more)
    names = "authorization,content-type,x-stainless-lang"
    preflight = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": names}
    for path in ("/v1/completions", "/health", "/nothing", f"{ROOT}/v1/score"):
        answer = ask("OPTIONS", path, **preflight)  # without a token, as browsers have it
        assert (answer.status_code, answer.content) == (204, b"")
        assert answer.headers["access-control-allow-origin"] == APP
        assert answer.headers["access-control-allow-headers"] == names
        assert "POST" in answer.headers["access-control-allow-methods"]
        assert "Origin" in answer.headers["vary"]
    completed = httpx.post(
        f"{server.url}/v1/completions", json={"prompt": "To", "max_tokens": 1}, headers=server.headers | {"Origin": APP}
    )
    answers = {200: completed, 401: ask("GET", "/v1/models"), 404: ask("GET", "/nothing", **server.headers)}
    answers[405] = ask("GET", "/v1/completions", **server.headers)
    for status, answer in answers.items():
        assert (answer.status_code, answer.headers["access-control-allow-origin"]) == (status, APP)
        exposed = answer.headers["access-control-expose-headers"].split(", ")
        assert {"x-request-id", "x-dllm-rank"} <= set(exposed)
        assert "Origin" in answer.headers["vary"]
    assert httpx.get(f"{server.url}/health").headers["vary"] == "Origin"
    assert ask("OPTIONS", "/v1/models").status_code == 401  # no question of a browser


@pytest.mark.parametrize("method", ["GET", "POST", "OPTIONS"])
@pytest.mark.parametrize(
    ("headers", "code"),
    [
        ({"Origin": "https://evil.example"}, "wrong_origin"), ({"Origin": "null"}, "wrong_origin"),
        ({"Origin": f"{APP}.evil.example"}, "wrong_origin"), ({"Origin": "http://app.example.com"}, "wrong_origin"),
        ({"Host": "evil.example"}, "wrong_host"), ({"Host": "evil.example", "Origin": "http://evil.example"}, "wrong_host"),
        ({"Host": "evil.example", "Origin": APP}, "wrong_host"),
    ],
)  # fmt: skip
def test_what_is_not_allowed_stays_refused_and_unread(server, method, headers, code):
    more = {"Access-Control-Request-Method": "POST", "Content-Type": "text/plain"}
    answer = httpx.request(method, f"{server.url}/v1/completions", headers=server.headers | more | headers)
    assert (answer.status_code, answer.json()["error"]["code"]) == (403, code)
    assert not any(name.startswith("access-control-") for name in answer.headers)


def test_the_names_that_proxies_use_are_right(server):
    port = urllib.parse.urlsplit(server.url).netloc
    for host, origin in ((port, f"https://{HOST}"), (HOST, f"https://{HOST}"), (HOST, None), (port, f"http://{port}")):
        headers = server.headers | {"Host": host} | ({"Origin": origin} if origin else {})
        answer = httpx.post(f"{server.url}/v1/completions", json={"prompt": "To", "max_tokens": 1}, headers=headers)
        assert answer.status_code == 200, answer.text


def test_every_answer_has_the_name_of_its_request_and_the_log_has_it_too(server):
    headers = server.headers | {"X-Request-Id": "mine-1"}
    given = httpx.post(f"{server.url}/v1/completions", json={"prompt": "To", "max_tokens": 1}, headers=headers)
    refused = httpx.post(f"{server.url}/v1/completions", content=b"{", headers=headers | {"X-Request-Id": "mine-2"})
    strange = httpx.get(f"{server.url}/v1/models", headers={"X-Request-Id": "mine-3"})
    for answer, status, name in ((given, 200, "mine-1"), (refused, 400, "mine-2"), (strange, 401, "mine-3")):
        assert (answer.status_code, answer.headers["x-request-id"]) == (status, name)
        server.until(lambda: any(line["request_id"] == name and line["status"] == status for line in server.log()), name, 5)
    made = [
        httpx.get(f"{server.url}/v1/models", headers=server.headers | {"X-Request-Id": bad}) for bad in ("a b", "x" * 129, '"')
    ]
    names = {answer.headers["x-request-id"] for answer in made}
    assert len(names) == 3
    assert all(re.fullmatch("[0-9a-f]{32}", name) for name in names)
    server.until(lambda: names <= {line["request_id"] for line in server.log()}, "lines with the names that were made", 5)


def test_streams_are_not_kept_back_and_answers_not_stored(server):
    body = {"prompt": "To", "max_tokens": 3, "stream": True}
    with httpx.stream("POST", f"{server.url}/v1/completions", json=body, headers=server.headers) as answer:
        assert answer.headers["x-accel-buffering"] == "no"
        assert answer.headers["cache-control"] in ("no-cache", "no-store")
        assert list(answer.iter_lines())[-2] == "data: [DONE]"
    for path, status, stored in (("/v1/models", 200, "no-store"), ("/nothing", 404, "no-store"), ("/", 200, "no-cache")):
        found = httpx.get(server.url + path, headers=server.headers)
        assert (found.status_code, found.headers["cache-control"]) == (status, stored)
        assert "x-accel-buffering" not in found.headers


def test_all_is_there_below_the_prefix_too(server):
    for path in ("/health", "/v1/models", "/metrics", "/openapi.json"):
        for prefix in ("", ROOT):
            assert httpx.get(server.url + prefix + path, headers=server.headers).status_code == 200
        assert httpx.get(server.url + prefix + path).status_code == (200 if path == "/health" else 401)
    moved = httpx.get(server.url + ROOT)
    assert moved.status_code == 308
    assert urllib.parse.urljoin(server.url + ROOT, moved.headers["location"]) == f"{server.url}{ROOT}/"
    page = httpx.get(f"{server.url}{ROOT}/").text
    asked = set(re.findall(r'fetch\("([^"]+)"', page))
    assert asked == {"v1/completions", "health"}  # relative, so that they stay below the prefix
    assert not re.search(r'(?:src|href|action)="(?!data:)', page)
    description = httpx.get(f"{server.url}{ROOT}/openapi.json", headers=server.headers).json()
    assert description["servers"] == [{"url": ROOT}]
    assert httpx.get(f"{server.url}{ROOT}{ROOT}/health", headers=server.headers).status_code == 404
    assert httpx.get(f"{server.url}{ROOT}x/health", headers=server.headers).status_code == 404


def test_a_rank_that_ends_is_not_ready_but_there(world):
    """Whoever has a connection sees it: no new ones are taken any more."""
    with Server(world / "run", "--max-tokens", 10**6, ranks=1) as server, httpx.Client(base_url=server.url) as client:
        ready, healthy = client.get("/health/ready"), client.get("/health")
        assert (ready.status_code, ready.json(), healthy.status_code) == (200, {"status": "ok"}, 200)
        body = {"prompt": "To", "max_tokens": 10**6, "stream": True}
        with httpx.stream("POST", f"{server.url}/v1/completions", json=body, timeout=60) as answer:
            next(answer.iter_lines())
            server.signal(signal.SIGTERM, server.alive().values())
            end, statuses = time.monotonic() + 10, []
            while time.monotonic() < end and 503 not in statuses:
                statuses.append(client.get("/health/ready").status_code)
            assert 503 in statuses
        assert server.process.wait(60) == 0


def test_an_address_of_loopback_has_its_names_alone(world):
    with Server(world / "run", "--host", "127.0.0.2", ranks=1) as server:
        assert "//127.0.0.2:" in server.url
        assert httpx.get(f"{server.url}/health", headers={"Host": "evil.example"}).status_code == 403
        assert httpx.get(f"{server.url}/health", headers={"Host": "127.0.0.1"}).status_code == 200
        assert json.loads(httpx.get(f"{server.url}/health/ready").text) == {"status": "ok"}


def test_an_answer_does_not_wait_for_the_kernel_of_the_client(server):
    """Which says after 40 ms that it has the head of an answer, where the body is held back until then (RFC 896, RFC 1122)."""
    with httpx.Client(base_url=server.url, headers=server.headers) as client:
        seconds = []
        for _ in range(30):
            begin = time.monotonic()
            assert client.get("/v1/models").status_code == 200
            seconds.append(time.monotonic() - begin)
    assert min(seconds[1:]) < 0.03
