"""Texts of every tokenizer in parts: what is written, streamed, echoed and scored joins to what it is as a whole."""

import json

import pytest
from helpers.asking import answered, served
from helpers.model_folders import make
from hypothesis import given, settings
from hypothesis import strategies as st

from dllm.data.tokenizer import is_behind_word
from dllm.data.tokenizers import BPETokenizer, ByteTokenizer, CharTokenizer, WordTokenizer
from dllm.inference.generation import decode

WORDS = WordTokenizer(["<unk>", "<eos>", "The", "United", "States", "of", "a", "b", "c", "d", "e"])
PAIRED = WordTokenizer(WORDS.units)
PAIRED.pairs = True
TOKENIZERS = {
    "byte": ByteTokenizer(), "char": CharTokenizer(list("ab\n\u20ac")), "word": WORDS, "word pairs": PAIRED,
    "bpe": BPETokenizer.build({"ab": 3, "abc": 2, " \u20ac": 4}, 260),
}  # fmt: skip


@pytest.mark.parametrize("name", TOKENIZERS)
@settings(max_examples=60, deadline=None)
@given(st.data())
def test_parts_of_a_text_are_the_whole_wherever_it_is_cut(name, data):
    tokenizer = TOKENIZERS[name]
    tokens = data.draw(st.lists(st.integers(0, tokenizer.size - 1), max_size=12))
    cut = data.draw(st.integers(0, len(tokens)))
    whole, ends = tokenizer.spell_all(tokens)
    first, behind = tokenizer.spell_all(tokens[:cut])
    assert (first + tokenizer.spell_all(tokens[cut:], behind)[0], ends) == (whole, tokenizer.spell_all(tokens[cut:], behind)[1])
    if name != "word pairs":
        assert tokenizer.decode(tokens) == whole + b" " * ends  # as files have it
    text = "".join(piece for _, piece in decode(tokenizer, tokens))
    upto = tokens.index(tokenizer.end) if tokenizer.end in tokens else len(tokens)
    assert text == tokenizer.spell_all(tokens[:upto])[0].decode(errors="replace")


@given(st.lists(st.sampled_from([*WORDS.units[2:], "\n", " ", "\u2028"]), max_size=8), st.integers(0, 8))
def test_a_text_that_somebody_has_written_goes_on_with_a_blank_where_it_needs_one(parts, cut):
    text = "".join(part if part.isspace() else f"{part} " for part in parts)[: cut * 3].rstrip(" ")
    tokens = WORDS.encode(text.encode(), end=False)
    more, _ = WORDS.spell_all([2, 3], is_behind_word(text))
    assert WORDS.encode(text.encode() + more, end=False).tolist() == [*tokens, 2, 3]


@pytest.fixture(scope="module")
def asked(tmp_path_factory):
    folder = tmp_path_factory.mktemp("words") / "model"
    make(folder, tokenizer=WORDS)
    with served(folder) as asked:
        yield asked


ONLY = {"max_tokens": 4, "temperature": 0, "logit_bias": {"4": 100}}


def test_a_word_keeps_away_from_the_prompt_and_from_others(asked):
    four = "States States States States"
    for prompt, expected in {
        "The United": f" {four}", "The United ": four, "The United\n": four, "": four, " ": four, "The\tUnited\u00a0": four,
    }.items():  # fmt: skip
        assert asked.text(prompt, **ONLY) == expected
        assert asked.streamed(prompt, **ONLY) == expected
    assert asked.text([2, 3], **ONLY) == f" {four}"
    assert asked.text([2, 1], **ONLY) == four


def test_an_echo_joins_and_its_tokens_are_the_text(asked):
    for prompt, start in {"The United": "The United ", " The  United ": "The United ", "The\n": "The\n", "": ""}.items():
        for more in ({}, {"logprobs": 2}):
            body = {"max_tokens": 6, "seed": 5, "echo": True} | more
            (choice,) = asked.choices(prompt, **body)
            assert choice["text"].startswith(start)
            assert asked.streamed(prompt, **body) == choice["text"]
        told = choice["logprobs"]
        assert "".join(told["tokens"]) == choice["text"]
        assert told["text_offset"] == [len("".join(told["tokens"][:at])) for at in range(len(told["tokens"]))]
        assert all(token in top for token, top in zip(told["tokens"][1:], told["top_logprobs"][1:], strict=True))
        again = asked.text(prompt, max_tokens=6, seed=5)
        assert choice["text"].endswith(again)
        assert WORDS.encode(choice["text"].encode(), False)[-6:].tolist() == WORDS.encode(again.encode(), False).tolist()


def test_stop_strings_see_the_text_that_is_shown(asked):
    body = {"max_tokens": 5, "temperature": 0, "logit_bias": {"4": 100}}
    assert asked.text("The", stop=["es St"], **body) == " Stat"
    assert asked.streamed("The", stop=["es St"], **body) == " Stat"
    assert asked.text("The", stop=[f"x{number}" for number in range(15)] + ["s"], **body) == " State"


def test_what_is_scored_has_the_names_of_the_text(asked):
    score = answered(asked("/v1/score", {"text": "The United\nStates"}))
    assert score["tokens"] == ["The", " United", "\n", "States"]
    assert json.dumps(score["token_ids"]) == "[2, 3, 1, 4]"
