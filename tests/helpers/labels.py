"""Corpora of texts with labels, made by one process."""

import numpy as np
from mpi4py import MPI

from dllm.data.corpus import Corpus
from dllm.data.label_files import LabelledFile
from dllm.data.preparation import prepare_corpus
from dllm.data.vocabulary import Vocabulary


def make_corpus(out, drawing, splits, kind="char", size=0, comm=MPI.COMM_SELF):
    """split -> files, or (file, label); the Corpus that they make."""
    names = {split: [LabelledFile(*one) if isinstance(one, tuple) else LabelledFile(one) for one in files] for split, files in
             splits.items()}  # fmt: skip
    prepare_corpus(comm, names, Vocabulary(kind, size, rate=8000 * (kind == "mel")), out, drawing=drawing)
    return Corpus(out)


def records(corpus, split="train"):
    """All records of a split in order: (tokens, labels), of classes one label; labels by name, None for none."""
    found, names = [], [*corpus.labels, None]
    for part in corpus.split(split)["shards"]:
        places, classes = corpus.read_records(split, part)
        for number, (begin, end) in enumerate(places.T.tolist()):
            tokens = corpus.read(split, begin, end)
            labels = corpus.read_tags(split, begin, end) if corpus.content == "tags" else classes[number : number + 1]
            found.append((tokens.tolist(), [names[label] for label in labels]))
    return found


def sentences(rng, count, words=6):
    """[(words, tags)]: tags are those of the words' first letters."""
    found = []
    for _ in range(count):
        lengths = rng.integers(1, 5, rng.integers(1, words + 1))
        texts = ["".join(rng.choice([*"abcde"], length)) for length in lengths]
        found.append((texts, [f"T{text[0]}" for text in texts]))
    return found


def conllu(examples):
    """A file of CoNLL-U, with the lines that are no words."""
    text = "# newdoc\n"
    for number, (words, tags) in enumerate(examples):
        text += f"# sent_id = {number}\n1-2\tab\t_\t_\t_\t_\t_\t_\t_\tSpaceAfter=No\n"
        for place, (word, tag) in enumerate(zip(words, tags, strict=True), 1):
            text += f"{place}\t{word}\t_\t{tag}\t_\t_\t_\t_\t_\tSpaceAfter=No\n"
        text += "8.1\tgone\t_\tX\t_\t_\t_\t_\t_\t_\n\n"
    return text


def as_counted(batch):
    """Of each lane of a batch what counts: inputs, targets that are there."""
    lanes = range(batch.targets.shape[1])
    lengths = np.full(len(lanes), len(batch.inputs)) if batch.lengths is None else batch.lengths
    return [(batch.inputs[: lengths[lane], lane].tolist(), batch.targets[:, lane][batch.targets[:, lane] != -1].tolist())
            for lane in lanes]  # fmt: skip
