"""Several models in one server of two ranks: two that continue texts, and one that gives classes."""

import contextlib
import itertools
import json
import signal
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import numpy as np
import openai
import pytest
from helpers.launch import mpirun
from helpers.model_folders import TOKENIZER, logits, make, make_kind
from helpers.scraper import falls, scrape, total
from helpers.server import SURVIVES, Server, texts

from dllm.inference.loaded_model import LoadedModel

HOSTILE = [7, None, [], {"a": 1}, "", "small/..", "x" * (1 << 20), "\ud800"]  # as the name of a model
ENDLESS = 10**7  # tokens
HIDDEN = {"small": 18, "large": 30}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("several")
    for name, hidden in HIDDEN.items():
        make(folder / name, hidden=hidden)
    make_kind(folder / "classes", {"kind": "classifier", "bidirectional": True})
    return folder


@pytest.fixture(scope="module")
def server(folder):
    options = "--slots", 1, "--queue", 20, "--max-tokens", ENDLESS
    with Server([folder / "small", folder / "large", folder / "classes"], *options, ranks=2) as server:
        yield server


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def greedy(folder, name, prompt, count):
    """The likeliest text, by the equations."""
    model = LoadedModel.open(folder / name).model(1)
    tokens = TOKENIZER.encode(prompt.encode(), False).tolist()
    while len(tokens) < len(prompt) + count:
        tokens.append(int(logits(model, np.array(tokens))[-1].argmax()))
    return TOKENIZER.decode(tokens[len(prompt) :]).decode()


def begin(server, stack, name):
    """A stream that ends with the stack, and how the rank that computes it is called."""
    client = stack.enter_context(httpx.Client(base_url=server.url, timeout=20))  # a connection of its own, to any rank
    body = {"model": name, "prompt": "bc", "max_tokens": ENDLESS, "stream": True}
    answer = client.send(client.build_request("POST", "/v1/completions", json=body), stream=True)
    stack.callback(answer.close)
    assert answer.status_code == 200
    return answer.headers["x-dllm-rank"]


def active(server):
    """Which streams the ranks compute, as whichever rank is asked knows it: its number, and name -> streams of each rank."""
    found = server.health()
    names = [one["model"] for one in found["models"]]
    return found["rank"], {
        name: [rank["models"][place]["active"] for rank in found["ranks"]] for place, name in enumerate(names)
    }


def settle(server, **expected):
    """Wait until both ranks know that so many streams of these models are computed."""
    agree = set()
    end = time.monotonic() + 20
    while agree != {0, 1}:
        rank, found = active(server)
        agree = agree | {rank} if all(sum(found[name]) == count for name, count in expected.items()) else set()
        assert time.monotonic() < end, (expected, found)
        time.sleep(0.01)


def test_openais_client_gets_each_model_by_its_name_of_both_ranks(server, client, folder):
    assert [one.id for one in client.models.list()] == ["small", "large", "classes"]
    assert client.models.retrieve("large").id == "large"
    for name in HIDDEN:
        expected, ranks = greedy(folder, name, "bcd", 12), set()
        for _ in range(40):
            answer = server.complete("bcd", model=name, max_tokens=12, temperature=0)
            assert (texts(answer), answer.json()["model"]) == ([expected], name)
            ranks.add(answer.headers["x-dllm-rank"])
            if ranks == {"0", "1"}:
                break
        assert ranks == {"0", "1"}
        with client.completions.create(model=name, prompt="bcd", max_tokens=12, temperature=0, stream=True) as events:
            assert "".join(event.choices[0].text for event in events) == expected
    assert greedy(folder, "small", "bcd", 12) != greedy(folder, "large", "bcd", 12)
    with pytest.raises(openai.NotFoundError, match="there is no model 'none'; there are 'small', 'large' and 'classes'"):
        client.completions.create(model="none", prompt="bcd")
    with pytest.raises(openai.NotFoundError, match="classes is a model of kind classifier: ask it by POST /v1/classify"):
        client.completions.create(model="classes", prompt="bcd")
    assert "say which model" in server.complete("bcd").json()["error"]["message"]
    (entry,) = httpx.post(f"{server.url}/v1/classify", json={"input": "abc"}, timeout=20).json()["data"]
    assert sum(entry["probabilities"].values()) == pytest.approx(1)


def test_streams_of_each_model_go_to_a_rank_that_has_room_for_it(server):
    lines = lambda name: [line for line in server.log() if line.get("model") == name and line.get("stream")]
    for attempt in range(15):  # until the kernel has given two connections to one rank
        with contextlib.ExitStack() as stack:
            settle(server, small=0, large=0)
            for name, other in (("small", 0), ("large", 2)):
                ranks = set()
                for number in (1, 2):
                    ranks.add(begin(server, stack, name))
                    settle(server, **{"small": other, name: number})
                assert ranks == {"0", "1"}
                assert active(server)[1][name] == [1, 1]
        settle(server, small=0, large=0)
        if attempt > 1 and all(any(line["rank"] != line["computed_by"] for line in lines(name)) for name in HIDDEN):
            return
    raise AssertionError("no stream was handed to the other rank")


def test_classes_of_the_other_rank_are_the_same_and_come_beside_endless_streams(server):
    ask = lambda _: httpx.post(f"{server.url}/v1/classify", json={"input": ["abcabcabcabc" * 30]}, timeout=30)
    first = ask(0).json()["data"]
    with contextlib.ExitStack() as stack, ThreadPoolExecutor(12) as pool:
        begin(server, stack, "large")
        for _ in range(10):
            answers = list(pool.map(ask, range(24)))
            assert {answer.status_code for answer in answers} <= {200, 503}
            assert all(answer.json()["data"] == first for answer in answers if answer.status_code == 200)
            lines = [line for line in server.log() if line.get("model") == "classes" and line["status"] == 200]
            if any(line["computed_by"] != line["rank"] for line in lines):
                return
    raise AssertionError("no text was handed to the other rank")


def test_whoever_is_scraped_has_counters_of_all_models_that_do_not_fall(server):
    shown = [scrape(server)]
    for round in range(4):
        for name, count in (("small", 3), ("large", 2)):
            for _ in range(count):
                texts(server.complete("bc", model=name, max_tokens=5))
        assert server.complete("bc", model=["none"]).status_code == 400
        shown.append(scrape(server))
        for name, count in (("small", 3), ("large", 2), ("classes", 0)):
            grown = lambda what, **labels: total(shown[-1], what, **labels) - total(shown[-2], what, **labels)
            asked = grown("dllm_requests_total", route="/v1/completions", model=name, status=200)
            assert asked == grown("dllm_request_seconds_count", route="/v1/completions", model=name) == count, round
            assert grown("dllm_tokens_total", model=name) >= 5 * count
        assert grown("dllm_requests_total", route="/v1/completions", model="", status=400) == 1
    for before, after in itertools.pairwise(shown):
        assert falls(before, after) == []
        assert before.keys() == after.keys()
    assert {dict(labels)["model"] for name, labels in shown[0] if name == "dllm_slots"} == {"small", "large", "classes"}
    assert total(shown[-1], "dllm_slots", model="large") == 2


@pytest.mark.parametrize("name", HOSTILE, ids=lambda one: ascii(one)[:9])
def test_no_name_of_a_model_makes_an_error_of_the_server(server, name):
    for path in ("/v1/completions", "/v1/classify", "/tokenize"):
        answer = httpx.post(f"{server.url}{path}", content=json.dumps({"model": name, "prompt": "a"}), timeout=20)
        assert answer.status_code in (400, 404, 413)
        assert len(answer.content) < 1000
    assert texts(server.complete("bc", model="small", max_tokens=2))


def test_two_models_of_one_name_are_refused_in_one_line(folder):
    again = folder / "again" / "small"
    again.parent.mkdir()
    again.symlink_to(folder / "large")  # the name is that of the folder, wherever links to it are
    make(folder / "again" / "large", hidden=12)
    for models, said in (
        (["small", "again/large", "large"], "two models would be called large: again/large and large"),
        (["again/small", "large"], "two models would be called large: again/small and large"),
    ):
        done = mpirun(0, "-m", "dllm.serve", *models, "--port", 0, cwd=folder)
        assert (done.returncode, done.stderr) == (2, f"dllm: {said}; give one of the folders another name\n")


def test_a_server_that_is_told_to_end_finishes_the_streams_of_all_models(folder):
    options = "--max-tokens", 10**6, "--drain", 60
    with Server([folder / "small", folder / "large"], *options, ranks=2) as server, contextlib.ExitStack() as stack:
        answers = []
        for name in HIDDEN:
            body = {"model": name, "prompt": "bc", "max_tokens": 3000, "stream": True}
            answers.append(stack.enter_context(httpx.stream("POST", f"{server.url}/v1/completions", json=body, timeout=60)))
        lines = [answer.iter_lines() for answer in answers]
        for one in lines:
            next(one)
        server.signal(signal.SIGTERM, server.alive().values())
        for one in lines:
            assert [line for line in one if line][-1] == "data: [DONE]"
        assert server.process.wait(60) == 0


@pytest.mark.skipif(not SURVIVES, reason="all ranks die with one under MPICH")
def test_streams_of_all_models_go_on_where_the_rank_that_computes_them_dies(folder):
    """Those that it computes for others: whoever has a connection with it loses that."""
    count = 10_000
    models, options = [folder / "small", folder / "large"], ("--slots", 1, "--queue", 20, "--max-tokens", count)
    with Server(models, *options, ranks=2) as server, ThreadPoolExecutor(8) as pool:
        pids = server.alive()

        def ask(name):
            try:
                return name, server.complete("bc", model=name, max_tokens=count, temperature=0)
            except httpx.TransportError:
                return name, None

        asked = [pool.submit(ask, name) for name in ("small", "large") * 4]
        server.until(lambda: all(sum(loads) == 2 for loads in active(server)[1].values()), "streams of all models", 20)
        server.signal(signal.SIGKILL, [pids[1]])
        server.until(lambda: list(server.alive()) == [0], "news of the death", 10)
        answers = [one.result(60) for one in asked]
        whole = {
            name: {text for other, answer in answers if other == name and answer for text in texts(answer)} for name in HIDDEN
        }
        assert any(whole.values()), "all of eight connections went to the rank that died"
        for name, found in whole.items():
            expected = greedy(folder, name, "bc", 12)
            assert len(found) <= 1, "a text that is not as the others"
            assert all(text.startswith(expected) for text in found)
            assert texts(server.complete("bc", model=name, max_tokens=12, temperature=0)) == [expected]
