"""Where the vocabulary of a corpus comes from, and what ranks tell each other for it.

a fixed one        the 256 bytes                                        nothing travels
one that is there  tokenizer.json of a corpus, a run or a model         nothing travels but its hash
a private count    noise and a threshold on every rank                  what passed goes to rank 0
an exact count     as it is                                             all units and their counts go to rank 0
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import msgspec
import numpy as np

from ..comm import messages
from ..comm.runtime import agree, check_same, together
from ..errors import UserError
from .private_counts import PrivateCounting
from .tokenizer_files import load_tokenizer, tokenizer_hash
from .tokenizers import END_OF_LINE, KINDS, Tokenizer, WordTokenizer, load

if TYPE_CHECKING:
    from mpi4py import MPI

BLOCK = 1 << 20  # characters of units that a rank tells at a time, so that rank 0 never has all counts of all ranks at once
Say = Callable[[str], None]
_Counts = dict[str, Annotated[int, msgspec.Meta(ge=0, le=1 << 53)]]


@dataclass(frozen=True)
class Vocabulary:
    """A tokenizer of `kind` with at most `size` tokens (0: its default), made of counts; or else that of `folder`."""

    kind: str = ""
    size: int = 0
    folder: str | os.PathLike[str] = ""
    counting: PrivateCounting | None = None  # None: exact counts
    rate: int = 0  # samples a second, of a tokenizer of sound

    def of_counts(self, counts: Mapping[str, int], pairs: bool) -> Tokenizer:
        """The tokenizer. Raises UserError.

        counts : of units of the train text; 0 for those that only other splits have
        """
        kind = KINDS[self.kind]
        found, unseen = {unit: count for unit, count in counts.items() if count}, len(counts) > 0 and not all(counts.values())
        if self.counting:
            if not found:
                raise UserError(
                    f"no {kind.unit} is in enough {'pairs' if pairs else 'lines'} of a rank to be told, about "
                    f"{self.counting.threshold:,.0f}: it takes more text, a larger --epsilon, or --tokenizer byte"
                )
            most, unseen = max(found.values()), True  # nobody has looked at the other splits
            found |= {unit: most + 1 for unit in kind.of_every_text if not pairs}
        tokenizer = kind.build(found, self.size, unseen and kind.kind != "bpe")
        tokenizer.pairs, tokenizer.rate = pairs, self.rate
        return tokenizer


def take(comm: MPI.Comm, folder: str | os.PathLike[str], pairs: bool, say: Say) -> Tokenizer:
    """The tokenizer of a folder, with the two tokens of pairs or without. Collective. Raises UserError on all ranks."""
    tokenizer = agree(comm, _load, folder, pairs)
    if tokenizer.pairs != pairs:
        say(f"the vocabulary is that of {folder} {'and two tokens more, for' if pairs else 'without the two tokens of'} pairs")
        tokenizer.pairs = pairs
    check_same(comm, {"tokenizer that is taken": tokenizer_hash(tokenizer)})
    return tokenizer


def _load(folder: str | os.PathLike[str], pairs: bool) -> Tokenizer:
    tokenizer = load_tokenizer(folder)
    if isinstance(tokenizer, WordTokenizer) and not pairs and END_OF_LINE not in tokenizer.numbers:
        raise UserError(f"the vocabulary of {folder} has no {END_OF_LINE}, with which lines of text end: take one made of text")
    return tokenizer


def build(comm: MPI.Comm, vocabulary: Vocabulary, counts: Mapping[str, int], pairs: bool, say: Say) -> Tokenizer:
    """The tokenizer of all ranks' counts, those of `Vocabulary.of_counts`. Collective. Raises UserError."""
    merged, value = merge(comm, counts), dict[str, Any]()
    with together(comm):
        if comm.rank == 0:
            if counting := vocabulary.counting:
                say(f"private counts: noise {counting.sigma:,.1f}, threshold {counting.threshold:,.1f}; {len(merged):,} pass")
            say("building the vocabulary")
            value = vocabulary.of_counts(merged, pairs).to_json()
    told = messages.broadcast(comm, value, dict[str, Any])
    return agree(comm, load, told, "the message of rank 0")


def merge(comm: MPI.Comm, counts: Mapping[str, int]) -> Counter[str]:
    """The sum of all ranks' counts on rank 0, nothing on the others; units with a count of 0 stay. Collective."""
    blocks = list(_blocks(counts))
    merged: Counter[str] = Counter()
    for number in range(int(messages.largest(comm, np.array([len(blocks)]))[0])):
        mine = {unit: counts[unit] for unit in blocks[number]} if number < len(blocks) else {}
        for part in messages.gather(comm, mine, _Counts):
            for unit, count in part.items():
                merged[unit] += count
    return merged


def _blocks(counts: Mapping[str, int]) -> Iterator[list[str]]:
    block: list[str] = []
    size = 0
    for unit in sorted(counts):  # not as they came in the text
        block.append(unit)
        size += len(unit) + 8
        if size >= BLOCK:
            yield block
            block, size = [], 0
    if block:
        yield block
