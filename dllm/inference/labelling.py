"""What models say of a text as it is: tags of its words, or its class."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from ..data.tokenizers import Tokenizer
from ..errors import UserError
from ..kernels.ctc import log_probabilities
from ..kernels.softmax import IGNORE
from ..kernels.types import Array
from ..model.batch import Batch
from ..model.encoder_model import Classifier, EncoderModel
from .answering import Answer, in_batches
from .loaded_model import LoadedModel

if TYPE_CHECKING:
    from mpi4py import MPI

KINDS = "tagger", "classifier"  # of models that say them; a transcript's letters are none


def labels_of(model: LoadedModel, name: str) -> tuple[str, ...]:
    """The names of a model's labels. Raises UserError where it is none that says labels. name : what the user calls it"""
    labels, kind = model.tokenizer.labels, model.config.kind
    if kind not in KINDS or model.config.features:
        raise UserError(f"{name} is a model of kind {kind}: a tagger or a classifier of text says labels")
    if len(labels) != model.config.labels:
        raise UserError(f"{name} has {model.config.labels} labels, and its tokenizer.json names {len(labels)}")
    return labels


def text_of(tokenizer: Tokenizer, line: str) -> Array:
    """Tokens (n,) of a line, as `prepare --classes` has it. Raises UserError."""
    return tokenizer.encode(line.encode().strip(), False)


def words_in(line: str) -> list[str]:
    """The words of a line: what is between white space of ASCII, as in files of tags; other spaces may be part of a word."""
    return [word.decode() for word in line.encode().split()]


def words_of(tokenizer: Tokenizer, line: str) -> list[Array]:
    """Tokens of each word of a line, as `prepare --tags` has them. Raises UserError."""
    words = line.encode().split()
    return [tokenizer.encode(b" " + word if place else word, False) for place, word in enumerate(words)]


def say_labels(comm: MPI.Comm, model: EncoderModel, labels: Sequence[str], texts: Sequence[Sequence[Array]]) -> list[Answer]:
    """Of each text its labels and how probable they are. Collective.

    Parameters
    ----------
    comm : MPI.Comm
    model : Tagger or Classifier
        Its lanes are the texts of a batch. A tagger's window must hold them; of one that is longer a classifier reads the end.
    labels : list of str
    texts : list of lists of (n,) int64
        Tokens of each of its words; of a classifier's text all in one.

    Returns
    -------
    list of (labels, probabilities)
        Of a tagger's text a label and its probability for each word; of a classifier's text one, and those of all labels.
    """
    whole = isinstance(model, Classifier)
    joined = [np.concatenate([np.empty(0, np.int64), *words])[-model.window :] for words in texts]
    nothing = np.zeros((0, model.lanes, 0), model.dtype)

    def work(numbers: Sequence[int]) -> list[Answer]:
        lengths = np.zeros(model.lanes, np.int64)
        lengths[: len(numbers)] = [len(joined[number]) for number in numbers]
        tokens = np.zeros((max(1, int(lengths.max())), model.lanes), np.int64)
        for lane, number in enumerate(numbers):
            tokens[: lengths[lane], lane] = joined[number]
        targets = np.full((1 if whole else len(tokens), model.lanes), IGNORE)
        model.forward(Batch(tokens, targets, lengths), nothing, nothing)
        found = np.exp(log_probabilities(model.logits()))
        answers = list[Answer]()
        for lane, number in enumerate(numbers):
            starts = [0] if whole else np.cumsum([0, *map(len, texts[number])])[:-1]
            rows = found[starts, lane]
            best = rows.argmax(axis=1)
            values = rows[0] if whole else rows[np.arange(len(best)), best]
            answers.append(([labels[label] for label in best], values.tolist()))
        return answers

    some = [number for number, text in enumerate(joined) if len(text)]
    said = in_batches(
        comm, [len(joined[number]) for number in some], model.lanes, lambda places: work([some[k] for k in places])
    )
    found: list[Answer] = [([], []) for _ in texts]
    for number, answer in zip(some, said, strict=True):
        found[number] = answer
    return found
