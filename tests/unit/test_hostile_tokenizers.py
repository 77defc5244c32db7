"""Tokenizers made to harm: refused in one line, soon, and in little memory; and the largest that are none are read."""

import json
import re

import pytest
from helpers.limited import limited, refusals

from dllm.data import tokenizer_files, tokenizers
from dllm.data.tokenizers import BPETokenizer, CharTokenizer, WordTokenizer
from dllm.errors import UserError


def bpe(**changes):
    """tokenizer.json of a byte-pair encoding of three tokens, with changes in its model."""
    blank = json.loads(BPETokenizer._blank().to_str())
    blank["model"] |= {"vocab": {"a": 0, "b": 1, "ab": 2}, "merges": [["a", "b"]]} | changes
    return {"kind": "bpe", "model": blank}


HOSTILE_TOKENIZERS = {  # those marked made the library panic, or end the process, when they were let through
    "a prefix": bpe(continuing_subword_prefix="##"),  # panicked
    "a long prefix": bpe(continuing_subword_prefix="#" * 6),  # panicked
    "a prefix of two bytes": bpe(continuing_subword_prefix="\u00e9"),  # panicked
    "a prefix that cuts a letter": bpe(
        continuing_subword_prefix="##", vocab={"x": 0, "a\u00fc": 1, "x\u00bc": 2}, merges=[["x", "a\u00fc"]]
    ),  # ended the process
    "a suffix": bpe(end_of_word_suffix="</w>"),
    "an unknown token": bpe(unk_token="zz"),
    "bytes as a last resort": bpe(byte_fallback=True),
    "drawn merges": bpe(dropout=0.5),
    "another model": {"kind": "bpe", "model": {"model": {"type": "WordPiece", "vocab": {"a": 0}, "unk_token": "u"}}},
    "a key too many": bpe(more=1),
    "no model": {"kind": "bpe", "model": None},
    "an empty token": bpe(vocab={"": 0, "a": 1}, merges=[["", "a"]]),
    "a gap": bpe(vocab={"a": 0, "b": 4_000_000_000}, merges=[]),
    "a number twice": bpe(vocab={"a": 0, "b": 0}, merges=[]),
    "true for 1": bpe(vocab={"a": 0, "b": True}, merges=[]),
    "a negative number": bpe(vocab={"a": 0, "b": -1}, merges=[]),
    "a merge of nothing": bpe(merges=[["a", "x"]]),
    "a merge of three": bpe(merges=[["a", "b", "a"]]),
    "a merge twice": bpe(merges=[["a", "b"], ["a", "b"]]),
    "a merge of numbers": bpe(merges=[[0, 1]]),
    "no byte": bpe(vocab={"a": 0, "\u4e00": 1}, merges=[]),
    "merges of text": bpe(merges="ab"),
    "a long token": bpe(vocab={"a": 0, "a" * 5000: 1}, merges=[]),
    "a list for a vocabulary": bpe(vocab=["a"], merges=[]),
    "a word twice": {"kind": "word", "units": ["a", "a"]},
    "an empty word": {"kind": "word", "units": [""]},
    "a long word": {"kind": "word", "units": ["x" * 5000]},
    "words of one string": {"kind": "word", "units": "abc"},
    "words of an object": {"kind": "word", "units": {"a": 0}},
    "a kind that is a list": {"kind": ["word"], "units": []},
    "two million words": {"kind": "word", "units": [f"{number:x}" for number in range(2_000_000)]},
}


@pytest.fixture(scope="module")
def of_tokenizers(tmp_path_factory):
    """case -> (the line, the exit code) of every hostile tokenizer, in one process."""
    world = tmp_path_factory.mktemp("tokenizers")
    for number, value in enumerate(HOSTILE_TOKENIZERS.values()):
        (world / str(number)).mkdir()
        (world / str(number) / "tokenizer.json").write_text(json.dumps(value))
    paths = [("tokenizer", world / str(number) / "tokenizer.json") for number in range(len(HOSTILE_TOKENIZERS))]
    return dict(zip(HOSTILE_TOKENIZERS, refusals(paths, memory=500 << 20), strict=True))


@pytest.mark.parametrize("case", HOSTILE_TOKENIZERS)
def test_a_hostile_tokenizer_is_one_line(of_tokenizers, case):
    text, code = of_tokenizers[case]
    assert re.match(r"dllm: \S+/tokenizer.json holds no tokenizer that this version knows.*; prepare the data anew$", text), (
        text
    )
    assert code == 2
    assert len(text) < 400


def test_what_was_not_attacked_is_a_tokenizer():
    assert tokenizers.load(bpe(), "x").encode(b"abba").tolist() == [2, 1, 0]
    assert tokenizers.load(bpe(merges=["a b"]), "x").encode(b"ab").tolist() == [2]  # as older versions of the library write it


@pytest.mark.slow
def test_a_tokenizer_of_76_megabytes_is_refused_before_it_is_read(tmp_path):
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps({"kind": "word", "units": [f"word{number:08d}" for number in range(4_750_000)]}))
    assert path.stat().st_size > 75_000_000
    ((text, code),) = refusals([("tokenizer", path)], memory=100 << 20)
    assert text == f"dllm: {path} is too large: over 65,536 kB"
    assert code == 2


LARGEST = """
from dllm.data import tokenizer_files
limit(1 << 30)
print(tokenizer_files.load_tokenizer(sys.argv[1]).size)
"""


@pytest.mark.slow
def test_the_largest_tokenizer_that_prepare_makes_is_read(tmp_path):
    """A million words of a language of three bytes a letter, within a minute on a busy machine and 1 GB."""
    counts = {f"\u0905\u0906\u0907{number:06x}": 1 for number in range(tokenizers.MOST_TOKENS - 1)}
    tokenizer = WordTokenizer.build(counts | {"x" * 5000: 9}, 0)
    assert tokenizer.size == tokenizers.MOST_TOKENS
    tokenizer_files.save_tokenizer(tmp_path, tokenizer)
    done = limited(LARGEST, tmp_path, seconds=60)
    assert done.stdout == f"{tokenizers.MOST_TOKENS}\n", done.stderr[-500:]


@pytest.mark.slow
def test_prepare_refuses_what_it_would_not_read():
    with pytest.raises(UserError, match=r"the text has 1,048,577 words: keep the most frequent 1,048,576 by --vocab-size"):
        WordTokenizer.build({f"{number:x}": 1 for number in range(tokenizers.MOST_TOKENS + 1)}, 0)
    with pytest.raises(UserError, match=r"--vocab-size 262145: bpe has at most 262,144 tokens"):
        BPETokenizer.build({}, 262_145)


def test_words_that_are_too_long_are_unknown(tmp_path):
    long = "x" * (tokenizers.LONGEST_TOKEN + 1)
    tokenizer = WordTokenizer.build(WordTokenizer.count(f"a b {long} a\n".encode()), 0)
    assert long not in tokenizer.units
    assert tokenizer.decode(tokenizer.encode(f"a {long} b\n".encode())) == b"a <unk> b\n"
    tokenizer_files.save_tokenizer(tmp_path, tokenizer)
    assert tokenizer_files.load_tokenizer(tmp_path).size == tokenizer.size


def test_byte_pair_encoding_makes_no_tokens_that_are_too_long(tmp_path):
    text = ("x" * 20_000 + "\n").encode()
    tokenizer = BPETokenizer.build(BPETokenizer.count(text), 300)
    assert max(map(len, tokenizer._pieces)) <= tokenizers.LONGEST_TOKEN
    tokenizer_files.save_tokenizer(tmp_path, tokenizer)
    found = tokenizer_files.load_tokenizer(tmp_path)
    assert tokenizer_files.tokenizer_hash(found) == tokenizer_files.tokenizer_hash(tokenizer)
    assert found.decode(found.encode(text)) == text


def test_a_vocabulary_too_large_for_its_file_is_refused_when_it_is_written(tmp_path):
    units = [f"{number:05d}" + "x" * 4000 for number in range(20_000)]
    with pytest.raises(UserError, match=r"tokenizer.json is too large: over 65,536 kB"):
        tokenizer_files.save_tokenizer(tmp_path, CharTokenizer(units))
    assert list(tmp_path.iterdir()) == []


# --- what is written of an error, and names
