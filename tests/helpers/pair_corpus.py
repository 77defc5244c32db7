"""A small corpus of pairs, made without text."""

import itertools

import numpy as np

from dllm.data import shards
from dllm.data.corpus import Corpus
from dllm.data.tokenizer_files import save_tokenizer, tokenizer_hash
from dllm.data.tokenizers import KINDS
from dllm.files import storage


def make_corpus(folder, examples, shard_count=3):
    """A corpus of pairs: (source tokens, target tokens) below 10, in several shards."""
    tokenizer = KINDS["char"]([chr(0x4E00 + number) for number in range(10)])
    tokenizer.pairs = True
    entries, start = [], 0
    for number, (first, last) in enumerate(itertools.pairwise(np.linspace(0, len(examples), shard_count + 1).astype(int))):
        stream = [] if number else [tokenizer.end]
        for source, target in examples[first:last]:
            stream += [*source, tokenizer.sep, *target, tokenizer.end]
        path = folder / f"train-{number:05d}.h5"
        with shards.ShardWriter(path, np.uint8) as shard:
            shard.append(np.array(stream))
        entries.append({"name": path.name, "start": start, "stop": start + len(stream), "pairs": int(last - first)})
        entries[-1]["sha256"] = storage.sha256(path)
        start += len(stream)
    longest = max(len(source) + len(target) + 2 for source, target in examples)
    split = {"tokens": start, "bytes": 1, "shards": entries, "pairs": len(examples), "longest": longest}
    save_tokenizer(folder, tokenizer)
    manifest = {"format": shards.FORMAT, "kind": "char", "vocabulary": 12, "dtype": "uint8", "splits": {"train": split}}
    storage.write_json(folder / "manifest.json", manifest | {"tokenizer": tokenizer_hash(tokenizer)})
    return Corpus(folder)
