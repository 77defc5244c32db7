"""Recordings with labels as frames (kernels/mel.py): of each a class, or what is said in it.

A table has a line `label TAB path` each; a path is seen from the folder of the table. Or files are recordings of one class. For
training each may come several times, varied (audio.py): so a model learns of more voices than there are.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from ..errors import UserError, reason
from ..kernels.softmax import IGNORE
from ..kernels.types import Array
from . import audio, text
from .checked_tokens import problem_of_letter
from .label_files import ClassFile, LabelledFile, Record, RecordFile
from .labelling import LabelledPiece, Labelling
from .shards import FRAME_DTYPE
from .sound_tokenizers import MelTokenizer
from .text import Encoded
from .tokenizers import Tokenizer

DEVIATIONS = 60.0  # a band's largest number; no recording has one that comes near


class Table(ClassFile):
    """Recordings that a table names."""

    def __init__(self, file: LabelledFile) -> None:
        super().__init__(file)
        folder = os.path.dirname(self.lines.name)
        self._paths = [os.path.join(folder, os.fsdecode(self._cell(line))) for line in range(len(self.lines))]
        self.sizes = np.array([self._size(line, path) for line, path in enumerate(self._paths)], np.int64)

    def _cell(self, line: int) -> bytes:
        return super().__getitem__(line).units[0].strip()

    def _size(self, line: int, path: str) -> int:
        try:
            return os.path.getsize(path)
        except (OSError, ValueError) as error:
            raise self.unreadable(line, reason(error)) from None

    def __getitem__(self, number: int) -> Record:
        return Record([os.fsencode(self._paths[number])], super().__getitem__(number).labels, [number])


class Transcripts(Table):
    """Recordings that a table names, with what is said in them: letters, and single spaces between words."""

    def _label(self, data: bytes, line: int) -> str:
        try:
            said = " ".join(data.decode().split())
        except UnicodeDecodeError:
            raise UserError(self.lines.not_utf8(line)) from None
        if any(map(problem_of_letter, said)):
            raise self.wrong(line, "has a transcript with characters that cannot be shown")
        return said


class OneRecording(RecordFile):
    """A file that is a recording of a class."""

    def __init__(self, file: LabelledFile) -> None:
        self._file, self.label = text.as_file(file.file), file.label
        try:
            self.sizes = np.array([os.path.getsize(self._file.path)], np.int64)
        except (OSError, ValueError) as error:
            raise self.unreadable(0, reason(error)) from None

    @property
    def name(self) -> str:
        return self._file.name

    def __getitem__(self, number: int) -> Record:
        return Record([os.fsencode(self._file.path)], [self.label], [0])

    def wrong(self, line: int, what: str) -> UserError:
        return UserError(f"{self.name} {what}")

    def unreadable(self, line: int, why: str) -> UserError:
        return UserError(f"cannot read {self.name}: {why}")


@dataclass(frozen=True)
class RecordedPiece(LabelledPiece):
    """Recordings. copies : of each, varied by `seed` and its name"""

    copies: int = 0
    seed: int = 1

    def encode(self, tokenizer: Tokenizer) -> Encoded:
        assert isinstance(tokenizer, MelTokenizer)
        frames, labels, left_out = [np.empty((0, tokenizer.bands), FRAME_DTYPE)], list[Array](), list[int]()
        for copy in range(1 + self.copies):
            for place, (file, record) in enumerate(self.records()):
                if place in left_out:
                    continue
                one = self._frames(tokenizer, file, record, copy)
                numbers = self._numbers(file, record)
                if 0 < self.longest < len(one) or len(one) < _least(numbers):
                    left_out += [place] * (copy == 0)
                    continue
                frames.append(one)
                labels.append(self._spread(numbers, len(one)))
        ends = np.cumsum([len(one) for one in frames[1:]], dtype=np.int64)
        figures = len(ends), max(map(len, frames))
        joined = np.concatenate([np.empty(0, np.int32), *labels]).astype(np.int32)
        return Encoded(np.concatenate(frames), self.size, tuple(left_out), figures, ends, joined)

    def _frames(self, tokenizer: MelTokenizer, file: RecordFile, record: Record, copy: int) -> Array:
        path = os.fsdecode(record.units[0])
        try:
            sound = audio.at_rate(audio.load(path), tokenizer.rate)
        except UserError as error:
            raise file.unreadable(record.lines[0], str(error)) from None
        if copy:
            sound = audio.varied(sound, [self.seed, copy, zlib.crc32(os.fsencode(os.path.basename(path)))])
        return np.clip(tokenizer.frames(sound), -DEVIATIONS, DEVIATIONS).astype(FRAME_DTYPE)

    def _numbers(self, file: RecordFile, record: Record) -> Array:
        """Of the labels of a recording."""
        return np.array([self._number(file, record, 0)])

    def _spread(self, numbers: Array, frames: int) -> Array:
        """What stands in the corpus of a recording of so many frames."""
        return numbers


class TranscribedPiece(RecordedPiece):
    """Recordings with what is said in them."""

    def labels(self) -> set[str]:
        return {letter for _, record in self.records() for letter in record.labels[0] or ""}

    def _numbers(self, file: RecordFile, record: Record) -> Array:
        said = record.labels[0] or ""
        if any(letter not in self.numbers_of for letter in said):
            raise file.wrong(record.lines[0], f"has a letter that is none of the {len(self.numbers_of)} of {self.source}")
        return np.array([self.numbers_of[letter] for letter in said], np.int64)

    def _spread(self, numbers: Array, frames: int) -> Array:
        return np.pad(numbers, (0, frames - len(numbers)), constant_values=IGNORE)


def _least(numbers: Array) -> int:
    """Frames that labels take, one each and one more between two that are equal."""
    return len(numbers) + int(np.count_nonzero(numbers[1:] == numbers[:-1]))


@dataclass(frozen=True)
class Recordings(Labelling):
    """What to do with recordings that have a class. copies : of each for training, varied"""

    content: ClassVar[str] = "classes"
    unit: ClassVar[str] = "recording"
    piece: ClassVar[type[RecordedPiece]] = RecordedPiece
    copies: int = 0

    def open(self, file: LabelledFile) -> RecordFile:
        return OneRecording(file) if file.label else Table(file)

    def make(self, files: Sequence[RecordFile], numbers: Array, size: int, split: str) -> LabelledPiece:
        copies = self.copies if split == "train" else 0
        return self.piece([*files], numbers, size, self.longest, self.numbers, self.source, copies, self.seed)


@dataclass(frozen=True)
class Transcribing(Recordings):
    """What to do with recordings and what is said in them."""

    content: ClassVar[str] = "transcripts"
    piece: ClassVar[type[RecordedPiece]] = TranscribedPiece

    def open(self, file: LabelledFile) -> RecordFile:
        return Transcripts(file)

    @property
    def wrong_size(self) -> str:
        return "fewer frames than letters" + (f", or more than {self.longest} frames" if self.longest else "")
