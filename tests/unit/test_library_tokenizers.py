"""Our tokenizers in the form of the `tokenizers` library: the same numbers for every text, and back into our own form."""

import ast
import json
import pathlib

import pytest
import tokenizers as library
from helpers.model_folders import make, make_kind
from helpers.text_tokenizers import NASTY, SAMPLE, built
from hypothesis import given
from hypothesis import strategies as st

import dllm
from dllm.config import ModelConfig
from dllm.data.sound_tokenizers import MelTokenizer, MulawTokenizer
from dllm.data.tokenizers import BPETokenizer, WordTokenizer, load
from dllm.errors import UserError
from dllm.exchange import hugging_face

TEXT = ("byte", "char", "word", "bpe")
EVERY = pytest.mark.parametrize(
    ("kind", "unknown"), [("byte", True), ("char", True), ("char", False), ("word", True), ("word", False), ("bpe", True)]
)
PAIRS = pytest.mark.parametrize("pairs", [False, True])


def in_library(tokenizer, framed=True):
    found = library.Tokenizer.from_str(json.dumps(hugging_face.tokenizers_form(tokenizer, framed)))
    found.encode_special_tokens = True  # as tokenizer_config.json lets transformers have it
    return found


def ours(tokenizer, text):
    """Numbers of a text as a prompt, or None where it is refused."""
    try:
        return tokenizer.encode(text.encode(), end=False).tolist()
    except UserError:
        return None


def theirs(found, text):
    try:
        return found.encode(text, add_special_tokens=False).ids
    except Exception as error:
        if "WordLevel error: Missing [UNK] token" not in str(error):
            raise
        return None


@PAIRS
@EVERY
def test_nasty_texts_have_the_same_numbers_and_come_back_alike(kind, unknown, pairs):
    tokenizer = built(kind, pairs, unknown)
    found = in_library(tokenizer)
    assert found.get_vocab_size() == tokenizer.size
    refused = 0
    for text in [*NASTY, SAMPLE]:
        numbers = ours(tokenizer, text)
        assert theirs(found, text) == numbers, text
        refused += numbers is None
        if numbers:
            back = tokenizer.decode(numbers).decode(errors="replace")
            assert found.decode(numbers, skip_special_tokens=False) == (back.removesuffix(" ") if kind == "word" else back)
    assert (refused > 0) == (not unknown)


@EVERY
@given(
    text=st.lists(
        st.one_of(st.text(), st.sampled_from([*NASTY, *SAMPLE.split(" ")]), st.text(" \n\r\t\x1c\x85ab<unk>eos"))
    ).map("".join)
)
def test_any_text_has_the_same_numbers(kind, unknown, text):
    tokenizer, found = KNOWN[kind, unknown]
    assert theirs(found, text) == ours(tokenizer, text)


KNOWN = {(kind, unknown): (built(kind, False, unknown), None) for kind in TEXT for unknown in (True, False)}
KNOWN = {key: (tokenizer, in_library(tokenizer)) for key, (tokenizer, _) in KNOWN.items()}


@PAIRS
@EVERY
def test_the_form_is_the_one_the_library_writes_and_is_read_again(kind, unknown, pairs):
    tokenizer = built(kind, pairs, unknown)
    form = hugging_face.tokenizers_form(tokenizer)
    written = json.loads(library.Tokenizer.from_str(json.dumps(form)).to_str())
    assert written == form
    assert load(hugging_face.read_tokenizers_form(written), "x").to_json() == tokenizer.to_json()


@pytest.mark.parametrize("kind", TEXT)
def test_a_source_and_a_pair_get_their_frame(kind):
    tokenizer = built(kind, pairs=True)
    found, source = in_library(tokenizer), ours(tokenizer, "two")
    target = ours(tokenizer, "time")
    sep, end = tokenizer.sep, tokenizer.end
    assert found.encode("two").ids == [end, *source, sep]
    assert found.encode("two", "time").ids == [end, *source, sep, *target, end]
    assert in_library(tokenizer, framed=False).encode("two").ids == source


def test_a_vocabulary_may_have_the_names_of_the_tokens_of_pairs():
    tokenizer = WordTokenizer(["<unk>", "<|sep|>", "<|end|>", "<<|sep|>>", "<|pad|>"])
    tokenizer.pairs = True
    assert hugging_face.spellings(tokenizer) == ("<<<|sep|>>>", "<<|end|>>", "<<|pad|>>")
    assert in_library(tokenizer).encode("<|sep|> <|end|>").ids == [6, 1, 2, 5]


def test_long_texts_of_lines_have_the_same_numbers_but_for_a_cut_between_blank_lines():
    text = SAMPLE.replace("\n\n", "\n") * 400
    tokenizer, found = KNOWN["bpe", True]
    assert len(text) > 2 * hugging_face.BLOCK
    assert theirs(found, text) == ours(tokenizer, text)
    blank = BPETokenizer.build(BPETokenizer.count(b"x\n\n\n\n" * 99), 300)
    text = "x" * hugging_face.BLOCK + "\n\n\n\nx"
    assert theirs(in_library(blank), text) != ours(blank, text)
    assert f"more than {hugging_face.BLOCK:,} characters" in " ".join(hugging_face.differences(blank))


@pytest.mark.parametrize(
    ("kind", "pairs", "unknown", "says"),
    [
        ("byte", False, True, []),
        ("char", False, True, []),
        ("char", True, False, ["A char that is not in the vocabulary", "`<|sep|>` and `<|end|>` in a text"]),
        ("word", False, True, ["gets no `<eos>`", "end that with a space"]),
    ],
)
def test_what_differs_is_said(kind, pairs, unknown, says):
    found = hugging_face.differences(built(kind, pairs, unknown))
    assert len(found) == len(says)
    for sentence, words in zip(found, says, strict=True):
        assert words in sentence


def changed(**changes):
    return hugging_face.tokenizers_form(built("word")) | changes


@pytest.mark.parametrize(
    "value",
    [
        {"model": None},
        {"model": {"type": "WordLevel"}},
        changed(pre_tokenizer={"type": "Whitespace"}),
        changed(normalizer={"type": "Lowercase"}),
        changed(decoder=None),
        changed(model={"type": "WordLevel", "vocab": {"a": 0, "b": 2}}),
        changed(model={"type": "WordLevel", "vocab": {"a": 0, "b": "x"}}),
        changed(model={"type": "WordLevel", "vocab": [1]}),
        changed(model={"type": "Unigram", "vocab": []}),
    ],
)
def test_a_tokenizer_of_somebody_else_is_not_taken_for_ours(value):
    with pytest.raises(ValueError, match="no tokenizer that dllm wrote"):
        hugging_face.read_tokenizers_form(value)


@pytest.mark.parametrize(
    ("kind", "tokenizer", "weights", "names"),
    [
        ("lm", built("byte"), "bf16", set(hugging_face.FILES)),
        ("lm", built("byte"), "int8", {"tokenizer.json", "tokenizer_config.json"}),
        ("bilm", built("word"), "fp32", {"tokenizer.json", "tokenizer_config.json"}),
        ("seq2seq", built("char", pairs=True), "fp32", {"tokenizer.json", "tokenizer_config.json"}),
        ("lm", MulawTokenizer(), "fp32", {"modeling_dllm.py", "generation_config.json"}),
        ("ctc", MelTokenizer(), "fp32", set()),
    ],
)
def test_a_folder_has_what_transformers_can_use(kind, tokenizer, weights, names):
    model = ModelConfig(kind=kind)
    assert hugging_face.files(model, tokenizer, weights).keys() == names
    assert bool(hugging_face.keys(model, tokenizer, weights)) == ("modeling_dllm.py" in names)


def test_a_card_says_how_others_load_the_model_or_why_they_do_not(tmp_path):
    for stored, says in (("fp32", "AutoModelForCausalLM.from_pretrained"), ("int8", "transformers loads no weights of int8")):
        make(tmp_path / stored, stored=stored)
        assert says in (tmp_path / stored / "README.md").read_text()
    make_kind(tmp_path / "sound", {"kind": "ctc", "features": 6})
    assert "transformers does not load this model" in (tmp_path / "sound" / "README.md").read_text()
    assert not (tmp_path / "sound" / "tokenizer.json").exists()
    make_kind(tmp_path / "tagger", {"kind": "tagger"})
    assert "transformers loads no model of this kind. `AutoTokenizer" in (tmp_path / "tagger" / "README.md").read_text()


def test_dllm_never_imports_what_runs_in_transformers():
    package = pathlib.Path(dllm.__file__).parent
    named = [path for path in package.glob("**/*.py") if "modeling_dllm" in path.read_text()]
    assert package / "exchange" / "hugging_face.py" in named
    for path in named:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = {alias.name for alias in node.names} | {getattr(node, "module", None) or ""}
                assert not any("modeling_dllm" in name for name in names), path
