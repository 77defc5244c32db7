"""What clients of other servers ask of this one: models by name, many embeddings, tokens, chats."""

import base64
import re

import numpy as np
import pytest
from helpers.asking import Asked, answered, refusal, served
from helpers.model_folders import make, make_kind

from dllm.data.tokenizers import CharTokenizer, WordTokenizer
from dllm.serving.fields import NEUTRAL


@pytest.fixture(scope="module")
def asked(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clients") / "model"
    make(folder, tokenizer=CharTokenizer([*"abcdefghij", "\n"]))
    with served(folder, slots=3, queue=4) as asked:
        yield asked


@pytest.fixture(scope="module")
def others(tmp_path_factory):
    """kind -> Asked"""
    folder = tmp_path_factory.mktemp("others")
    made = {}
    for kind in ("seq2seq", "tagger"):
        make_kind(folder / kind, {"kind": kind, "bidirectional": True})
        made[kind] = Asked(folder / kind)
    make(folder / "words", tokenizer=WordTokenizer(["<eos>", *"abcdefghij"]))
    made["words"] = Asked(folder / "words")
    yield made
    for one in made.values():
        one.engine.stop()


def test_the_model_is_found_by_its_name(asked):
    (listed,) = answered(asked("/v1/models"))["data"]
    assert answered(asked("/v1/models/model")) == listed
    for name in ("other", "model/other", "%6Dodel%00"):
        assert "there is 'model'" in refusal(asked(f"/v1/models/{name}"), 404)


def test_2048_texts_are_embedded_in_turns_that_leave_room_for_others(asked):
    rng = np.random.default_rng(1)
    texts = ["".join(rng.choice([*"abcdefghij"], rng.integers(1, 4))) for _ in range(2048)]
    many, one = asked.together(("/v1/embeddings", {"input": texts}), ("/v1/completions", {"prompt": "a", "max_tokens": 3}))
    assert one.status_code == 200
    body = answered(many)
    assert body["usage"] == {"prompt_tokens": sum(map(len, texts)), "total_tokens": sum(map(len, texts))}
    assert [entry["index"] for entry in body["data"]] == list(range(2048))
    found = {text: entry["embedding"] for text, entry in zip(texts, body["data"], strict=True)}
    for text in ("a", "bc", texts[-1]):
        packed = answered(asked("/v1/embeddings", {"input": text, "encoding_format": "base64"}))["data"][0]["embedding"]
        if text in found:
            np.testing.assert_array_equal(np.frombuffer(base64.b64decode(packed), "<f4"), np.float32(found[text]))
    assert refusal(asked("/v1/embeddings", {"input": [*texts, "a"]})) == "input has 2049 parts; 2048 are allowed"


def test_each_text_to_embed_may_be_as_long_as_a_prompt(asked):
    texts = ["ab" * 50] * 20
    assert answered(asked("/v1/embeddings", {"input": texts}, prompt=100))["usage"]["prompt_tokens"] == 2000
    says = refusal(asked("/v1/embeddings", {"input": [*texts, "a" * 101]}, prompt=100))
    assert says == "input has a text of 101 tokens; 100 are allowed"
    with_tokens = refusal(asked("/v1/embeddings", {"input": [[1, 2], [100257]]}))  # OpenAI's
    assert with_tokens == "input: token numbers are from 0 to 10, of this model's own tokenizer; texts need none"


def test_a_number_without_a_fraction_is_an_integer(asked):
    assert asked.text([1.0, 2e0], max_tokens=3.0, seed=4.0, logit_bias={"3": 2}) == asked.text(
        [1, 2], max_tokens=3, seed=4, logit_bias={"3": 2.0}
    )
    for number in (1.5, 1e300, -1.0):
        assert "max_tokens must be an integer" in refusal(asked("/v1/completions", {"prompt": "a", "max_tokens": number}))
        assert "token numbers" in refusal(asked("/v1/completions", {"prompt": [number]}))


def test_some_clients_with_many_texts_share_a_small_server(asked):
    texts = ["a", "b", "ab"] * 40
    answers = asked.together(*[("/v1/embeddings", {"input": texts})] * 3)
    first = next(answered(one)["data"] for one in answers if one.status_code == 200)
    for one in answers:
        assert one.status_code == 503 or one.json()["data"] == first


@pytest.mark.parametrize("name", NEUTRAL)
def test_what_asks_for_nothing_is_taken_and_anything_else_refused(asked, name):
    plain = asked.text("ab", seed=1)
    for value in NEUTRAL[name]:
        assert asked.text("ab", seed=1, **{name: value}) == plain
    assert name in refusal(asked("/v1/completions", {"prompt": "ab", name: {"x": 1}}))


def test_a_chat_is_told_where_to_ask(asked, others):
    body = {"messages": [{"role": "user", "content": "Hello"}]}
    for one in (asked, others["seq2seq"]):
        says = refusal(one("/v1/chat/completions", body), 404)
        assert says.endswith("holds no chats: ask it by POST /v1/completions, with a prompt")
    assert "ask it by POST /v1/tag" in refusal(others["tagger"]("/v1/chat/completions", body), 404)


def test_a_text_becomes_tokens_and_tokens_a_text(asked, others):
    for one in (asked, others["seq2seq"], others["words"]):
        for text in ("a b c" if one is others["words"] else "abc", "", "a"):
            tokens = answered(one("/tokenize", {"prompt": text, "model": one.model.name, "add_special_tokens": False}))
            assert tokens["tokens"] == one.model.tokenizer.encode(text.encode(), False).tolist()
            assert (tokens["count"], tokens["max_model_len"], tokens["token_strs"]) == (len(tokens["tokens"]), 32768, None)
            assert answered(one("/detokenize", {"tokens": tokens["tokens"]})) == {"prompt": text}
    tokens = answered(asked("/tokenize", {"prompt": "abc"}))["tokens"]
    assert asked.text(tokens, seed=3) == asked.text("abc", seed=3)
    named = answered(others["words"]("/tokenize", {"prompt": "a b\nc", "return_token_strs": True}))
    assert named["token_strs"] == ["a", " b", "\n", "c"]


def test_a_tokenizer_says_what_begins_and_ends_its_texts(asked, others):
    info, words = (answered(one("/tokenizer_info")) for one in (asked, others["words"]))
    assert (info["tokenizer_class"], info["kind"], info["vocab_size"]) == ("CharTokenizer", "char", 11)
    assert (info["bos_token"], info["eos_token"]) == ("\n", None)
    assert (words["bos_token"], words["eos_token"], words["unk_token"]) == ("\n", "\n", None)
    assert answered(others["words"]("/tokenize", {"prompt": "\n"}))["tokens"] == [0]
    assert answered(others["seq2seq"]("/tokenizer_info"))["bos_token"] is None
    assert "ask it by POST /v1/tag" in refusal(others["tagger"]("/tokenizer_info"), 404)


@pytest.mark.parametrize(
    ("kind", "path", "field", "more"),
    [
        ("seq2seq", "/v1/completions", "prompt", {}),
        ("seq2seq", "/v1/score", "source", {"target": "a"}),
        ("tagger", "/v1/tag", "input", {}),
    ],
)
def test_the_description_says_that_a_text_to_be_read_whole_is_not_empty(others, kind, path, field, more):
    described = answered(others[kind]("/openapi.json"))
    content = described["paths"][path]["post"]["requestBody"]["content"]["application/json"]
    schema = described["components"]["schemas"][content["schema"]["$ref"].rpartition("/")[2]]["properties"][field]
    assert schema.get("anyOf", [schema])[0] == {"type": "string", "minLength": 1}
    for empty in [""] if "anyOf" not in schema else ["", ["a", ""]]:
        refusal(others[kind](path, {field: empty, **more}))
    answered(others[kind](path, {field: "a", **more}))


def test_any_name_of_a_request_is_taken_and_that_of_an_answer_well_formed(asked):
    described = answered(asked("/openapi.json"))["components"]
    given, told = (described[part]["X-Request-Id"]["schema"] for part in ("parameters", "headers"))
    assert given == {"type": "string"}
    assert re.fullmatch(told["pattern"], asked("/v1/models").headers["x-request-id"])


@pytest.mark.parametrize(
    ("path", "body", "says"),
    [
        ("/tokenize", {"messages": []}, "prompt must be there, a string"),
        ("/tokenize", {"prompt": ["a"]}, "prompt must be there, a string"),
        ("/tokenize", {"prompt": "\ud800"}, "surrogate"),
        ("/tokenize", {"prompt": "Z"}, "'Z' is not in the vocabulary"),
        ("/tokenize", {"prompt": "a", "add_special_tokens": 1}, "add_special_tokens must be true or false"),
        ("/tokenize", {"prompt": "a", "tools": []}, "unknown parameter 'tools'"),
        ("/tokenize", {"prompt": "a" * 101}, "prompt has 101 tokens; 100 are allowed"),
        ("/detokenize", {"tokens": "a"}, "tokens must be there, a list of token numbers"),
        ("/detokenize", {"tokens": [True]}, "tokens must be there, a list of token numbers"),
        ("/detokenize", {"tokens": [11]}, "token numbers are from 0 to 10"),
        ("/detokenize", {"tokens": [10**30]}, "token numbers are from 0 to 10"),
        ("/detokenize", {"tokens": [0] * 101}, "tokens has 101 tokens; 100 are allowed"),
        ("/detokenize", {}, "tokens must be there"),
    ],
)
def test_what_is_no_text_or_no_tokens_is_refused(asked, path, body, says):
    assert re.search(says, refusal(asked(path, body, prompt=100)))


def test_characters_of_several_tokens_come_back_whole(tmp_path):
    make(tmp_path / "model", tokenizer=CharTokenizer([*"abcdefghi", "\u20ac", "\n"]))
    with served(tmp_path / "model") as asked:
        tokens = answered(asked("/tokenize", {"prompt": "a\u20ac\n"}))["tokens"]
        assert answered(asked("/detokenize", {"tokens": tokens})) == {"prompt": "a\u20ac\n"}
