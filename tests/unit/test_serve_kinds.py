"""The routes of models that read sources, in one process: what they answer, and what they refuse in one clear line."""

import asyncio
import contextlib
import io
import json
import math
import re
import threading
from types import SimpleNamespace

import httpx
import numpy as np
import pytest
from helpers.model_folders import make_kind

from dllm.data import audio
from dllm.data.tokenizers import ByteTokenizer, CharTokenizer
from dllm.errors import UserError
from dllm.inference.answering import Answering, pair_losses, streams_of
from dllm.inference.labelling import words_of
from dllm.inference.loaded_model import LoadedModel
from dllm.inference.search import Beam
from dllm.inference.speech import BEAMS
from dllm.serving import engines as engines_table
from dllm.serving.app import Service
from dllm.serving.engines import make_engine
from dllm.serving.labels import _Words
from dllm.serving.limits import Limits
from dllm.serving.log import Log
from dllm.serving.peers import Peers
from dllm.serving.routes import HANDLERS, PATHS
from dllm.serving.streams import LocalStreams
from dllm.serving.tokens import Clients

LIMIT = 60  # seconds, of any test
OPTIONS = {"slots": 8, "queue": 64, "cache": 0, "precision": "fp32", "max_source": 64}
SHAPES = {
    "lm": {},
    "seq2seq": {"bidirectional": True, "layers": 2},
    "tagger": {"bidirectional": True},
    "classifier": {"bidirectional": True},
    "ctc": {"bidirectional": True, "features": 5},
    "sound": {"kind": "classifier", "features": 5},
}
TARGET = {"prompt": "abcab", "max_tokens": 8}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    for name, shape in SHAPES.items():
        make_kind(folder / name, {"kind": name} | shape)
    return {name: LoadedModel.open(folder / name) for name in SHAPES}


@pytest.fixture(scope="module")
def engines(models):
    """name, slots -> its engine, started when it is asked for."""
    started = {}

    def find(name, slots):
        if (name, slots) not in started:
            started[name, slots] = make_engine(models[name], SimpleNamespace(**OPTIONS | {"slots": slots}), 1)
            started[name, slots].start()
        return started[name, slots]

    yield find
    for engine in started.values():
        engine.stop()


@pytest.fixture
def ask(models, engines):
    """ask(name, path, ...): the response of a server of that model, or of several requests at once."""

    def send(name, *requests, tokens=(), slots=8, in_turn=False, **limits):
        async def work():
            local = LocalStreams(engines(name, slots), asyncio.get_running_loop())
            gossip = SimpleNamespace(rank=0, size=1, table=dict, known={})
            bounds = Limits(source=64, **limits)
            service = Service(models[name], local, Peers(gossip, local, None, bounds), bounds, Log(0))
            transport = httpx.ASGITransport(service.app(Clients(tokens)))
            async with httpx.AsyncClient(transport=transport, base_url="http://here") as client:
                asked = [client.request(**{"method": "POST", "url": path} | what) for path, what in requests]
                return [await one for one in asked] if in_turn else await asyncio.gather(*asked)

        return asyncio.run(asyncio.wait_for(work(), LIMIT))

    def one(name, path, body=None, **more):
        return send(name, (path, {"content": json.dumps(body)} if body else more))[0]

    one.together = send
    return one


def searched(model, source, **how):
    streams = streams_of(model.network(64, 1), model.tokenizer, 4)
    return Answering(tokenizer=model.tokenizer, lanes=1, limit=8, **how).search(
        streams, [model.tokenizer.encode(source.encode(), False)]
    )[0]


def decoded(model, found):
    return model.tokenizer.decode(found.tokens).decode()


def test_a_source_gets_its_target_and_the_best_of_a_search(ask, models):
    model = models["seq2seq"]
    plain = ask("seq2seq", "/v1/completions", TARGET).json()
    (best,) = searched(model, "abcab")
    (choice,) = plain["choices"]
    assert (choice["text"], choice["finish_reason"]) == (decoded(model, best), "stop" if best.ended else "length")
    assert plain["usage"] == {"prompt_tokens": 5, "completion_tokens": len(best.tokens), "total_tokens": 5 + len(best.tokens)}
    wide = ask("seq2seq", "/v1/completions", TARGET | {"prompt": ["abcab", "k"], "n": 2, "best_of": 4}).json()
    expected = [decoded(model, one) for source in ("abcab", "k") for one in searched(model, source, beam=Beam(width=4, best=2))]
    assert [choice["text"] for choice in wide["choices"]] == expected
    assert [choice["index"] for choice in wide["choices"]] == [0, 1, 2, 3]


def test_a_stream_is_the_same_text_and_stops_where_it_is_told(ask):
    whole = ask("seq2seq", "/v1/completions", TARGET | {"logprobs": 2}).json()["choices"][0]
    events = ask("seq2seq", "/v1/completions", TARGET | {"stream": True, "stream_options": {"include_usage": True}}).text
    parts = [json.loads(line[6:]) for line in events.splitlines() if line.startswith("data: {")]
    assert "".join(choice["text"] for part in parts for choice in part["choices"]) == whole["text"]
    assert events.rstrip().endswith("data: [DONE]")
    assert parts[-1]["usage"]["completion_tokens"] == len(whole["logprobs"]["tokens"])
    assert all(
        2 <= len(top) <= 3 and value <= 0
        for top, value in zip(whole["logprobs"]["top_logprobs"], whole["logprobs"]["token_logprobs"], strict=True)
    )
    stopped = ask("seq2seq", "/v1/completions", TARGET | {"stop": whole["text"][2:4]}).json()["choices"][0]
    assert (stopped["text"], stopped["finish_reason"]) == (whole["text"][: whole["text"].index(whole["text"][2:4])], "stop")


def test_a_target_has_the_log_probability_of_the_model(ask, models):
    model, answer = models["seq2seq"], ask("seq2seq", "/v1/score", {"source": "abc", "target": "kj"}).json()
    source, target = (model.tokenizer.encode(text, False) for text in (b"abc", b"kj"))
    (loss,) = pair_losses(model.network(64, 1), model.tokenizer, [(source, target, "")])
    assert answer["logprob"] == pytest.approx(-loss, rel=1e-5)
    assert math.fsum(answer["token_logprobs"]) == pytest.approx(answer["logprob"])
    assert answer["token_ids"] == [*target.tolist(), model.tokenizer.end]
    assert (answer["tokens"][:2], answer["loss"]) == (["k", "j"], pytest.approx(loss / 3, rel=1e-5))
    assert ask("seq2seq", "/v1/score", {"source": "abc", "target": ""}).json()["token_ids"] == [model.tokenizer.end]


def test_words_get_tags_and_texts_a_class(ask, models):
    words = ask("tagger", "/v1/tag", {"input": ["ab cde", "k"]})
    assert words.status_code == 400  # the vocabulary has no space
    one, two = ask("tagger", "/v1/tag", {"input": ["abcd", "k"]}).json()["data"]
    assert [entry["word"] for entry in (*one["words"], *two["words"])] == ["abcd", "k"]
    assert {entry["tag"] for entry in one["words"]} < {"A", "B", "C"}
    assert all(1 / 3 <= entry["probability"] <= 1 for entry in one["words"])
    assert len(words_of(models["tagger"].tokenizer, "abcd")[0]) == 4
    answer = ask("classifier", "/v1/classify", {"input": "abcabc"}).json()
    (entry,) = answer["data"]
    assert sum(entry["probabilities"].values()) == pytest.approx(1)
    assert entry["probability"] == max(entry["probabilities"].values()) == entry["probabilities"][entry["label"]]
    assert answer["usage"] == {"prompt_tokens": 6, "total_tokens": 6}
    assert set(entry["probabilities"]) == {"A", "B", "C"}
    assert list(entry["probabilities"].values()) == sorted(entry["probabilities"].values(), reverse=True)
    window = models["classifier"].window  # of a longer text its end is read, as in training
    ends = [ask("classifier", "/v1/classify", {"input": start + "abc" * window}).json()["data"] for start in ("k", "hhh")]
    assert ends[0] == ends[1]


def recording(seconds=0.2):
    samples = np.sin(np.arange(int(8000 * seconds)) / 5).astype(np.float32)
    with io.BytesIO() as file:
        with contextlib.closing(audio.wave.open(file, "wb")) as out:
            out.setnchannels(1)
            out.setsampwidth(2)
            out.setframerate(8000)
            out.writeframes((samples * 30000).astype("<i2").tobytes())
        return file.getvalue(), audio.Sound(samples, 8000)


def test_a_recording_is_written_down_in_openais_form_and_classified(ask, models):
    pytest.importorskip("python_multipart")
    data, sound = recording()
    model = models["ctc"]
    frames = model.tokenizer.frames(sound)[:, None]
    (labels,) = model.network(64, 1).transcribe(frames.astype(np.float32), np.array([len(frames)]), BEAMS)
    expected = "".join(model.tokenizer.labels[label] for label in labels)
    files = {"file": ("x.wav", data, "audio/wav")}
    said = ask("ctc", "/v1/audio/transcriptions", files=files, data={"model": "ctc"})
    assert said.json() == {"text": expected}
    plain = ask("ctc", "/v1/audio/transcriptions", files=files, data={"response_format": "text"})
    assert plain.text == expected + "\n"
    long = ask("ctc", "/v1/audio/transcriptions", files=files, data={"response_format": "verbose_json", "stream": "false"})
    duration = long.json().pop("duration")
    assert long.json() == {"task": "transcribe", "language": "unknown", "text": expected, "duration": duration}
    assert duration == pytest.approx(len(sound.samples) / sound.rate, abs=0.03)
    (entry,) = ask("sound", "/v1/classify", files=files).json()["data"]
    assert sum(entry["probabilities"].values()) == pytest.approx(1)


@pytest.mark.parametrize(
    ("what", "status", "says"),
    [
        ({"files": {"file": ("x", b"RIFF")}}, 400, "file: it is no WAV file"),
        ({"files": {"file": ("x", recording(3)[0])}}, 400, "file: it is longer than 1 seconds"),
        ({"data": {"model": "ctc"}}, 400, "multipart/form-data"),
        ({"files": {"other": ("x", b"")}}, 400, "unknown parameter 'other'"),
        ({"files": [("file", ("x", b"")), ("file", ("y", b""))]}, 400, "[Tt]oo many files"),
        ({"files": {"file": ("x", b"")}, "data": {"model": "x"}}, 404, "there is no model 'x'"),
        ({"files": {"file": ("x", b"")}, "data": {"response_format": "srt"}}, 400, "json, text or verbose_json"),
        ({"files": {"file": ("x", b"")}, "data": {"stream": "true"}}, 400, "a recording is read as a whole"),
        ({"files": {"file": ("x", b"0" * (2 << 20))}}, 413, "the body is larger"),
        ({"content": b"x", "headers": {"content-type": "multipart/form-data"}}, 400, "boundary"),
        ({"content": b"--x\r\n\xff\xff", "headers": {"content-type": "multipart/form-data; boundary=x"}}, 400, "."),
    ],
)
def test_recordings_that_are_none_are_refused(ask, what, status, says):
    pytest.importorskip("python_multipart")
    response = ask("ctc", "/v1/audio/transcriptions", **what)
    refused(response, status, says)


def refused(response, status, says):
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert "\n" not in error["message"]
    assert re.search(says, error["message"]), error


@pytest.mark.parametrize(
    ("name", "path", "body", "status", "says"),
    [
        ("tagger", "/v1/completions", {"prompt": "a"}, 404, "tagger is a model of kind tagger: ask it by POST /v1/tag"),
        ("lm", "/v1/tag", {"input": "a"}, 404, "of kind lm: ask it by POST /v1/completions, /v1/score, /v1/embeddings"),
        ("classifier", "/v1/audio/transcriptions", {"file": "a"}, 404, "POST /v1/classify"),
        ("seq2seq", "/v1/embeddings", {"input": "a"}, 404, "POST /v1/completions, /v1/score"),
        ("seq2seq", "/v1/score", {"text": "abc"}, 400, "source must be there"),
        ("seq2seq", "/v1/score", {"source": "", "target": "a"}, 400, "source is empty"),
        ("seq2seq", "/v1/score", {"source": "a", "target": 5}, 400, "target must be there, a string"),
        ("seq2seq", "/v1/score", {"source": "a", "target": "b", "x": 1}, 400, "unknown parameter 'x'"),
        ("seq2seq", "/v1/completions", {"prompt": ""}, 400, "prompt is empty"),
        ("seq2seq", "/v1/completions", {"prompt": "Z"}, 400, "."),
        ("seq2seq", "/v1/completions", {"prompt": "a" * 65}, 413, "prompt has 65 tokens or frames; 64 are read"),
        ("seq2seq", "/v1/completions", {"prompt": [13]}, 400, "token numbers are from 0 to 12"),
        ("seq2seq", "/v1/completions", {"prompt": "a", "temperature": 0.7}, 400, "temperature: targets are searched for"),
        ("seq2seq", "/v1/completions", {"prompt": "a", "top_k": 3}, 400, "top_k: targets"),
        ("seq2seq", "/v1/completions", {"prompt": "a", "echo": True}, 400, "echo: a source"),
        ("seq2seq", "/v1/completions", {"prompt": "a", "best_of": 3, "stream": True}, 400, "stream goes with"),
        ("seq2seq", "/v1/completions", {"prompt": "a", "n": 2, "logprobs": 1}, 400, "logprobs goes with"),
        ("seq2seq", "/v1/completions", {"prompt": "a", "n": 3, "best_of": 2}, 400, "best_of must be an integer from 3"),
        ("seq2seq", "/v1/completions", {"prompt": "a", "best_of": 9}, 400, "best_of may be 8 here"),
        ("lm", "/v1/completions", {"prompt": "a", "best_of": 2, "stream": True}, 400, "stream goes with best_of = n"),
        ("tagger", "/v1/tag", {"input": " "}, 400, "a text without a word"),
        ("tagger", "/v1/tag", {"input": [["a"]]}, 400, "input must be a string or a list of strings"),
        ("tagger", "/v1/tag", {"input": [1, 2]}, 400, "input must be a string or a list of strings"),
        ("tagger", "/v1/tag", {"input": ["a"] * 65}, 400, "input has 65 parts"),
        ("tagger", "/v1/tag", {"input": "a" * 65}, 413, "input has 65 tokens"),
        ("tagger", "/v1/tag", {"input": "\ud800"}, 400, "surrogate"),
        ("classifier", "/v1/classify", {"input": ""}, 400, "input is empty"),
        ("classifier", "/v1/classify", {"input": "a", "model": "other"}, 404, "there is no model 'other'"),
    ],
)  # fmt: skip
def test_what_cannot_be_answered_is_refused_in_one_line(ask, name, path, body, status, says):
    refused(ask(name, path, body), status, says)


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ({"prompt": ["a"] * 5, "best_of": 8, "max_tokens": 4096}, "best_of x tokens x .* are 163840; 131072 are allowed"),
        ({"prompt": "a" * 64, "best_of": 33}, "best_of x tokens of a source are 2112; 2048 are allowed"),
        ({"prompt": ["a", "a" * 64], "best_of": 40, "n": 2, "max_tokens": 9}, "tokens of a source are 2560"),
        ({"prompt": ["a"] * 8, "n": 1, "logprobs": 20, "max_tokens": 1000}, "choices x tokens x .* are 168000"),
    ],
)
def test_a_search_holds_no_more_than_a_request_may(ask, more, says):
    ((response),) = ask.together("seq2seq", ("/v1/completions", {"json": more}), slots=40)
    refused(response, 400, says)


def test_many_requests_get_what_each_gets_alone(ask):
    prompts = ["a", "abcabcabc", "kkj", "hgfed", "b" * 40]
    alone = [ask("seq2seq", "/v1/completions", TARGET | {"prompt": prompt}).json()["choices"] for prompt in prompts]
    requests = [("/v1/completions", {"json": TARGET | {"prompt": prompt}}) for prompt in prompts]
    together = ask.together("seq2seq", *requests)
    assert [one.json()["choices"] for one in together] == alone


def test_without_a_library_for_forms_models_of_sound_are_refused_before_they_are_served(models, monkeypatch):
    monkeypatch.setattr(engines_table.importlib.util, "find_spec", lambda name: None)
    engines_table.check_forms(models["tagger"])
    with pytest.raises(UserError, match="takes python-multipart"):
        engines_table.check_forms(models["ctc"])


def test_no_tokens_asked_for_is_an_empty_text(ask):
    (choice,) = ask("seq2seq", "/v1/completions", {"prompt": "abc", "max_tokens": 0}).json()["choices"]
    assert (choice["text"], choice["finish_reason"]) == ("", "length")


@pytest.mark.parametrize(
    "charset", ["punycode", "idna", "hex", "utf-7", "undefined", "a\0b", "utf-16", "\xe9", "unicode_escape"]
)
@pytest.mark.parametrize("name", ["ctc", "sound"])
def test_a_form_in_another_code_is_refused(ask, name, charset):
    pytest.importorskip("python_multipart")
    path = "/v1/classify" if name == "sound" else "/v1/audio/transcriptions"
    data = b'--x\r\nContent-Disposition: form-data; name="f\xffile-"; filename="\xff-"\r\n\r\nabc-\xff\r\n--x--\r\n'
    for kind in (f"multipart/form-data; boundary=x; charset={charset}", f'Multipart/Form-Data;CHARSET="{charset}"; boundary=x'):
        refused(ask(name, path, content=data, headers={b"content-type": kind.encode("latin-1")}), 400, "charset|form")


def test_sound_that_is_too_loud_for_numbers_is_refused(ask):
    pytest.importorskip("python_multipart")
    soundfile = pytest.importorskip("soundfile")
    loud = np.repeat(np.tile(np.float32([3.4e38, -3.4e38]), 40), 100)  # at another rate it would go beyond its edges
    for name, path in (("ctc", "/v1/audio/transcriptions"), ("sound", "/v1/classify")):
        with io.BytesIO() as file:
            soundfile.write(file, loud, 16000, format="WAV", subtype="FLOAT")
            refused(ask(name, path, files={"file": ("x.wav", file.getvalue())}), 400, "^file: it has samples of 3.4e.38")


def test_a_word_to_tag_ends_at_white_space_of_ascii_alone():
    text = _Words(ByteTokenizer(), "no\u00a0break and\x85more")
    assert text.words == ["no\u00a0break", "and\x85more"]
    assert text.starts.tolist() == [0, len(text.words[0].encode())]


@pytest.mark.parametrize(
    ("name", "path", "body"),
    [
        ("tagger", "/v1/tag", {"input": "a" * 5000}),
        ("classifier", "/v1/classify", {"input": ["a", "b" * 5000]}),
        ("seq2seq", "/v1/completions", {"prompt": "a" * 5000}),
        ("seq2seq", "/v1/score", {"source": "a", "target": "b" * 5000}),
        ("lm", "/v1/completions", {"prompt": "a" * 5000, "max_tokens": 1}),
        ("lm", "/v1/score", {"text": "a" * 5000}),
        ("lm", "/v1/embeddings", {"input": "a" * 5000}),
    ],
)
def test_long_texts_are_made_tokens_outside_of_the_event_loop(ask, models, monkeypatch, name, path, body):
    threads, encode = {}, CharTokenizer.encode

    def watched(tokenizer, data, end=True):
        threads[len(data)] = threading.current_thread()
        return encode(tokenizer, data, end)

    monkeypatch.setattr(CharTokenizer, "encode", watched)
    refused(ask.together(name, (path, {"json": body}), prompt=4000)[0], 400, "has (a text of )?500[01] tokens; 4000 are")
    assert threads[5000] is not threading.main_thread()


@pytest.mark.parametrize("name", SHAPES)
def test_strangers_learn_nothing_of_the_kind(ask, name):
    """As before there were kinds: the page, that the server is there, and that it wants a token."""
    named = {"headers": {"X-Request-Id": "one"}}
    for path in ("/", "/health", "/health/ready", "/openapi.json", "/v1/models", "/nothing", *PATHS):
        for method in ("GET", "POST", "HEAD", "OPTIONS", "PUT"):
            ((answer),) = ask.together(name, (path, {"method": method, **named}), tokens=["secret"])
            expected = ask.together("lm", (path, {"method": method, **named}), tokens=["secret"])[0]
            assert (answer.status_code, answer.content, answer.headers) == (
                expected.status_code, expected.content, expected.headers,
            )  # fmt: skip
    known = ask.together(name, ("/", {"method": "GET", "headers": {"Authorization": "Bearer secret"}}), tokens=["secret"])[0]
    assert known.status_code == (200 if name in ("lm", "seq2seq") else 404)


def described(ask, name):
    """path -> schema of its request, of the description that a server of a model gives out."""
    text = ask.together(name, ("/openapi.json", {"method": "GET"}))[0].text
    description = json.loads(text)
    schemas = description["components"]["schemas"]
    assert set(re.findall(r"#/components/schemas/(\w+)", text)) == set(schemas)
    found = {}
    for path, methods in description["paths"].items():
        for media, content in methods.get("post", {}).get("requestBody", {}).get("content", {}).items():
            found[path] = media, schemas[content["schema"]["$ref"].rpartition("/")[2]]
    return found


FIELDS = {  # of all kinds, with a value that every kind which has them takes
    "temperature": 1, "top_p": 1, "top_k": 0, "echo": False, "n": 1, "best_of": 1, "stream": False, "logprobs": 1, "seed": 3,
    "cache_salt": "x", "user": "u", "metadata": {"a": "b"}, "max_tokens": 2, "stop": "k", "encoding_format": "float",
}  # fmt: skip
NEEDED = {
    "/v1/completions": {"prompt": "ab"}, "/v1/embeddings": {"input": "ab"}, "/v1/tag": {"input": "ab"},
    "/v1/classify": {"input": "ab"}, "/tokenize": {"prompt": "ab"}, "/detokenize": {"tokens": [1]},
}  # fmt: skip


@pytest.mark.parametrize("name", SHAPES)
def test_the_description_is_true_for_the_model_served(ask, name):
    paths = described(ask, name)
    assert set(paths) == set(HANDLERS["classifier" if name == "sound" else name])
    files = {"file": ("x.wav", recording()[0])}
    for path, (media, schema) in paths.items():
        assert (media == "multipart/form-data") == (name in ("ctc", "sound"))
        for one in schema.get("oneOf", [schema]):
            needed = NEEDED.get(path, {"text": "ab"} if name == "lm" else {"source": "ab", "target": "k"})
            needed = {"tokens": [1, 2]} if "tokens" in one["required"] else needed
            for field, value in FIELDS.items():
                if media == "multipart/form-data":
                    answer = ask(name, path, files=files, data={field: str(value)})
                else:
                    answer = ask(name, path, needed | {field: value})
                taken = answer.status_code == 200
                assert taken == (field in one["properties"]), (path, field, answer.text)


@pytest.mark.parametrize("name", SHAPES)
def test_schemathesis_makes_nothing_of_the_description_that_is_refused_as_another_form(ask, name):
    schemathesis, hypothesis = pytest.importorskip("schemathesis"), pytest.importorskip("hypothesis")
    description = json.loads(ask.together(name, ("/openapi.json", {"method": "GET"}))[0].text)
    schema = schemathesis.openapi.from_dict(description)

    def check(case):
        sent = case.as_transport_kwargs(base_url="http://here")
        answer = ask(name, case.path, **{key: sent[key] for key in ("json", "files", "data") if sent.get(key) is not None})
        assert answer.status_code < 500, answer.text
        if answer.status_code != 200:
            assert answer.json()["error"]["code"] not in ("unknown_parameter", "unsupported_parameter"), answer.text

    few = hypothesis.settings(
        max_examples=8, deadline=None, database=None, derandomize=True, suppress_health_check=list(hypothesis.HealthCheck)
    )
    for operation in (one.ok() for one in schema.get_all_operations()):
        if operation.method.upper() == "POST":
            few(hypothesis.given(operation.as_strategy())(check))()


def test_inputs_are_counted_by_route(ask):
    def counted(name, *requests):
        text = ask.together(name, *requests, ("/metrics", {"method": "GET"}), in_turn=True)[-1].text
        found = re.findall(r'^dllm_inputs_total{rank="0",route="([^"]*)"} (.*)$', text, re.MULTILINE)
        return {route: count for route, count in found if count != "0"}

    post = lambda path, body: (path, {"json": body})
    assert counted("tagger", post("/v1/tag", {"input": ["ab", "k"]}), post("/v1/tag", {"input": ""})) == {"/v1/tag": "2"}
    assert counted("classifier", post("/v1/classify", {"input": ["ab"] * 3})) == {"/v1/classify": "3"}
    assert counted("seq2seq", post("/v1/completions", TARGET), post("/v1/score", {"source": "a", "target": "b"})) == {
        "/v1/completions": "1", "/v1/score": "1",
    }  # fmt: skip
    pytest.importorskip("python_multipart")
    sound = ("/v1/audio/transcriptions", {"files": {"file": ("x", recording()[0])}})
    assert float(counted("ctc", sound)["/v1/audio/transcriptions"]) == pytest.approx(0.18, abs=0.02)
