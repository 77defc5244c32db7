"""The routes of models that read sources, in one process: what they refuse, in one clear line, and what strangers see."""

import io
import threading

import numpy as np
import pytest
from helpers.kinds import SHAPES, Kinds, recording, refused

from dllm.data.tokenizers import CharTokenizer
from dllm.errors import UserError
from dllm.serving import bodies
from dllm.serving.routes import PATHS


@pytest.fixture(scope="module")
def ask(tmp_path_factory):
    kinds = Kinds(tmp_path_factory.mktemp("models"))
    yield kinds
    kinds.stop()


@pytest.fixture(scope="module")
def models(ask):
    return ask.models


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


def test_without_a_library_for_forms_models_of_sound_are_refused_before_they_are_served(models, monkeypatch):
    monkeypatch.setattr(bodies.importlib.util, "find_spec", lambda name: None)
    bodies.check_forms(models["tagger"])
    with pytest.raises(UserError, match="takes python-multipart"):
        bodies.check_forms(models["ctc"])


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
