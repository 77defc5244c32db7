"""Pairs of texts: line i of one file is the source of line i of another, its target. Read, shuffled, made into tokens.

A split of pairs is one stream of tokens, `<end> source <sep> target <end> source <sep> target <end> ...`: every pair begins
behind an <end>, which tells the model to forget, and ends with one, which it has to predict.
"""

from __future__ import annotations

import collections
import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

import numpy as np

from ..errors import UserError
from ..kernels.types import Array
from . import pair_order
from .drawing import Drawing
from .lines import Lines
from .text import Encoded, Path, TextFile
from .tokenizers import Tokenizer, UnknownUnitError

T = TypeVar("T")


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
        tokens = np.concatenate(parts or [np.empty(0, np.int64)])
        return Encoded(tokens, self.size, tuple(left_out), figures(tokens, tokenizer))


def examples_of_pairs(pieces: Iterable[PairPiece], tokenizer: type[Tokenizer]) -> Iterator[set[str]]:
    """The distinct units of each pair, of both sides. Raises UserError."""
    for piece in pieces:
        for file, line in piece.numbers:
            units = piece.files[file].apply(lambda side: tokenizer.count(side, False), line)
            yield set().union(*units)


@dataclass(frozen=True)
class Pairing(Drawing):
    """What to do with pairs."""

    content: ClassVar[str] = "pairs"
    unit: ClassVar[str] = "pair"
    counted: ClassVar[str] = "pairs"

    def plan(self, paths: Sequence[Any], split: str, say: Callable[[str], None]) -> list[list[PairPiece]]:
        return plan_pairs(paths, self, say, split)

    def examples(self, pieces: Iterable[PairPiece], tokenizer: type[Tokenizer]) -> Iterator[set[str]]:
        return examples_of_pairs(pieces, tokenizer)

    def facts(self, plan: Sequence[Sequence[PairPiece]], left_out: Sequence[Sequence[int]], split: str) -> dict[str, Any]:
        return order_of_split(plan, left_out, self, split)


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
    return pairing.in_pieces(
        split, numbers, sizes, lambda part, size, first: PairPiece(files, part, size, first, pairing.longest)
    )


def figures(tokens: Array, tokenizer: Tokenizer) -> tuple[int, int]:
    """(how many pairs, tokens of the longest with <sep> and <end>) of a part of the stream that ends behind a pair."""
    ends = np.flatnonzero(tokens == tokenizer.end)
    lengths = np.diff(ends, prepend=-1)  # of the first <end> alone: 1, less than any pair
    return int(np.count_nonzero(tokens == tokenizer.sep)), int(lengths.max(initial=0))
