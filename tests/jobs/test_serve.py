"""A server of two ranks, as OpenAI's client and curl see it."""

import base64
import contextlib
import json
import math
import time

import httpx
import numpy as np
import openai
import pytest
from helpers.launch import complaint, mpirun
from helpers.numerics import reference
from helpers.server import Server, texts

from dllm.inference.loaded_model import LoadedModel
from dllm.model.precision import described


@pytest.fixture(scope="module")
def server(world):
    with Server(world / "run", "--max-tokens", 100_000, ranks=2) as server:
        yield server


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def bundle(world):
    return LoadedModel.open(world / "run")


def test_int8_is_served_as_generate_and_evaluate_have_it(world):
    words = "-m", "dllm.generate", "run", "--prompt", "To be", "--tokens", 40, "--temperature", 0, "--precision", "int8"
    alone = mpirun(0, *words, cwd=world, check=True)
    with Server(world / "run", "--precision", "int8", ranks=1) as server:
        (text,) = texts(server.complete(max_tokens=40, temperature=0))
        says = f"dllm: {described('int8')}\n"
        server.until(lambda: says in server.out, "a line about int8")
    assert alone.stdout == f"To be{text}\n"
    assert complaint(alone) == says


def test_openai_client_completes(client, bundle):
    answer = client.completions.create(model="run", prompt="To be", max_tokens=20, temperature=0)
    text = answer.choices[0].text
    assert len(bundle.tokenizer.encode(text.encode())) == 20
    assert answer.choices[0].finish_reason == "length"
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.total_tokens) == (5, 20, 25)
    assert [model.id for model in client.models.list()] == [answer.model] == ["run"]


def test_openai_client_streams_the_same_text(client):
    asked = {"model": "run", "prompt": "To be", "max_tokens": 50, "seed": 4}
    whole = client.completions.create(**asked).choices[0].text
    chunks = list(client.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    assert "".join(chunk.choices[0].text for chunk in chunks[:-1]) == whole
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1]][-1] == "length"
    assert chunks[-1].usage.completion_tokens == 50
    assert chunks[-1].choices == []


def test_three_choices_are_those_of_three_seeds(client, server):
    choices = client.completions.create(model="run", prompt=["To", "be"], n=3, max_tokens=12, seed=7).choices
    assert [choice.index for choice in choices] == list(range(6))
    single = [texts(server.complete(prompt, max_tokens=12, seed=seed))[0] for prompt in ("To", "be") for seed in (7, 8, 9)]
    assert [choice.text for choice in choices] == single
    assert len(set(single)) == 6


def test_the_same_seed_gives_the_same_text_on_any_rank(server):
    answers = [server.complete(max_tokens=40, seed=11) for _ in range(20)]
    assert {answer.headers["x-dllm-rank"] for answer in answers} == {"0", "1"}
    assert len({texts(answer)[0] for answer in answers}) == 1
    drawn = server.complete(max_tokens=40)
    assert texts(server.complete(max_tokens=40, seed=drawn.json()["seed"])) == texts(drawn)


def test_stop_strings_may_span_tokens(client):
    asked = {"model": "run", "prompt": "To be", "max_tokens": 300, "seed": 1}
    whole = client.completions.create(**asked).choices[0].text
    stop = whole[100:103]
    for stream in (False, True):
        answer = client.completions.create(**asked, stop=[stop, "\x00"], stream=stream)
        choices = [chunk.choices[0] for chunk in answer] if stream else answer.choices
        assert "".join(choice.text for choice in choices) == whole[: whole.index(stop)]
        assert choices[-1].finish_reason == "stop"


def test_logprobs_are_those_of_the_model(client, bundle):
    asked = {"model": "run", "prompt": "To be", "max_tokens": 10, "seed": 2, "logprobs": 3, "echo": True}
    choice = client.completions.create(**asked).choices[0]
    told = choice.logprobs
    assert "".join(told.tokens) == choice.text
    assert told.text_offset == list(range(15))
    tokens, expected = oracle(bundle, choice.text)
    assert told.token_logprobs[0] is None
    np.testing.assert_allclose(told.token_logprobs[1:], expected[np.arange(14), tokens[1:]], atol=1e-4)
    for best, row in zip(told.top_logprobs[1:], expected, strict=True):
        np.testing.assert_allclose(sorted(best.values())[-3:], np.sort(row)[-3:], atol=1e-4)
    for name, value, best in zip(told.tokens[1:], told.token_logprobs[1:], told.top_logprobs[1:], strict=True):
        assert best[name] == value
        assert len(best) <= 4


def test_scores_and_states_are_those_of_the_model(client, server, bundle):
    text = "To be or not to be"
    tokens, expected = oracle(bundle, text)
    score = httpx.post(f"{server.url}/v1/score", json={"text": text}).json()
    loss = -expected[np.arange(len(tokens) - 1), tokens[1:]].mean()
    assert score["loss"] == pytest.approx(loss, abs=1e-5)
    assert score["perplexity"] == pytest.approx(math.exp(loss), rel=1e-5)
    assert score == httpx.post(f"{server.url}/v1/score", json={"tokens": tokens.tolist()}).json()
    floats = client.embeddings.create(model="run", input=text, encoding_format="float").data[0].embedding
    np.testing.assert_allclose(floats, state(bundle, tokens), atol=1e-5)
    body = {"input": [text, "x"], "encoding_format": "base64"}
    data = httpx.post(f"{server.url}/v1/embeddings", json=body).json()["data"]
    np.testing.assert_array_equal(np.frombuffer(base64.b64decode(data[0]["embedding"]), "<f4"), np.float32(floats))


def oracle(bundle, text):
    """Tokens (n,) of a text and the log-probabilities (n - 1, V) of what follows each but the last, by the equations."""
    tokens = bundle.tokenizer.encode(text.encode())
    logits = reference(bundle.model(1), tokens[:-1, None])[0][:, 0]
    top = logits.max(axis=1, keepdims=True)
    return tokens, logits - top - np.log(np.exp(logits - top).sum(axis=1, keepdims=True))


def state(bundle, tokens):
    return reference(bundle.model(1), tokens[:, None])[1][-1, 0]


def test_openai_client_asks_for_all_that_a_text_may_be_drawn_by(client, bundle):
    (letter,) = bundle.tokenizer.encode(b"e").tolist()
    asked = {"model": "run", "prompt": "To be", "max_tokens": 60, "seed": 2}
    told = client.completions.create(
        **asked, presence_penalty=0.5, frequency_penalty=0.5, logit_bias={str(letter): -100}, n=1, best_of=3,
        extra_body={"repetition_penalty": 1.2, "min_p": 0.02, "top_k": -1, "use_beam_search": False},
    )  # fmt: skip
    assert "e" not in told.choices[0].text
    assert told.usage.completion_tokens == 180
    assert client.models.retrieve("run").id == "run"
    with pytest.raises(openai.NotFoundError, match="there is no model"):
        client.models.retrieve("other")
    with pytest.raises(openai.NotFoundError, match="ask it by POST /v1/completions, with a prompt"):
        client.chat.completions.create(model="run", messages=[{"role": "user", "content": "Hello"}])
    texts = [f"To be {number}" for number in range(300)]
    found = client.embeddings.create(model="run", input=texts).data
    assert [entry.index for entry in found] == [*range(300)]
    alone = client.embeddings.create(model="run", input=texts[-1]).data[0].embedding
    assert found[-1].embedding == alone


def test_errors_have_openais_form(client, server):
    with pytest.raises(openai.BadRequestError) as error:
        client.completions.create(model="run", prompt="x", max_tokens=-1)
    assert error.value.body["param"] == "max_tokens"
    with pytest.raises(openai.NotFoundError) as error:
        client.completions.create(model="other", prompt="x")
    assert error.value.body["code"] == "model_not_found"
    for method, path, status in (("GET", "/v1/nothing", 404), ("GET", "/v1/completions", 405), ("GET", "/../etc/passwd", 404)):
        answer = httpx.request(method, server.url + path)
        assert (answer.status_code, answer.json()["error"]["type"]) == (status, "invalid_request_error")


def test_other_sites_and_other_names_are_refused(server):
    assert httpx.get(f"{server.url}/health", headers={"Host": "evil.example"}).status_code == 403
    assert httpx.get(f"{server.url}/health", headers={"Origin": "http://evil.example"}).status_code == 403
    assert httpx.get(f"{server.url}/health", headers={"Origin": server.url}).status_code == 200


def test_health_and_metrics_show_what_is_done(server):
    with httpx.stream(
        "POST", f"{server.url}/v1/completions", json={"prompt": "a", "max_tokens": 90_000, "stream": True}
    ) as answer:
        rank = int(answer.headers["x-dllm-rank"])
        server.until(lambda: server.health()["ranks"][rank]["active"] == 1, "a stream that all ranks know of")
    server.until(lambda: server.health()["ranks"][rank]["active"] == 0, "an end of what nobody reads", 10)
    ranks = server.health()["ranks"]
    assert all(entry["heard_seconds_ago"] < 2 and entry["state"] == "ok" and entry["slots"] == 64 for entry in ranks)
    assert ranks[rank]["tokens"] < 90_000
    lines = httpx.get(f"{server.url}/metrics").text.splitlines()
    values = {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in lines if not line.startswith("#")}
    assert any(name.startswith("dllm_requests_total{") and value > 0 for name, value in values.items())
    assert sum(value for name, value in values.items() if name.startswith("dllm_peer_up")) == 2


def test_a_prompt_that_comes_again_is_found_in_the_cache_which_metrics_count(server):
    for _ in range(3):  # twice at one of the ranks
        server.complete("Whoever comes again", max_tokens=1)

    def counted(name):
        lines = httpx.get(f"{server.url}/metrics").text.splitlines()  # of any rank
        return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(name))

    server.until(lambda: counted("dllm_cache_hits_total{") > 0, "a rank that has found a prefix", 20)
    server.until(lambda: counted("dllm_cache_bytes{") > 0, "a rank that keeps states", 20)


def test_the_log_has_a_line_for_each_request_and_no_prompts(server):
    server.complete("Unmistakable", max_tokens=3)
    server.until(lambda: any(line.get("prompt_tokens") == 12 for line in server.log()), "the line", 5)
    assert "Unmistakable" not in server.err
    line = next(line for line in server.log() if line.get("prompt_tokens") == 12)
    assert (line["route"], line["status"], line["completion_tokens"]) == ("/v1/completions", 200, 3)


def test_a_rank_without_room_hands_streams_to_another_until_all_are_full(world):
    with (
        Server(world / "run", "--slots", 1, "--queue", 1, "--max-tokens", 10**7, ranks=2) as server,
        httpx.Client(base_url=server.url, timeout=20) as client,
        contextlib.ExitStack() as stack,
    ):

        def begin():
            request = client.build_request("POST", "/v1/completions", json={"prompt": "a", "max_tokens": 10**7, "stream": True})
            answer = client.send(request, stream=True)
            stack.callback(answer.close)
            return answer

        def settle(active):
            """Until both ranks know that so many streams are computed."""
            agree = set()
            while agree != {0, 1}:
                health = server.health()
                well = sum(entry["active"] for entry in health["ranks"]) == active
                agree = agree | {health["rank"]} if well else set()
                time.sleep(0.01)

        was_handed_over = lambda: any(line["rank"] != line.get("computed_by", line["rank"]) for line in server.log())
        for _ in range(15):  # until the kernel has given two connections to one rank
            with contextlib.ExitStack() as pair:
                ranks = set()
                for number in (1, 2):
                    answer = begin()
                    pair.callback(answer.close)
                    ranks.add(answer.headers["x-dllm-rank"])
                    settle(number)
                assert ranks == {"0", "1"}
            settle(0)
            if was_handed_over():
                break
        assert was_handed_over()
        answers = [begin() for _ in range(12)]
        full = [answer for answer in answers if answer.status_code != 200]
        assert len(answers) - len(full) <= 4  # a slot and a place in the queue of each rank
        assert full
        for answer in full:
            assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
            assert json.loads(answer.read())["error"]["code"] == "overloaded"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--host", "0.0.0.0"], "--host 0.0.0.0 can be reached by others: give a token by --token-file or DLLM_TOKEN"),
        (["--token-file", "nothing"], "cannot read --token-file nothing: No such file or directory"),
        (["--port", "70000"], "argument --port: at most 65535; python -m dllm.serve --help shows the options"),
    ],
)
def test_what_cannot_be_served_is_said_in_one_line(world, arguments, said):
    done = mpirun(0, "-m", "dllm.serve", "run", *arguments, cwd=world)
    assert (done.returncode, done.stderr) == (2, f"dllm: {said}\n")


def test_a_port_that_others_use_is_refused(world, server):
    port = server.url.rpartition(":")[2]
    done = mpirun(0, "-m", "dllm.serve", "run", "--port", port, cwd=world)
    assert (done.returncode, done.stderr) == (2, f"dllm: cannot listen on 127.0.0.1 port {port}: Address already in use\n")
