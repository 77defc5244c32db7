"""How good the labels are that a model gives to a split.

Spans are those of conlleval (Tjong Kim Sang and Buchholz 2000, "Introduction to the CoNLL-2000 shared task: chunking"): words
in a row whose tags name one type, in IOB1, IOB2 or IOBES. A span is right where its words and its type are. Precision is the
part of what is said that is right, recall the part of what is true that is said, and F1 their harmonic mean. Macro F1 is the
mean of the F1 of all labels that are true or said somewhere.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from ..kernels.softmax import IGNORE
from ..kernels.types import Array
from ..model.batch import Batch
from ..model.encoder_model import Classifier, EncoderModel

OUTSIDE = "O"
OF_A_SPAN = re.compile("([BIES])-(.+)")
MOST_SHOWN = 100  # labels whose confusion is counted


class LabelCounts:
    """What a model says of the windows of a split.

    Parameters
    ----------
    model : Tagger or Classifier
    labels : list of str
    """

    def __init__(self, model: EncoderModel, labels: Sequence[str]) -> None:
        self._model, count = model, len(labels)
        self._spans = Spans([] if isinstance(model, Classifier) else labels)
        self._seen = np.zeros((3, count), np.int64)  # right, said, true
        shown = count <= MOST_SHOWN
        self._confusion = np.zeros((count, count) if shown else (0, 0), np.int64)

    def see(self, batch: Batch) -> None:
        """Count what the model has just said of a batch."""
        best, count = self._model.logits().argmax(axis=-1), self._seen.shape[1]
        for lane in range(batch.targets.shape[1]):
            there = batch.targets[:, lane] != IGNORE
            true, said = batch.targets[there, lane], best[there, lane]
            for row, some in enumerate((true[true == said], said, true)):
                self._seen[row] += np.bincount(some, minlength=count)
            if self._confusion.size:
                np.add.at(self._confusion, (true, said), 1)
            self._spans.count(true, said)

    @property
    def counts(self) -> Array:
        """What can be added up over ranks: (n,) int64."""
        return np.concatenate([part.reshape(-1) for part in (self._seen, self._spans.seen, self._confusion)])

    def scores(self, counts: Array, whole: bool) -> dict[str, Any]:
        """{"accuracy", "macro_f1"} of counts of all ranks, in per cent; of tags of spans "precision", "recall", "f1", too.

        whole : also "types", {type: the three}, and of few labels "confusion", rows: true, columns: said
        """
        cuts = np.cumsum([self._seen.size, self._spans.seen.size])
        seen, spans, confusion = np.split(counts, cuts)
        right, said, true = seen.reshape(self._seen.shape)
        used = (said + true) > 0
        found: dict[str, Any] = {
            "accuracy": 100 * float(right.sum() / true.sum()),
            "macro_f1": 100 * float((2 * right[used] / (said + true)[used]).mean()),
            **self._spans.measured(spans.reshape(self._spans.seen.shape)),
        }
        if whole:
            return found | ({"confusion": confusion.reshape(self._confusion.shape).tolist()} if len(confusion) else {})
        return {name: value for name, value in found.items() if name != "types"}


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
