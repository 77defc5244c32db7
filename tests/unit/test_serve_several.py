"""Several models in one server, in one process: which of them answers, how that is counted, and how it is described."""

import json
import re

import pytest
from helpers.asking import answered
from helpers.kinds import TARGET, Kinds, recording, refused
from prometheus_client.parser import text_string_to_metric_families

from dllm.errors import UserError
from dllm.peers.reports import MOST_MODELS
from dllm.serving.bodies import check_names

SHAPES = {
    "small": {"kind": "lm"},
    "large": {"kind": "lm", "hidden": 24},
    "other": {"kind": "seq2seq", "bidirectional": True, "layers": 2},
    "tagger": {"bidirectional": True},
    "texts": {"kind": "classifier", "bidirectional": True},
    "sounds": {"kind": "classifier", "features": 5},
}
ALL = tuple(SHAPES)
HOSTILE = [7, 1.5, True, False, ["small"], {"small": 1}, []]  # as the name of a model
FORMS = {"file": ("x.wav", recording()[0])}


@pytest.fixture(scope="module")
def ask(tmp_path_factory):
    kinds = Kinds(tmp_path_factory.mktemp("models"), SHAPES)
    yield kinds
    kinds.stop()


def parts_of(events):
    return [json.loads(line[6:]) for line in events.splitlines() if line.startswith("data: {")]


@pytest.mark.parametrize(
    ("path", "body", "names"),
    [
        ("/v1/completions", {"prompt": "abcab", "max_tokens": 8, "seed": 3}, ["small", "large"]),
        ("/v1/completions", TARGET | {"seed": 3}, ["other"]),
        ("/v1/score", {"text": "abcab"}, ["small", "large"]),
        ("/v1/score", {"source": "ab", "target": "k"}, ["other"]),
        ("/v1/embeddings", {"input": "abcab"}, ["small", "large"]),
        ("/v1/tag", {"input": "abcab"}, ["tagger"]),
        ("/v1/classify", {"input": "abcab"}, ["texts"]),
        ("/tokenize", {"prompt": "abcab"}, ["small", "large", "other"]),
        ("/detokenize", {"tokens": [1, 2]}, ["small", "large", "other"]),
    ],
)
def test_who_is_named_answers_as_if_alone(ask, path, body, names):
    told = []
    for name in names:
        many = answered(ask(ALL, path, {**body, "model": name}))
        alone = answered(ask(name, path, body))
        for one in (many, alone):
            one.pop("id", None)
            one.pop("created", None)
        assert many == alone
        assert many.get("model", name) == name
        told.append(json.dumps(many))
    assert len(names) < 2 or "token" in path or len(set(told)) == len(names)  # models that differ


def test_a_stream_is_that_of_the_model_named(ask):
    for name in ("small", "large", "other"):
        body = {"prompt": "abcab", "max_tokens": 8, "model": name, "temperature": 0}
        whole = answered(ask(ALL, "/v1/completions", body))["choices"][0]["text"]
        parts = parts_of(ask(ALL, "/v1/completions", body | {"stream": True}).text)
        assert "".join(choice["text"] for part in parts for choice in part["choices"]) == whole
        assert {part["model"] for part in parts} == {name}


def test_without_a_name_the_only_model_that_has_the_path_answers(ask):
    assert answered(ask(ALL, "/v1/tag", {"input": "ab"}))["model"] == "tagger"
    assert answered(ask(ALL, "/v1/tag", {"input": "ab", "model": None}))["model"] == "tagger"
    assert answered(ask(("small", "tagger"), "/v1/completions", {"prompt": "a"}))["model"] == "small"
    response = ask(ALL, "/v1/completions", {"prompt": "a"})
    refused(response, 400, "^say which model shall answer, by model: there are 'small', 'large' and 'other'$")
    error = response.json()["error"]
    assert (error["type"], error["param"]) == ("invalid_request_error", "model")
    refused(ask(ALL, "/v1/classify", {"input": "a", "model": None}), 400, "there are 'texts' and 'sounds'$")


@pytest.mark.parametrize("name", ["", "Small", "small ", "small\0", "..", "x" * 900_000, "\ud800", "/etc/passwd", "'; --"])
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/tag", "/tokenize", "/v1/classify"])
def test_a_model_that_is_not_there_is_refused_as_openai_has_it(ask, name, path):
    response = ask(ALL, path, {"model": name, "prompt": "a"})
    refused(response, 404, "there is no model .*; there are 'small', 'large', 'other', 'tagger', 'texts' and 'sounds'$")
    error = response.json()["error"]
    assert (error["code"], error["param"]) == ("model_not_found", "model")
    assert len(response.content) < 1000


@pytest.mark.parametrize("name", HOSTILE, ids=str)
def test_what_is_no_name_is_refused(ask, name):
    for names in (ALL, "small"):
        refused(ask(names, "/v1/completions", {"model": name, "prompt": "a"}), 400, "^model must be a string$")


@pytest.mark.parametrize(
    "body", [b"{", b"[]", b'"small"', b"\xff", b'{"model": NaN}', b"[" * 100_000, b""], ids=lambda one: one[:9]
)
def test_bodies_that_are_none_are_refused_before_any_model_reads_them(ask, body):
    ((response),) = ask.together(ALL, ("/v1/completions", {"content": body}))
    refused(response, 400, "body")


def test_a_kind_that_does_not_do_it_says_what_it_does(ask):
    refused(ask(ALL, "/v1/tag", {"model": "small", "input": "a"}), 404, "^small is a model of kind lm: ask it by POST /v1/comp")
    refused(ask(ALL, "/v1/completions", {"model": "tagger", "prompt": "a"}), 404, "^tagger is .*ask it by POST /v1/tag$")
    says = (
        "^tagger is a model of kind tagger: ask it by POST /v1/tag; texts is a model of kind classifier: ask it by POST .*fy$"
    )
    for path in ("/v1/completions", "/v1/chat/completions", "/v1/audio/transcriptions"):
        refused(ask(("tagger", "texts"), path, {"model": "tagger"}), 404, says)
    chat = {"model": "large", "messages": []}
    refused(ask(("small", "large", "texts"), "/v1/chat/completions", chat), 404, "^small and large hold no chats: ask them by")


def test_a_form_names_its_model_too(ask):
    pytest.importorskip("python_multipart")
    named = ask(ALL, "/v1/classify", files=FORMS, data={"model": "sounds"})
    assert answered(named)["data"] == answered(ask("sounds", "/v1/classify", files=FORMS))["data"]
    assert answered(ask(("small", "sounds"), "/v1/classify", files=FORMS))["model"] == "sounds"
    for data, status, says in (
        ({}, 400, "say which model shall answer"),
        ({"model": "x" * 9000}, 404, "there is no model 'xxx"),
        ({"model": "x" * 900_000}, 400, "10000|size"),
        ({"model": ""}, 404, "there is no model ''"),
        ({"model": ["sounds", "texts"]}, 400, "model is there more than once"),
        ({"model": "texts"}, 400, "must be a JSON object, and is a form"),
        ({"model": "small"}, 404, "small is a model of kind lm"),
    ):
        refused(ask(ALL, "/v1/classify", files=FORMS, data=data), status, says)
    refused(ask(ALL, "/v1/classify", files={"model": ("sounds", b"sounds")}), 400, "model must be a string")
    refused(ask(ALL, "/v1/classify", {"model": "sounds", "input": "a"}), 400, "a recording comes as multipart/form-data")
    other = {"content": b"x", "headers": {"content-type": "multipart/form-data"}}
    refused(ask(ALL, "/v1/classify", **other), 400, "boundary")
    refused(ask(ALL, "/v1/completions", **other), 400, "the body is no JSON")  # no model there reads forms


def test_all_models_are_listed_and_each_is_found(ask):
    listed = answered(ask(ALL, "/v1/models", method="GET"))
    assert [one["id"] for one in listed["data"]] == [*ALL]
    for one in listed["data"]:
        assert answered(ask(ALL, f"/v1/models/{one['id']}", method="GET")) == one
    refused(ask(ALL, "/v1/models/none", method="GET"), 404, "no model 'none'; there are 'small'")


def test_tokenizers_are_asked_for_by_the_query(ask):
    get = lambda names, query: ask(names, f"/tokenizer_info{query}", method="GET")
    assert answered(get(ALL, "?model=large")) == answered(get("large", ""))
    assert answered(get(("small", "tagger"), "")) == answered(get("small", ""))
    refused(get(ALL, ""), 400, "say which model shall answer, by model: there are 'small', 'large' and 'other'")
    refused(get(ALL, f"?model={'x' * 5000}"), 404, "there is no model")
    refused(get(ALL, "?model=tagger"), 404, "tagger is a model of kind tagger")
    refused(get(("tagger", "texts"), ""), 404, "ask it by POST /v1/tag")
    assert get("small", "?model=whatever").status_code == 200  # one model: as before there could be several


def test_requests_are_counted_by_model(ask):
    post = lambda path, body: (path, {"json": body})
    asked = (
        post("/v1/completions", {"prompt": ["a", "b"], "model": "large", "max_tokens": 2}),
        post("/v1/completions", {"prompt": "a", "model": "small", "temperature": 9}),
        post("/v1/completions", {"prompt": "a"}),
        post("/v1/tag", {"input": "a", "model": "small"}),
        post("/v1/tag", {"input": "a b"[:1]}),
        *((f"/v1/models/{name}", {"method": "GET"}) for name in ("small", "strange")),
    )
    text = ask.together(ALL, *asked, ("/metrics", {"method": "GET"}), in_turn=True)[-1].text
    samples = [one for family in text_string_to_metric_families(text) for one in family.samples]
    found = {
        tuple(one.labels[name] for name in ("model", "route", "status")): one.value
        for one in samples
        if one.name == "dllm_requests_total" and one.value
    }
    assert found == {
        ("large", "/v1/completions", "200"): 1, ("small", "/v1/completions", "400"): 1, ("", "/v1/completions", "400"): 1,
        ("", "/v1/tag", "404"): 1, ("tagger", "/v1/tag", "200"): 1,
        ("", "/v1/models/NAME", "200"): 1, ("", "/v1/models/NAME", "404"): 1,
    }  # fmt: skip
    inputs = {(one.labels["model"], one.value) for one in samples if one.name == "dllm_inputs_total" and one.value}
    assert inputs == {("large", 2), ("tagger", 1)}
    assert {one.labels["model"] for one in samples if one.name == "dllm_slots"} == {*ALL}
    assert {one.labels["model"] for one in samples if one.name == "dllm_cache_bytes"} == {"small", "large"}
    again = ask.together(ALL, ("/metrics", {"method": "GET"}))[0].text
    series = lambda text: re.findall(r"^(\w+{.*}) ", text, re.MULTILINE)
    assert series(again) == series(text)


def test_the_page_is_there_where_one_model_gives_texts(ask):
    get = lambda names: ask(names, "/", method="GET")
    assert get(("tagger", "small")).status_code == get(("other", "sounds")).status_code == 200
    refused(get(("tagger", "texts")), 404, "tagger is a model of kind tagger.*texts is")


def test_the_description_is_the_union_and_names_every_model(ask):
    text = ask(ALL, "/openapi.json", method="GET").text
    description = json.loads(text)
    schemas = description["components"]["schemas"]
    assert set(re.findall(r"#/components/schemas/(\w+)", text)) == set(schemas)
    content = description["paths"]["/v1/classify"]["post"]["requestBody"]["content"]
    assert set(content) == {"application/json", "multipart/form-data"}
    several = description["paths"]["/v1/completions"]["post"]["requestBody"]["content"]["application/json"]["schema"]["oneOf"]
    models = [schemas[one["$ref"].rpartition("/")[2]] for one in several]
    assert [one["properties"]["model"]["const"] for one in models] == ["small", "large", "other"]
    assert all("model" in one["required"] for one in models)
    alone = json.loads(ask(("small", "tagger"), "/openapi.json", method="GET").text)["components"]["schemas"]
    assert {"CompletionRequest", "LabelRequest"} <= set(alone)
    assert alone["CompletionRequest"]["required"] == ["prompt"]


def test_schemathesis_makes_requests_of_the_description_that_some_model_takes(ask):
    schemathesis, hypothesis = pytest.importorskip("schemathesis"), pytest.importorskip("hypothesis")
    schema = schemathesis.openapi.from_dict(json.loads(ask(ALL, "/openapi.json", method="GET").text))
    taken = set()

    def check(case):
        sent = case.as_transport_kwargs(base_url="http://here")
        more = {key: sent[key] for key in ("json", "files", "data", "params") if sent.get(key) is not None}
        answer = ask(ALL, case.path, method=case.method, **more)
        assert answer.status_code < 500, answer.text
        if answer.status_code == 200:
            taken.add(case.path)
        else:
            wrong = "unknown_parameter", "unsupported_parameter", "missing_required_parameter", "model_not_found", "unknown_url"
            assert answer.json()["error"]["code"] not in wrong, answer.text

    few = hypothesis.settings(
        max_examples=10, deadline=None, database=None, derandomize=True, suppress_health_check=list(hypothesis.HealthCheck)
    )
    for operation in (one.ok() for one in schema.get_all_operations()):
        if operation.method.upper() == "POST" or operation.path == "/tokenizer_info":
            few(hypothesis.given(operation.as_strategy())(check))()
    assert {"/detokenize", "/tokenizer_info"} <= taken


def test_a_rank_of_which_one_engine_has_ended_is_not_ready(ask):
    ready = lambda *names, slots: ask.together(names, ("/health/ready", {"method": "GET"}), slots=slots)[0]
    assert ready("small", "tagger", slots=3).status_code == 200
    ask.engine("tagger", 3).stop()
    assert ready("small", slots=3).status_code == 200
    assert (ready("small", "tagger", slots=3).status_code, ready("tagger", "small", slots=3).status_code) == (503, 503)


def test_models_have_names_of_their_own():
    check_names(["a", "b"], ["x/a", "y/b"])
    with pytest.raises(UserError, match=r"^two models would be called a: x/a and y/a; give one of the folders another name$"):
        check_names(["a", "b", "a"], ["x/a", "b", "y/a"])
    many = [str(number) for number in range(MOST_MODELS + 1)]
    check_names(many[1:], many[1:])
    with pytest.raises(UserError, match=f"one server has at most {MOST_MODELS}"):
        check_names(many, many)
