"""How fast text becomes tokens, by one core: what prepare does, beside the tokenizers package and tiktoken."""

import argparse
import itertools
import os
import time
from functools import partial

from dllm.data.embedded import standard_library
from dllm.data.pretokens import Pretokens, find_merges
from dllm.data.tokenizers import KINDS, LONGEST_TOKEN, BPETokenizer

from .results import Measured, Table, bars, middle, spread
from .runs import installed

PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
SIZE = 4096  # of the vocabularies
PIECE = 1 << 20


def tokenizing(options: argparse.Namespace) -> Measured:
    """MB of text a second of processor time, one thread: counting, building and encoding, beside tokenizers and tiktoken."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    text = b"".join(path.read_bytes() for path in standard_library()[0])[: 2 << 20 if options.quick else None]
    cuts = [text.rindex(b"\n", 0, stop) + 1 for stop in (*range(PIECE, len(text), PIECE), len(text))]
    pieces = [text[start:stop] for start, stop in itertools.pairwise([0, *cuts])]
    table, data = Table(f"{len(text) / 1e6:.0f} MB of Python source, MB/s of a core", [("what", 40), ("MB/s", 24)]), {}

    def measure(name, function):
        function(pieces[:1])
        data[name] = []
        for _ in range(options.rounds):
            begin = time.process_time()
            function(pieces)
            data[name].append(len(text) / 1e6 / (time.process_time() - begin))
        table.row(name, spread(data[name], 1))

    BPETokenizer.warm_up()
    counts = BPETokenizer.count(text)
    find_merges({"ab": 2}, 257, LONGEST_TOKEN)  # compiled
    bpe = BPETokenizer(BPETokenizer.build(counts, SIZE)._model)
    library = bpe._model
    measure("bpe: count", lambda parts: [Pretokens(BPETokenizer._splitter()).count(part.decode()) for part in parts])
    measure("bpe: vocabulary out of counts", lambda parts: find_merges(counts, SIZE, LONGEST_TOKEN))
    measure("bpe: encode, table empty at first", lambda parts: [*map(BPETokenizer(library).encode, parts)])
    measure("bpe: encode", lambda parts: [*map(bpe.encode, parts)])
    lines = lambda part: part.decode().splitlines(keepends=True)
    blocks = lambda part: [part[k : k + 16384].decode(errors="ignore") for k in range(0, len(part), 16384)]
    measure("tokenizers: encode_batch of lines", lambda parts: [library.encode_batch(lines(part)) for part in parts])
    measure("tokenizers: encode_batch_fast of 16 kB", lambda parts: [library.encode_batch_fast(blocks(part)) for part in parts])
    if installed("tiktoken"):
        import tiktoken

        ranks = {bpe.decode([token]): token for token in range(SIZE)}
        peer = tiktoken.Encoding("peer", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens={})
        measure("tiktoken: encode_ordinary", lambda parts: [peer.encode_ordinary(part.decode()) for part in parts])
    for kind in ("byte", "char", "word"):
        other = KINDS[kind].build(KINDS[kind].count(text), 0)
        measure(f"{kind}: encode", lambda parts, other=other: [*map(other.encode, parts)])
    return table, data, partial(bars, "MB/s", {name: {"MB/s": middle(values)} for name, values in data.items()})
