"""The routes of models that read sources, in one process: what they answer, and how they are described."""

import json
import math
import re

import numpy as np
import pytest
from helpers.kinds import SHAPES, TARGET, Kinds, recording

from dllm.data.tokenizers import ByteTokenizer
from dllm.inference.answering import Answering, pair_losses, streams_of
from dllm.inference.labelling import words_of
from dllm.inference.search import Beam
from dllm.inference.speech import BEAMS
from dllm.serving.labels import _Words
from dllm.serving.routes import HANDLERS


@pytest.fixture(scope="module")
def ask(tmp_path_factory):
    kinds = Kinds(tmp_path_factory.mktemp("models"))
    yield kinds
    kinds.stop()


@pytest.fixture(scope="module")
def models(ask):
    return ask.models


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


def test_many_requests_get_what_each_gets_alone(ask):
    prompts = ["a", "abcabcabc", "kkj", "hgfed", "b" * 40]
    alone = [ask("seq2seq", "/v1/completions", TARGET | {"prompt": prompt}).json()["choices"] for prompt in prompts]
    requests = [("/v1/completions", {"json": TARGET | {"prompt": prompt}}) for prompt in prompts]
    together = ask.together("seq2seq", *requests)
    assert [one.json()["choices"] for one in together] == alone


def test_no_tokens_asked_for_is_an_empty_text(ask):
    (choice,) = ask("seq2seq", "/v1/completions", {"prompt": "abc", "max_tokens": 0}).json()["choices"]
    assert (choice["text"], choice["finish_reason"]) == ("", "length")


def test_a_word_to_tag_ends_at_white_space_of_ascii_alone():
    text = _Words(ByteTokenizer(), "no\u00a0break and\x85more")
    assert text.words == ["no\u00a0break", "and\x85more"]
    assert text.starts.tolist() == [0, len(text.words[0].encode())]


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
        found = re.findall(rf'^dllm_inputs_total{{rank="0",model="{name}",route="([^"]*)"}} (.*)$', text, re.MULTILINE)
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
