"""Records of files, such as pairs: the order in which they come, those that a split takes, and their pieces."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, TypeVar

import numpy as np

from ..errors import UserError
from ..kernels.types import Array
from . import text
from .pair_order import drawn
from .tokenizers import Tokenizer

BLOCK = 2048  # records that are encoded at a time
P = TypeVar("P")


@dataclass(frozen=True)
class Drawing:
    """What to do with records."""

    seed: int  # draws their order
    longest: int = 0  # records of more tokens are left out; 0: none
    held_out: Mapping[str, float] = field(default_factory=dict)  # split -> its share of the train records

    content: ClassVar[str] = ""  # of the corpus
    unit: ClassVar[str] = ""  # one of the records
    counted: ClassVar[str] = "records"  # what the manifest calls them

    def plan(self, paths: Sequence[Any], split: str, say: Callable[[str], None]) -> list[list[Any]]:
        """The pieces of each shard of a split, the same on every rank. Raises UserError."""
        raise NotImplementedError

    def examples(self, pieces: Iterable[Any], tokenizer: type[Tokenizer]) -> Iterator[set[str]]:
        """The distinct units of each record. Raises UserError."""
        raise NotImplementedError

    def facts(self, plan: Sequence[Sequence[Any]], left_out: Sequence[Sequence[int]], split: str) -> dict[str, Any]:
        """What the manifest says of a split beside what it says of all records. left_out : of each piece, in order"""
        return {}

    @property
    def wrong_size(self) -> str:
        """What records have that are left out."""
        return f"more than {self.longest} tokens"

    def part(self, split: str, records: int) -> tuple[int, int]:
        """From where to where a split takes so many records of its files in drawn order; others may be of the same files."""
        stop = 1.0
        for name, share in self.held_out.items():
            if name == split:
                return round((stop - share) * records), round(stop * records)
            stop -= share
        return 0, round(stop * records) if split == "train" else records

    def in_pieces(self, split: str, numbers: Array, sizes: Array, piece: Callable[[Array, int, bool], P]) -> list[list[P]]:
        """The pieces of each shard. Raises UserError.

        Parameters
        ----------
        split : str
        numbers, sizes : (n,2) int64, (n,) int64
            Of all records of the split's files, which file and which record of it, and how many bytes it has.
        piece : callable
            piece(numbers, bytes, whether the split begins here).
        """
        start, stop = self.part(split, len(numbers))
        if start == stop:
            raise UserError(
                f"the {split} share of {len(numbers):,} {self.unit}s is none: it takes more {self.unit}s, or another fraction"
            )
        order = drawn(self.seed, len(numbers))[start:stop]
        numbers, sizes, shards = numbers[order], sizes[order], list[list[P]]()
        for shard in np.array_split(np.arange(len(order)), -(-int(sizes.sum()) // text.SHARD)):
            parts = [shard[first : first + BLOCK] for first in range(0, len(shard), BLOCK)]
            shards.append([piece(numbers[part], int(sizes[part].sum()), part[0] == 0) for part in parts])
        return shards
