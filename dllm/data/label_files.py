"""Files of texts with labels: of each word a tag, or of each text a class.

tags      CoNLL-U, or columns between tabs or white space: a word a line, an empty line behind each sentence
classes   a line `label TAB text` each; or files of one class, a text a line

A record is a sentence or a text. The words of a sentence are joined by single spaces, whatever stood between them: so `predict`
gets them, and so a language model has read them in text that is cut into words, such as WikiText.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from ..errors import UserError
from ..kernels.types import Array
from .checked_tokens import problem_of_label
from .lines import Lines
from .text import Path, TextFile

CONLLU_COLUMNS, CONLLU_WORD, CONLLU_TAG = 10, 2, 4  # universaldependencies.org/format.html: FORM, UPOS
BREAK = b"-DOCSTART-"  # of CoNLL-2003: a line between documents, which is no sentence
_NOT_A_WORD = re.compile(rb"\d+[-.]\d+")  # several words that are written as one; a word that is not written
_NUMBER = re.compile(rb"\d+")


class Record(NamedTuple):
    """Units of text, one behind the other, with labels: a word each, or the whole text; None: it has none."""

    units: list[bytes]
    labels: list[str | None]
    lines: list[int]  # of each unit, from 0


@dataclass(frozen=True)
class LabelledFile:
    """A file as it is named on the command line. label : of all of its texts; "": each has its own"""

    file: Path | TextFile
    label: str = ""


class RecordFile:
    """The records of a file by number. `sizes` (n,) int64: bytes of each. Raises UserError."""

    def __init__(self, file: LabelledFile) -> None:
        self.lines, self.label = Lines(file.file), file.label
        if self.lines.utf16:
            raise UserError(self.lines.not_utf8(0))
        self.sizes: Array = np.empty(0, np.int64)

    def __len__(self) -> int:
        return len(self.sizes)

    @property
    def name(self) -> str:
        """What the user calls the file."""
        return self.lines.name

    def __getitem__(self, number: int) -> Record:
        """Raises UserError, which names the line."""
        raise NotImplementedError

    def __iter__(self) -> Iterator[Record]:
        return (self[number] for number in range(len(self)))

    def wrong(self, line: int, what: str) -> UserError:
        """The error of a line."""
        return UserError(f"{self.lines.place(line)} {what}")

    def unreadable(self, line: int, why: str) -> UserError:
        """The error of a recording that a line names: without its name, which may be private text in a wrong column."""
        return self.wrong(line, f"names a recording that cannot be read: {why}")

    def _label(self, data: bytes, line: int) -> str:
        try:
            label = data.strip().decode()
        except UnicodeDecodeError:
            raise UserError(f"the label of {self.lines.not_utf8(line)}") from None
        if problem := problem_of_label(label):
            raise self.wrong(line, f"has a label that {problem}")
        return label


class ClassFile(RecordFile):
    """A text a line, with its label before a tab; or all with one label, where empty lines are none."""

    def __init__(self, file: LabelledFile) -> None:
        super().__init__(file)
        self._numbers = [line for line in range(len(self.lines)) if not self.label or self.lines[line].strip()]
        self.sizes = np.array([len(self.lines[line]) for line in self._numbers], np.int64)

    def __getitem__(self, number: int) -> Record:
        number = self._numbers[number]
        line = self.lines[number]
        if self.label:
            text, label = line, self.label
        else:
            first, *others = line.split(b"\t")
            if not line.strip():
                raise self.wrong(number, "is empty: it should be a label, a tab and a text")
            if len(others) != 1:
                many = f"has {len(others)} tabs" if others else "has no tab"
                raise self.wrong(number, f"{many}: it should be a label, a tab and a text")
            text, label = others[0], self._label(first, number)
        if not text.strip():
            raise self.wrong(number, "has no text")
        return Record([text.strip()], [label], [number])


class TagFile(RecordFile):
    """Sentences. column : where tags stand, from 1; 0: UPOS of CoNLL-U, else the last."""

    def __init__(self, file: LabelledFile, column: int = 0) -> None:
        super().__init__(file)
        spans, sizes, first, size = list[tuple[int, int]](), list[int](), -1, 0
        self._form = self._find_form()  # CoNLL-U?, columns
        for number in range(len(self.lines) + 1):
            line = self.lines[number] if number < len(self.lines) else b""
            line = line if line.strip() else b""
            word = not self._is_comment(line) if line.startswith(b"#") else bool(line) and not line.startswith(BREAK)
            if word:
                first, size = number if first < 0 else first, size + len(line)
            elif not line and first >= 0:
                spans.append((first, number))
                sizes.append(size)
                first, size = -1, 0
        self._spans, self.sizes = spans, np.array(sizes, np.int64)
        conllu, columns = self._form or (False, 2)
        self.word, self.tag = (CONLLU_WORD, CONLLU_TAG) if conllu else (1, columns)
        self.tag = column or self.tag
        if spans and (columns < 2 or self.tag > columns):
            many = f"{columns} columns" if columns > 1 else "one column"
            raise self.wrong(spans[0][0], f"has {many}" + (f": there is no --tag-column {column}" if columns > 1 else
                             ", where a word and its tag are two, with a tab or a space between"))  # fmt: skip

    def _find_form(self) -> tuple[bool, int] | None:
        """That of the first line that is a word whatever the form: one with # may be a comment. None: there is no such line."""
        for line in map(self.lines.__getitem__, range(len(self.lines))):
            if line.strip() and not line.startswith((BREAK, b"#")):
                return self._form_of(line)
        return None

    @staticmethod
    def _form_of(line: bytes) -> tuple[bool, int]:
        cells = _cells(line)
        return len(cells) == CONLLU_COLUMNS and b"\t" in line and bool(_NUMBER.match(cells[0])), len(cells)

    def _is_comment(self, line: bytes) -> bool:
        """Whether a line that begins with # is one: in columns it may be a word."""
        conllu, columns = self._form or (False, 0)
        return conllu or len(_cells(line)) != columns

    def __getitem__(self, number: int) -> Record:
        record, (conllu, columns) = Record([], [], []), self._form or (False, 0)
        for place in range(*self._spans[number]):
            line = self.lines[place]
            if line.startswith(BREAK) or (line.startswith(b"#") and self._is_comment(line)):
                continue
            cells = _cells(line)
            if len(cells) != columns:
                many = f"{len(cells)} columns" if len(cells) > 1 else "one column"
                raise self.wrong(place, f"has {many}, the lines before have {columns}")
            if conllu and _NOT_A_WORD.fullmatch(cells[0]):
                continue
            if conllu and not _NUMBER.fullmatch(cells[0]):
                raise self.wrong(place, "does not begin with the number of a word, as CoNLL-U does")
            word, tag = cells[self.word - 1].strip(), cells[self.tag - 1]
            if not word:
                raise self.wrong(place, "has no word")
            record.units.append(b" " + word if record.units else word)
            record.labels.append(None if conllu and tag.strip() == b"_" else self._label(tag, place))
            record.lines.append(place)
        if not record.units:
            raise self.wrong(self._spans[number][0], "begins a sentence of no words")
        return record


def _cells(line: bytes) -> list[bytes]:
    return line.split(b"\t") if b"\t" in line else line.split()
