"""Pairs of texts: line i of one file is the source of line i of another, its target. Read, shuffled, made into tokens.

A split of pairs is one stream of tokens, `<end> source <sep> target <end> source <sep> target <end> ...`: every pair begins
behind an <end>, which tells the model to forget, and ends with one, which it has to predict.
"""

from __future__ import annotations

import codecs
import collections
import itertools
import mmap
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import numpy as np

from ..errors import UserError, reason
from ..files import storage
from ..kernels.types import Array
from . import pair_order, text
from .pair_order import drawn
from .text import Encoded, Path, TextFile
from .tokenizers import Tokenizer, UnknownUnitError

BLOCK = 2048  # pairs that are encoded at a time
T = TypeVar("T")


class Lines:
    """The lines of a file by number, without their ends and a byte-order mark; only where they begin is in memory."""

    def __init__(self, path: Path | TextFile) -> None:
        file_of = text.as_file(path)
        self.name, places = file_of.name, [np.zeros(1, np.int64)]
        self._bytes: mmap.mmap | bytes
        try:
            storage.check_regular(file_of.path)
            with open(file_of.path, "rb") as file:
                size, at = os.fstat(file.fileno()).st_size, 0
                while block := file.read(text.PIECE):
                    places.append(np.flatnonzero(np.frombuffer(block, np.uint8) == ord("\n")) + at + 1)
                    at += len(block)
                self._bytes = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if size else b""
        except (OSError, ValueError) as error:
            raise UserError(f"cannot read {self.name}: {reason(error)}") from None
        self._starts = np.concatenate(places)
        if self._starts[-1] != size:
            self._starts = np.append(self._starts, size)
        if self._bytes[:3] == codecs.BOM_UTF8 and len(self._starts) > 1:
            self._starts[0] = 3

    def __len__(self) -> int:
        return len(self._starts) - 1

    def __getitem__(self, number: int) -> bytes:
        """The bytes of line `number`, counted from 0; CR LF ends a line too."""
        line = self._bytes[self._starts[number] : self._starts[number + 1]]
        return line.removesuffix(b"\n").removesuffix(b"\r")

    def place(self, number: int) -> str:
        """Of a line, for messages."""
        return f"{self.name} line {number + 1}"

    def not_utf8(self, number: int) -> str:
        """What is wrong with a line that is not UTF-8, for messages."""
        if self._bytes[:2] in text.UTF16:
            return f"{self.name} begins with the byte-order mark of UTF-16, and is not UTF-8"
        return f"{self.place(number)} is not UTF-8"


class PairFiles:
    """The pairs of a source file and a target file; len() counts them, [i] is (source, target), bytes. Raises UserError."""

    def __init__(self, source: Path | TextFile, target: Path | TextFile) -> None:
        self.sides = Lines(source), Lines(target)
        self.empty: list[int] = []  # lines of which a side is empty, as far as somebody has looked
        first, second = self.sides
        if len(first) != len(second):
            raise UserError(
                f"{first.name} has {len(first):,} lines, {second.name} has {len(second):,}: line i of one belongs to line i of "
                "the other"
            )

    def __len__(self) -> int:
        return len(self.sides[0])

    def __getitem__(self, number: int) -> tuple[bytes, bytes]:
        source, target = self.sides
        return source[number], target[number]

    def check(self, number: int) -> None:
        """Raise UserError where a side of a pair is empty."""
        for side in self.sides:
            if not side[number].strip():
                raise UserError(f"{side.name} is empty at line {number + 1}: take the line out of both files")

    def apply(self, function: Callable[[bytes], T], number: int) -> list[T]:
        """[function(source), function(target)]; a line that is not UTF-8 is a UserError with its place."""
        values = []
        for side in self.sides:
            try:
                values.append(function(side[number]))
            except UnicodeDecodeError:
                raise UserError(f"{side.not_utf8(number)}; convert it, or use --tokenizer byte") from None
            except UnknownUnitError as error:
                raise error.within(side.place(number)) from None
        return values


@dataclass(frozen=True)
class PairPiece:
    """Pairs that are encoded together: in a plan of pairs what a TextPiece is in one of text."""

    files: list[PairFiles]
    numbers: Array  # (n,2): which file, which line
    size: int  # bytes
    first: bool  # the split begins here
    longest: int  # pairs of more tokens are left out; 0: none

    def count(self, tokenizer: type[Tokenizer]) -> Counter[str]:
        """Counter of the units of both sides. Raises UserError."""
        counts: Counter[str] = collections.Counter()
        for file, line in self.numbers:
            for units in self.files[file].apply(lambda side: tokenizer.count(side, False), line):
                counts.update(units)
        return counts

    def encode(self, tokenizer: Tokenizer) -> Encoded:
        """Its part of the stream. Raises UserError."""
        sep, end = np.array([tokenizer.sep]), np.array([tokenizer.end])
        parts, left_out = [end] if self.first else [], list[int]()
        for place, (file, line) in enumerate(self.numbers):
            source, target = self.files[file].apply(lambda side: tokenizer.encode(side, False), line)
            if 0 < self.longest < len(source) + len(target) + 2:
                left_out.append(place)
            else:
                parts += [source, sep, target, end]
        return Encoded(np.concatenate(parts or [np.empty(0, np.int64)]), self.size, tuple(left_out))


def examples_of_pairs(pieces: Iterable[PairPiece], tokenizer: type[Tokenizer]) -> Iterator[set[str]]:
    """The distinct units of each pair, of both sides. Raises UserError."""
    for piece in pieces:
        for file, line in piece.numbers:
            units = piece.files[file].apply(lambda side: tokenizer.count(side, False), line)
            yield set().union(*units)


class Pairing(NamedTuple):
    """What to do with pairs."""

    seed: int  # draws their order
    longest: int = 0  # pairs of more tokens are left out; 0: none
    held_out: Mapping[str, float] = {}  # split -> its share of the train pairs

    def part(self, split: str, pairs: int) -> tuple[int, int]:
        """From where to where a split takes so many pairs of its files in drawn order; others may be of the same files."""
        stop = 1.0
        for name, share in self.held_out.items():
            if name == split:
                return round((stop - share) * pairs), round(stop * pairs)
            stop -= share
        return 0, round(stop * pairs) if split == "train" else pairs


def order_of_split(
    shards: Sequence[Sequence[PairPiece]], left_out: Sequence[Sequence[int]], pairing: Pairing, split: str
) -> dict[str, Any]:
    """What the manifest says of the order of a split's pairs. left_out : of each piece, in order"""
    pieces = [piece for part in shards for piece in part]
    files, lines, empty = pieces[0].files, 0, list[int]()
    for pairs in files:
        empty += [lines + line for line in pairs.empty]
        lines += len(pairs)
    begins = itertools.accumulate((len(piece.numbers) for piece in pieces), initial=0)
    long = [begin + place for begin, places in zip(begins, left_out, strict=False) for place in places]
    return pair_order.described(pairing.seed, lines, empty, pairing.part(split, lines - len(empty)), long)


def plan_pairs(
    names: Sequence[tuple[Path | TextFile, Path | TextFile]],
    pairing: Pairing,
    say: Callable[[str], None] = lambda message: None,
    split: str = "train",
) -> list[list[PairPiece]]:
    """Lists of PairPieces, one list a shard, of all pairs of (source, target) files, in drawn order. Raises UserError.

    Every rank plans the same. Pairs of which a side is empty are left out, and say() tells of them; those of more than
    `pairing.longest` tokens are left out when they are encoded.
    """
    files = [PairFiles(*both) for both in names]
    places, lengths_of = [], []
    for number, pairs in enumerate(files):
        lengths = np.array([[len(side.strip()) for side in pairs[line]] for line in range(len(pairs))]).reshape(-1, 2)
        whole = np.flatnonzero(lengths.all(axis=1))
        pairs.empty = np.flatnonzero(~lengths.all(axis=1)).tolist()
        if (left_out := len(pairs) - len(whole)) and split not in pairing.held_out:
            line = pairs.empty[0]
            place = pairs.sides[int(lengths[line, 0] > 0)].place(line)
            say(f"{left_out:,} of {len(pairs):,} pairs are left out, since a side is empty, the first at {place}")
        places.append(np.stack([np.full_like(whole, number), whole], axis=1))
        lengths_of.append(lengths[whole].sum(axis=1))
    numbers, sizes = np.concatenate(places), np.concatenate(lengths_of)
    if not len(numbers):
        raise UserError(f"there are no pairs in {', '.join(side.name for side in files[0].sides)}")
    start, stop = pairing.part(split, len(numbers))
    if start == stop:
        raise UserError(f"the {split} share of {len(numbers):,} pairs is none: it takes more pairs, or another fraction")
    order = drawn(pairing.seed, len(numbers))[start:stop]
    numbers, sizes = numbers[order], sizes[order]
    shards = []
    for shard in np.array_split(np.arange(len(order)), -(-int(sizes.sum()) // text.SHARD)):
        starts = range(0, len(shard), BLOCK)
        parts = [shard[start : start + BLOCK] for start in starts]
        shards.append(
            [PairPiece(files, numbers[part], int(sizes[part].sum()), part[0] == 0, pairing.longest) for part in parts]
        )
    return shards


def figures(tokens: Array, tokenizer: Tokenizer) -> tuple[int, int]:
    """(how many pairs, tokens of the longest with <sep> and <end>) of a part of the stream that ends behind a pair."""
    ends = np.flatnonzero(tokens == tokenizer.end)
    lengths = np.diff(ends, prepend=-1)  # of the first <end> alone: 1, less than any pair
    return int(np.count_nonzero(tokens == tokenizer.sep)), int(lengths.max(initial=0))
