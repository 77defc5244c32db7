"""Small tokenizers of text, and texts that are hard for them."""

import collections

from dllm.data.tokenizers import KINDS

SAMPLE = "Hello, wörld!\n\n  two  spaces\tand a tab\r\nOnce upon a time <unk>, naïve ☃ 漢字 \U0001f600 e\u0301 x\x1cy\x85z\n"
NASTY = [
    "", "\n", " ", "\n\n", "two", " two ", "two\n", "two\n\n", "\r\n two\r\n\r\n", "x\x1cy\x1dz\x1e\x1f", "x\x85y\xa0z",
    "a\u2028b\u2029c\u200bd\u3000e\u180ef", "\U0001f600\u200d\U0001f600", "\u0301\u0301e\u0301", "\ufeffx",
    "a\0b\0", "<unk> <eos>", "x<eos>y<unk>z", "<|sep|> <|end|><|pad|>", "a\tb\x0bc\x0cd", "unknown qqq \u0416\u4e00",
    "don't I'll 12 345 ...", "\ud7ff\ue000\U0010ffff",
]  # fmt: skip


def built(kind, pairs=False, unknown=True):
    """A tokenizer of SAMPLE. unknown : it has <unk>, where its kind can have it"""
    counts = KINDS[kind].count(SAMPLE.replace("" if unknown else "<unk>", "").encode())
    tokenizer = KINDS[kind].build(
        collections.Counter(counts), 280 if kind == "bpe" else 0, unknown and kind in ("char", "word")
    )
    tokenizer.pairs = pairs
    return tokenizer
