"""Which lanes suit what a corpus holds and what a model makes of it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..errors import UserError
from .both_ways_lanes import BothWaysLanes
from .labelled_lanes import ClassLanes, TagLanes
from .lanes import Lanes
from .pair_lanes import PairLanes
from .source_lanes import SourceLanes

if TYPE_CHECKING:
    from .corpus import Corpus
    from .placing import ShardFile

LANES: dict[tuple[str, str], type[Lanes]] = {  # (Corpus.content, model.kind)
    ("text", "lm"): Lanes,
    ("text", "bilm"): BothWaysLanes,
    ("pairs", "lm"): PairLanes,
    ("pairs", "seq2seq"): SourceLanes,
    ("tags", "tagger"): TagLanes,
    ("classes", "classifier"): ClassLanes,
}


def lanes_of(corpus: Corpus, kind: str) -> type[Lanes]:
    """The class of Lanes of a corpus for a kind of model. Raises UserError where such a model cannot learn from it."""
    found = LANES.get((corpus.content, kind))
    if found is None:
        reads = " or ".join(content for content, other in LANES if other == kind)
        fits = " or ".join(other for content, other in LANES if content == corpus.content)
        raise UserError(f"{corpus.folder} holds {corpus.content}, for {fits}; model.kind = {kind} reads {reads or 'nothing'}")
    return found


def read_lanes(
    corpus: Corpus, split: str, lanes: range, of: int, window: int, first: int | None = None, kind: str = "lm"
) -> Lanes:
    """The Lanes that suit a corpus and a kind of model. Raises UserError."""
    return lanes_of(corpus, kind)(corpus, split, lanes, of, window, first)


def lane_files(corpus: Corpus, split: str, lanes: range, of: int, kind: str = "lm") -> list[ShardFile]:
    """The shards that lanes of a corpus read, which must be sound before (supply.py). Raises UserError."""
    return lanes_of(corpus, kind).files(corpus, split, lanes, of)


def most_lanes(corpus: Corpus, split: str, kind: str = "lm") -> int:
    """The most lanes into which a split can be cut. Raises UserError."""
    return lanes_of(corpus, kind).most(corpus, split)
