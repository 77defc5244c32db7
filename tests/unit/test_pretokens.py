"""Pre-tokens by kernels against the `tokenizers` library: the same pieces, the same tokens, the same vocabulary."""

import functools
import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dllm.data import pretokens, tokenizers
from dllm.data.pretokens import Pretokens, find_merges
from dllm.data.tokenizers import BPETokenizer

FEW = settings(max_examples=60, deadline=None, derandomize=True, database=None)
PIECES = [
    "'", "s", "'s", "'t", "'re", "'ve", "'m", "'ll", "'d", "'S", " ", "  ", "\n", "\n\n", "\t", "\r", "\u00a0", "\u2028",
    "\x1c", "\x85", "a", "ab", "ß", "宋", "é", "e\u0301", "1", "½", "Ⅷ", "٣", "!", "--", "_", "🙂", "\u200b", "\x00", "Ω",
]  # fmt: skip
MIXED = st.lists(st.sampled_from(PIECES), max_size=40).map("".join)
TEXTS = st.one_of(MIXED, st.text(max_size=60), st.lists(st.tuples(MIXED, st.text(max_size=5)), max_size=4).map(str))
SAMPLE = "".join(f"def f{n}(self, x):\n    return 'naïve 宋词 {n}'  # it's 🙂\n\n" for n in range(300))


@functools.cache
def tokenizer():
    return BPETokenizer.build(BPETokenizer.count(SAMPLE.encode()), 400)


@pytest.fixture
def plainly(monkeypatch):
    """The library alone."""
    monkeypatch.setattr(BPETokenizer, "fast_from", 1 << 40)


@pytest.mark.usefixtures("plainly")
@FEW
@given(st.lists(TEXTS, max_size=3), st.integers(1, 30))
def test_texts_are_split_counted_and_encoded_as_by_the_library(texts, block):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pretokens, "BLOCK", block)
        patch.setattr(tokenizers, "_blocks", functools.partial(tokenizers._blocks, size=block))
        fast = tokenizer()._pretokens
        counter = Pretokens(BPETokenizer._splitter())
        for text in texts:
            assert counter.count(text) == BPETokenizer.count(text.encode())
            expected = tokenizer().encode(text.encode())
            found = fast.encode(text)
            assert found.dtype == np.int64
            np.testing.assert_array_equal(found, expected)


@pytest.mark.usefixtures("plainly")
def test_every_character_has_the_kind_that_the_library_gives_it():
    for start in range(0, 0x30000, 0x800):
        text = "".join(f"a{chr(point)}1{chr(point)}!{chr(point)} {chr(point)}\n" for point in range(start, start + 0x800, 7)
                       if not 0xD800 <= point < 0xE000)  # fmt: skip
        assert BPETokenizer._counter().count(text) == BPETokenizer.count(text.encode())


@pytest.mark.usefixtures("plainly")
def test_a_table_that_is_full_begins_anew_and_memory_is_bounded(monkeypatch):
    monkeypatch.setattr(pretokens, "MOST", 300)
    monkeypatch.setattr(pretokens, "MOST_POINTS", 2000)
    fast, rng = Pretokens(BPETokenizer._splitter(), tokenizer()._pretokens._encode), np.random.default_rng(1)
    for _ in range(60):
        text = " ".join(str(number) for number in rng.integers(0, 100_000, rng.integers(1, 90)))
        np.testing.assert_array_equal(fast.encode(text), tokenizer().encode(text.encode()))
        assert len(fast._hashes) < 1000
        assert len(fast._arena) < 6000
        assert len(fast._slots) > 2 * len(fast._hashes)


@pytest.mark.usefixtures("plainly")
def test_threads_share_a_table():
    texts = ["".join(map(str, np.random.default_rng(seed).integers(0, 99, 900))) + "it's" * seed for seed in range(8)]
    expected, found = [tokenizer().encode(text.encode()).tolist() for text in texts], [None] * 8
    work = lambda number: found.__setitem__(number, tokenizer()._pretokens.encode(texts[number]).tolist())
    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert found == expected


WORDS = st.dictionaries(st.one_of(st.text("ab", min_size=1, max_size=12), st.text(min_size=1, max_size=6)), st.integers(1, 9))


@FEW
@given(WORDS, st.integers(256, 300))
def test_merges_are_those_that_the_library_finds(words, size):
    counts = BPETokenizer.count("\n".join(" ".join([word] * count) for word, count in words.items()).encode())
    model = BPETokenizer.build(counts, size).to_json()["model"]["model"]
    vocabulary, merges = find_merges(counts, size, tokenizers.LONGEST_TOKEN)
    assert vocabulary == model["vocab"]
    assert [list(merge) for merge in merges] == [list(merge) for merge in model["merges"]]


def test_much_text_has_the_vocabulary_of_the_library(monkeypatch):
    counts = BPETokenizer.count(SAMPLE.encode() * 3)
    model = BPETokenizer.build(counts, 900).to_json()
    monkeypatch.setattr(tokenizers, "FEW", 100)
    fast = BPETokenizer.build(counts, 900)
    assert fast.to_json() == model
    assert fast.decode(fast.encode(SAMPLE.encode())) == SAMPLE.encode()


def test_long_tokens_are_left_out_as_by_the_library(monkeypatch):
    monkeypatch.setattr(tokenizers, "LONGEST_TOKEN", 6)
    counts = BPETokenizer.count(b"abcabcabcabc abababababab aaaaaaaaaaaaa " * 20)
    model = BPETokenizer.build(counts, 300).to_json()
    monkeypatch.setattr(tokenizers, "FEW", 0)
    assert BPETokenizer.build(counts, 300).to_json() == model
