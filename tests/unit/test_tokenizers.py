"""Tokenizers: exact round trips on any text, saving and loading, vocabularies from counts of pieces, unknown words."""

import collections
import functools
import itertools
import json
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dllm.data.tokenizers import KINDS, BPETokenizer, ByteTokenizer, CharTokenizer, WordTokenizer, load
from dllm.errors import UserError

FEW = settings(max_examples=60, deadline=None, derandomize=True, database=None)
FUNCTION = "def f{0}(self, x):\n    return 'naïve 宋词 {0}'  # 🙂\n\n"
SAMPLE = "".join(map(FUNCTION.format, range(300))).encode()
TEXT = [kind for kind in KINDS if kind != "mel"]  # kinds that make tokens
LINES = st.lists(st.text("ab \tß宋\r\u2028🙂", max_size=6), max_size=8).map("\n".join)  # with blanks of all kinds


@functools.cache
def built(kind, size=0):
    cls = KINDS[kind]
    return cls.build(cls.count(SAMPLE), size or (400 if kind == "bpe" else 0))


def saved_and_loaded(tokenizer):
    return load(json.loads(json.dumps(tokenizer.to_json())), "tokenizer.json")


# round trips


@FEW
@given(st.binary())
def test_byte_round_trip_is_exact_for_any_bytes(data):
    tokens = ByteTokenizer().encode(data)
    assert tokens.dtype == np.int64
    assert tokens.tolist() == list(data)
    assert ByteTokenizer().decode(tokens) == data


@FEW
@given(st.text())
def test_bpe_round_trip_is_exact_for_any_text(text):
    tokens = built("bpe").encode(text.encode())
    assert tokens.dtype == np.int64
    assert built("bpe").decode(tokens) == text.encode()


@FEW
@given(st.text(min_size=1))
def test_char_round_trip_is_exact_for_the_text_it_was_built_from(text):
    tokenizer = CharTokenizer.build(CharTokenizer.count(text.encode()), 0)
    tokens = tokenizer.encode(text.encode())
    assert tokenizer.size == len(set(text))
    assert len(tokens) == len(text)
    assert tokenizer.decode(tokens) == text.encode()


@FEW
@given(st.lists(st.lists(st.text("abcé宋", min_size=1, max_size=3), max_size=4), max_size=5))
def test_word_round_trip_is_exact_for_words_between_single_spaces(lines):
    data = "".join(" ".join(words) + "\n" for words in lines).encode()
    tokenizer = WordTokenizer.build(WordTokenizer.count(data), 0)
    assert tokenizer.decode(tokenizer.encode(data)) == data


@pytest.mark.parametrize("kind", TEXT)
def test_no_text_is_no_tokens(kind):
    assert built(kind).encode(b"").tolist() == []
    assert built(kind).decode([]) == b""


def test_bpe_merges_frequent_pairs_and_every_byte_has_a_token():
    tokenizer = built("bpe")
    assert tokenizer.size == 400
    assert len(tokenizer.encode(SAMPLE)) < len(SAMPLE) / 2
    tokens = [tokenizer.decode([number]) for number in range(400)]
    assert len(set(tokens)) == 400
    assert sorted(token for token in tokens if len(token) == 1) == [bytes([byte]) for byte in range(256)]


def test_bpe_encodes_a_long_text_a_block_of_lines_at_a_time():
    lines = b"".join(b"line %d of text\n" % number for number in range(3000))  # several blocks
    apart = np.concatenate([built("bpe").encode(line) for line in lines.splitlines(keepends=True)])
    np.testing.assert_array_equal(built("bpe").encode(lines), apart)


# saving and loading


@pytest.mark.parametrize("kind", TEXT)
def test_a_tokenizer_survives_saving(kind):
    tokenizer, again = built(kind), saved_and_loaded(built(kind))
    assert (again.kind, again.size) == (kind, tokenizer.size)
    tokens = tokenizer.encode(SAMPLE)
    np.testing.assert_array_equal(again.encode(SAMPLE), tokens)
    assert again.decode(tokens) == tokenizer.decode(tokens)
    assert again.to_json() == tokenizer.to_json()


@pytest.mark.parametrize(
    "value", [{"kind": "emoji"}, {"kind": "char"}, {"kind": "word", "units": 3}, {"kind": "bpe", "model": {}}, {}]
)
def test_a_file_that_holds_no_tokenizer_is_named(value):
    with pytest.raises(UserError, match=r"here\.json holds no tokenizer"):
        load(value, "here.json")


# counts and vocabularies


def pieces(data, places):
    """`data` cut behind the newlines at `places`, as text.plan_text cuts it; each with whether it is the last."""
    ends = [match.end() for match in re.finditer(b"\n", data)]
    cuts = sorted({0, *(ends[place % len(ends)] for place in places if ends), len(data)})
    return [(data[a:b], b == len(data)) for a, b in itertools.pairwise(cuts)]


@FEW
@given(LINES, st.lists(st.integers(0, 100), max_size=4))
@pytest.mark.parametrize("kind", ["byte", "char", "word"])
def test_pieces_cut_at_lines_count_and_encode_as_the_whole(kind, text, places):
    data, cls = text.encode(), KINDS[kind]
    counts = sum((cls.count(*piece) for piece in pieces(data, places)), collections.Counter())
    assert counts == cls.count(data)
    tokenizer = cls.build(counts, 0)
    assert tokenizer.to_json() == cls.build(cls.count(data), 0).to_json()
    parts = [tokenizer.encode(*piece) for piece in pieces(data, places)]
    np.testing.assert_array_equal(np.concatenate([*parts, np.empty(0, np.int64)]), tokenizer.encode(data))


@pytest.mark.parametrize("kind", ["char", "word", "bpe"])
def test_counts_merged_in_any_order_give_the_same_vocabulary(kind):
    cls = KINDS[kind]
    parts = [cls.count(*piece) for piece in pieces(SAMPLE, range(2, 900, 7))]
    orders = [parts, parts[::-1], parts[1::2] + parts[::2]]
    vocabularies = [cls.build(sum(order, collections.Counter()), 350).to_json() for order in orders]
    assert vocabularies[0] == vocabularies[1] == vocabularies[2]


def test_bpe_counts_of_pieces_are_those_of_the_whole_where_lines_do_not_begin_or_end_with_blanks():
    data = SAMPLE.replace(b"    ", b"").replace(b"\n\n", b"\n")
    counts = sum((BPETokenizer.count(*piece) for piece in pieces(data, range(0, 600, 7))), collections.Counter())
    assert counts == BPETokenizer.count(data)
    assert BPETokenizer.build(counts, 350).to_json() == BPETokenizer.build(BPETokenizer.count(data), 350).to_json()


def test_units_are_numbered_by_frequency_then_in_order():
    assert CharTokenizer.build(CharTokenizer.count(b"bbacc"), 0).units == ["b", "c", "a"]
    assert WordTokenizer.build(WordTokenizer.count(b"x y x\n\nz"), 0).units == ["<eos>", "x", "y", "z"]


@pytest.mark.parametrize(("kind", "text"), [("word", b"a a a b b c d <unk>\n"), ("char", b"aaabbcd")])
def test_unknown_units_become_unk_where_the_vocabulary_is_cut_short(kind, text):
    tokenizer = KINDS[kind].build(KINDS[kind].count(text), 3)
    assert tokenizer.size == 3
    assert tokenizer.units[:3] == ["<unk>", "a", "b"]
    known, unknown = text[:1], text[-1:] if kind == "char" else b"d"
    assert tokenizer.encode(known, end=False).tolist() == [1]
    assert tokenizer.encode(unknown, end=False).tolist() == [0]
    assert tokenizer.decode([0]).strip() == b"<unk>"


def test_a_vocabulary_of_just_the_right_size_has_no_unk():
    for size in (0, 3, 4):
        assert CharTokenizer.build(CharTokenizer.count(b"abc"), size).units == ["a", "b", "c"]


def test_units_that_only_other_splits_have_bring_an_unk():
    tokenizer = WordTokenizer.build(WordTokenizer.count(b"a b\n"), 0, unseen=True)
    assert tokenizer.units == ["<unk>", "<eos>", "a", "b"]
    assert tokenizer.encode(b"a zebra\n").tolist() == [2, 0, 1]


def test_unk_that_stands_in_the_text_serves_unknown_words():
    tokenizer = WordTokenizer.build(WordTokenizer.count(b"the <unk> sat\n"), 0)
    assert tokenizer.decode(tokenizer.encode(b"the cat sat\n")) == b"the <unk> sat\n"


@pytest.mark.parametrize(("kind", "text", "unit"), [("char", b"xyz", "'z'"), ("word", b"x y z\n", "'z'")])
def test_a_unit_that_is_not_in_the_vocabulary_is_named(kind, text, unit):
    tokenizer = KINDS[kind].build(KINDS[kind].count(text.replace(b"z", b"x")), 0)
    with pytest.raises(UserError, match=f"{unit} is not in the vocabulary"):
        tokenizer.encode(text)


@pytest.mark.parametrize(("kind", "size"), [("byte", 100), ("bpe", 255)])
def test_a_vocabulary_size_that_cannot_be_is_named(kind, size):
    with pytest.raises(UserError, match=f"--vocab-size {size}"):
        KINDS[kind].build(collections.Counter("ab"), size)


@pytest.mark.parametrize("kind", TEXT)
def test_only_bytes_takes_text_that_is_not_utf8(kind):
    if KINDS[kind].fixed:
        assert built(kind).decode(built(kind).encode(b"caf\xe9")) == b"caf\xe9"
        return
    for function in (KINDS[kind].count, built(kind).encode):
        with pytest.raises(UnicodeDecodeError) as error:
            function(b"caf\xe9!")
        assert error.value.start == 3


# one <eos> a line


@pytest.mark.parametrize(
    ("text", "end", "words"),
    [
        ("a b\nc\n", True, "a b <eos> c <eos>"),
        ("a b\nc", True, "a b <eos> c <eos>"),
        ("a b\nc", False, "a b <eos> c"),
        ("\n\na\n", True, "<eos> <eos> a <eos>"),
        ("  a\t b  \r\n", True, "a b <eos>"),
        ("", True, ""),
    ],
)
def test_words_have_one_eos_a_line(text, end, words):
    tokenizer = WordTokenizer(["<eos>", "a", "b", "c"])
    assert [tokenizer.units[token] for token in tokenizer.encode(text.encode(), end)] == words.split()
    assert WordTokenizer.count(text.encode(), end) == collections.Counter(words.split())
