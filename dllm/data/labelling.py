"""Texts with labels as tokens: sentences whose words have tags, or texts that have a class. Shuffled, and made into tokens."""

from __future__ import annotations

import collections
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, NoReturn

import numpy as np

from ..comm.runtime import agree
from ..errors import UserError
from ..kernels.softmax import IGNORE
from ..kernels.types import Array
from .drawing import Drawing
from .label_files import ClassFile, LabelledFile, Record, RecordFile, TagFile
from .label_names import same_names, shared_names
from .shards import LABEL_DTYPE
from .text import Encoded
from .tokenizers import Tokenizer, UnknownUnitError

if TYPE_CHECKING:
    from mpi4py import MPI


@dataclass(frozen=True)
class LabelledPiece:
    """Records that are encoded together: in a plan of records what a TextPiece is in one of text."""

    files: list[RecordFile]
    numbers: Array  # (n,2): which file, which record
    size: int  # bytes
    longest: int  # records of more tokens are left out; 0: none
    numbers_of: Mapping[str, int]  # label -> its number, once ranks have agreed on them
    source: str  # of these labels, for messages

    def records(self) -> Iterator[tuple[RecordFile, Record]]:
        """Each with its file. Raises UserError."""
        for file, number in self.numbers:
            yield self.files[file], self.files[file][number]

    def units(self, tokenizer: type[Tokenizer]) -> Iterator[Counter[str]]:
        """Of each record the units. Raises UserError."""
        for file, record in self.records():
            try:
                yield tokenizer.count(b"".join(record.units), False)
            except UnicodeDecodeError:
                _not_utf8(file, record)

    def count(self, tokenizer: type[Tokenizer]) -> Counter[str]:
        """Counter of the units. Raises UserError."""
        counts: Counter[str] = collections.Counter()
        for units in self.units(tokenizer):
            counts.update(units)
        return counts

    def labels(self) -> set[str]:
        """Those that are there. Raises UserError."""
        return {label for _, record in self.records() for label in record.labels if label is not None}

    def encode(self, tokenizer: Tokenizer) -> Encoded:
        """Its tokens, and a label for each, on the first of a word. Raises UserError."""
        tokens, labels, ends, left_out = list[Array](), list[Array](), list[int](), list[int]()
        longest = size = 0
        known: dict[bytes, Array] = {}  # words come again and again
        for place, (file, record) in enumerate(self.records()):
            parts = [_encoded(tokenizer, file, record, number, known) for number in range(len(record.units))]
            length = sum(map(len, parts))
            if 0 < self.longest < length:
                left_out.append(place)
                continue
            longest, size = max(longest, length), size + sum(map(len, record.units)) + 1
            tokens += parts
            numbers = [self._number(file, record, number) for number in range(len(record.units))]
            labels += self._labels(parts, numbers)
            ends.append(length)
        text, names = (np.concatenate([np.empty(0, np.int64), *some]) for some in (tokens, labels))
        figures, stops = (len(ends), longest), np.cumsum(ends, dtype=np.int64)
        return Encoded(text, size, tuple(left_out), figures, stops, names.astype(LABEL_DTYPE))

    @staticmethod
    def _labels(parts: Sequence[Array], numbers: Sequence[int]) -> list[Array]:
        """Those of a record's tokens, or its own. parts : tokens of its units"""
        raise NotImplementedError

    def _number(self, file: RecordFile, record: Record, unit: int) -> int:
        label = record.labels[unit]
        if label is None:
            return IGNORE
        if label not in self.numbers_of:  # which is not told: it may be of a private text
            raise file.wrong(record.lines[unit], f"has a label that is none of the {len(self.numbers_of)} of {self.source}")
        return self.numbers_of[label]


class TaggedPiece(LabelledPiece):
    """Sentences."""

    @staticmethod
    def _labels(parts: Sequence[Array], numbers: Sequence[int]) -> list[Array]:
        labels = []
        for part, number in zip(parts, numbers, strict=True):
            labels.append(np.full(len(part), IGNORE))
            labels[-1][0] = number
        return labels


class ClassifiedPiece(LabelledPiece):
    """Texts."""

    @staticmethod
    def _labels(parts: Sequence[Array], numbers: Sequence[int]) -> list[Array]:
        return [np.array(numbers)]


def _encoded(tokenizer: Tokenizer, file: RecordFile, record: Record, unit: int, known: dict[bytes, Array]) -> Array:
    text = record.units[unit]
    if text in known:
        return known[text]
    try:
        tokens = tokenizer.encode(text, False)
    except UnicodeDecodeError:
        _not_utf8(file, record)
    except UnknownUnitError as error:
        raise error.within(file.lines.place(record.lines[unit])) from None
    if not len(tokens):  # which no vocabulary of words calls one
        raise file.wrong(record.lines[unit], "has nothing but white space")
    if len(text) < 100:
        known[text] = tokens
    return tokens


def _not_utf8(file: RecordFile, record: Record) -> NoReturn:
    """Raise the UserError of a record that is not UTF-8."""
    for line, text in zip(record.lines, record.units, strict=True):
        try:
            text.decode()
        except UnicodeDecodeError:
            raise UserError(f"{file.lines.not_utf8(line)}; convert it, or use --tokenizer byte") from None
    raise UserError(f"{file.lines.not_utf8(record.lines[0])}; convert it, or use --tokenizer byte")


@dataclass(frozen=True)
class Labelling(Drawing):
    """What to do with texts that have labels.

    Attributes
    ----------
    numbers : dict
        label -> its number; filled by `agree`.
    names : tuple of str
        Labels that everybody may know; (): those of the train text.
    """

    piece: ClassVar[type[LabelledPiece]]
    numbers: dict[str, int] = field(default_factory=dict)
    names: tuple[str, ...] = ()

    def open(self, file: LabelledFile) -> RecordFile:
        """The records of a file. Raises UserError."""
        raise NotImplementedError

    def plan(self, paths: Sequence[LabelledFile], split: str, say: Callable[[str], None]) -> list[list[LabelledPiece]]:
        files = [self.open(path) for path in paths]
        places = [np.stack([np.full(len(file), number), np.arange(len(file))], axis=1) for number, file in enumerate(files)]
        numbers, sizes = np.concatenate(places), np.concatenate([file.sizes for file in files])
        if not len(numbers):
            raise UserError(f"there is no {self.unit} in {', '.join(file.name for file in files[:3])}")
        return self.in_pieces(split, numbers, sizes, lambda part, size, first: self.make(files, part, size, split))

    def make(self, files: Sequence[RecordFile], numbers: Array, size: int, split: str) -> LabelledPiece:
        """A piece of a split. numbers, size : as `in_pieces` gives them"""
        return self.piece([*files], numbers, size, self.longest, self.numbers, self.source)

    @property
    def source(self) -> str:
        """Where labels come from, for messages."""
        return "--labels" if self.names else "the train text"

    def examples(self, pieces: Iterable[LabelledPiece], tokenizer: type[Tokenizer]) -> Iterator[set[str]]:
        return ({*units} for piece in pieces for units in piece.units(tokenizer))

    def agree(self, comm: MPI.Comm, pieces: Iterable[LabelledPiece], private: bool = False) -> list[str]:
        """The labels of the corpus, in order. Collective. Raises UserError on all ranks.

        pieces : this rank's part of the train text
        private : which nobody else can read; its labels have stricter limits
        """
        if self.names:
            labels = same_names(comm, self.names)
        else:
            mine = agree(comm, lambda: set[str]().union(*(piece.labels() for piece in pieces)))
            labels = shared_names(comm, mine, private, self.content == "transcripts")
        self.numbers.update({label: number for number, label in enumerate(labels)})
        return labels


@dataclass(frozen=True)
class Tagging(Labelling):
    """Of sentences whose words have tags, in `column` of their files, from 1; 0: where they are as a rule."""

    content: ClassVar[str] = "tags"
    unit: ClassVar[str] = "sentence"
    piece: ClassVar[type[LabelledPiece]] = TaggedPiece
    column: int = 0

    def open(self, file: LabelledFile) -> RecordFile:
        return TagFile(file, self.column)


@dataclass(frozen=True)
class Classing(Labelling):
    """Of texts that have a class."""

    content: ClassVar[str] = "classes"
    unit: ClassVar[str] = "text"
    piece: ClassVar[type[LabelledPiece]] = ClassifiedPiece

    def open(self, file: LabelledFile) -> RecordFile:
        return ClassFile(file)
