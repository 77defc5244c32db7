"""Models that say something of a text as it is: tags of its words, or its class. What they say, and how good it is.

Spans are those of conlleval (Tjong Kim Sang and Buchholz 2000, "Introduction to the CoNLL-2000 shared task: chunking"): words
in a row whose tags name one type, in IOB1, IOB2 or IOBES. A span is right where its words and its type are. Precision is the
part of what is said that is right, recall the part of what is true that is said, and F1 their harmonic mean. Macro F1 is the
mean of the F1 of all labels that are true or said somewhere.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ..comm.messages import total
from ..comm.runtime import together
from ..data.tokenizers import Tokenizer
from ..errors import UserError
from ..kernels.ctc import log_probabilities
from ..kernels.softmax import IGNORE
from ..kernels.types import Array
from ..model.batch import Batch
from ..model.encoder_model import Classifier, EncoderModel
from .answering import Answer, in_batches
from .evaluation import Evaluation
from .loaded_model import LoadedModel

if TYPE_CHECKING:
    from mpi4py import MPI

KINDS = "tagger", "classifier"  # of models that say them; a transcript's letters are none
OUTSIDE = "O"
OF_A_SPAN = re.compile("([BIES])-(.+)")
MOST_SHOWN = 100  # labels whose confusion is counted


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
    return tokenizer.encode(line.strip().encode(), False)


def words_of(tokenizer: Tokenizer, line: str) -> list[Array]:
    """Tokens of each word of a line, as `prepare --tags` has them. Raises UserError."""
    words = [word.encode() for word in line.split()]
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


def measure_labels(evaluation: Evaluation, theta: Array, labels: Sequence[str]) -> dict[str, Any]:
    """How good the labels are that a model of parameters theta (P,) gives to a split. Collective. Shares are in per cent.

    {"labels": how many were asked for, "accuracy", "macro_f1"}, of tags of spans "precision", "recall", "f1" and
    "types": {type: the three}, and of few labels "confusion", rows: true, columns: said. Sums alone leave a rank.
    """
    model, count = evaluation.model, len(labels)
    if not isinstance(model, EncoderModel):
        raise UserError.of_all(f"a model of kind {model.config.kind} says no labels")
    shown, spans = count <= MOST_SHOWN, Spans(labels)
    seen = np.zeros((3, count), np.int64)  # right, said, true
    confusion = np.zeros((count, count) if shown else (0, 0), np.int64)
    nothing = np.zeros((0, model.lanes, 0), model.dtype)
    model.bind(theta)
    with together(evaluation.comm):
        for place in evaluation.schedule.places if model.lanes else ():
            batch = evaluation.lanes.window(place, evaluation.schedule.width(place))
            model.forward(batch, nothing, nothing)
            best = model.logits().argmax(axis=-1)
            for lane in range(model.lanes):
                there = batch.targets[:, lane] != IGNORE
                true, said = batch.targets[there, lane], best[there, lane]
                for row, some in enumerate((true[true == said], said, true)):
                    seen[row] += np.bincount(some, minlength=count)
                if shown:
                    np.add.at(confusion, (true, said), 1)
                spans.count(true, said)
    right, said, true = total(evaluation.comm, seen.reshape(-1)).reshape(3, count)
    used = (said + true) > 0
    result: dict[str, Any] = {
        "labels": int(true.sum()),
        "accuracy": 100 * float(right.sum() / true.sum()),
        "macro_f1": 100 * float((2 * right[used] / (said + true)[used]).mean()),
    }
    if not isinstance(model, Classifier):
        result |= spans.measured(total(evaluation.comm, spans.seen.reshape(-1)).reshape(spans.seen.shape))
    if shown:
        result["confusion"] = total(evaluation.comm, confusion.reshape(-1)).reshape(confusion.shape).tolist()
    return result


class Spans:
    """Counts of spans, of tags that make some.

    Attributes
    ----------
    types : list of str
        None where tags make no spans.
    seen : (3,types) int64
        Right, said, true.
    """

    def __init__(self, labels: Sequence[str]) -> None:
        parts = [OF_A_SPAN.fullmatch(label) for label in labels]
        spanning = any(parts) and all(part or label == OUTSIDE for part, label in zip(parts, labels, strict=True))
        self.types = sorted({part[2] for part in parts if part}) if spanning else []
        self.seen = np.zeros((3, len(self.types)), np.int64)
        self._numbers, self._labels = {name: number for number, name in enumerate(self.types)}, labels

    def count(self, true: Array, said: Array) -> None:
        """Of a sentence, labels (n,) each."""
        if not self.types:
            return
        there, found = (Counter(spans_of([self._labels[label] for label in some])) for some in (true, said))
        for row, some in enumerate((there & found, found, there)):
            for _, _, name in some:
                self.seen[row, self._numbers[name]] += 1

    def measured(self, seen: Array) -> dict[str, Any]:
        """Precision, recall and F1 of counts like `seen`, in per cent, of all spans and by type; {}: there are none."""
        if not self.types:
            return {}
        return _scores(*seen.sum(axis=1)) | {
            "types": {name: _scores(*seen[:, number]) for name, number in self._numbers.items()}
        }


def _scores(right: int, said: int, true: int) -> dict[str, float]:
    precision, recall = right / max(1, said), right / max(1, true)
    f1 = 2 * right / max(1, said + true)
    return {"precision": 100 * float(precision), "recall": 100 * float(recall), "f1": 100 * float(f1)}


def spans_of(tags: Sequence[str]) -> Iterator[tuple[int, int, str]]:
    """The spans of a sentence: first word, behind the last word, type."""
    first, type_of, ended = 0, "", True  # of the span that has begun; no type: there is none
    for place, tag in enumerate([*tags, OUTSIDE]):
        part = OF_A_SPAN.fullmatch(tag)
        name, mark = (part[2], part[1]) if part else ("", OUTSIDE)
        if type_of and (ended or name != type_of or mark in "BS"):
            yield first, place, type_of
            type_of = ""
        if name and not type_of:
            first, type_of = place, name
        ended = mark in "ES"
