r"""A task of summaries that anybody can make: the sentence of a short text that holds a key word.

    python -m benchmarks.summaries FOLDER [--pairs 20000]

writes train, valid and test .src and .tgt to FOLDER. A source is some sentences of made-up names, one of which has a key word;
its target is that sentence. The names of test are in no other split: only a model that copies can say them.

    dllm prepare --pairs FOLDER/train.src FOLDER/train.tgt --test-pairs FOLDER/test.src FOLDER/test.tgt --tokenizer bpe \
      --vocab-size 512 --out CORPUS
    mpirun -n 2 python -m dllm.train --preset seq2seq --data CORPUS --out RUN --set model.copy=true --set train.epochs=3

A small vocabulary has pieces that all names are made of; with 4,096 many a piece of a new name was hardly ever seen.
"""

import argparse
import itertools
import pathlib

import numpy as np

SYLLABLES = list(map("".join, itertools.product("bdfglmnprstvz", "aeiou")))
VERBS = ["saw", "met", "told", "found", "called", "thanked"]
KEYS = ["election", "storm", "strike", "victory"]
PLAIN = ["river", "garden", "window", "market", "station", "letter", "winter", "kitchen", "bridge", "island", "music", "silver"]
HELD = 5  # one name in so many is of test alone


def names(rng, count):
    """Different made-up names."""
    found = {"".join(rng.choice(SYLLABLES, 4)) for _ in range(2 * count)}
    return np.array(sorted(found))[rng.permutation(len(found))[:count]]


def pair(rng, known, sentences=4):
    """(source, target): each sentence is of two names and another word, of which one is a key word."""
    words, chosen = [*map(str, rng.permutation(PLAIN)[:sentences])], int(rng.integers(sentences))
    words[chosen] = str(rng.choice(KEYS))
    texts = [f"{one} {rng.choice(VERBS)} {other} in the {word} ." for word in words for one, other in [rng.choice(known, 2)]]
    return " ".join(texts), texts[chosen]


def write(folder, pairs=20000, seed=1):
    """Write the files of all splits."""
    folder, rng = pathlib.Path(folder), np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    every = names(rng, 5000)
    held = len(every) // HELD
    splits = {"train": (pairs, every[held:]), "valid": (500, every[held:]), "test": (500, every[:held])}
    for split, (count, known) in splits.items():
        drawn = [pair(rng, known) for _ in range(count)]
        for suffix, lines in zip(("src", "tgt"), zip(*drawn, strict=True), strict=True):
            (folder / f"{split}.{suffix}").write_text("".join(line + "\n" for line in lines), encoding="utf-8")


def main():
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.summaries", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", metavar="FOLDER")
    parser.add_argument("--pairs", type=int, default=20000, metavar="N", help="of train (default 20000)")
    options = parser.parse_args()
    write(options.folder, options.pairs)


if __name__ == "__main__":
    main()
