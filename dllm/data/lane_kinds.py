"""Which lanes suit what a corpus holds and what a model makes of it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..errors import UserError
from .both_ways_lanes import BothWaysLanes
from .frame_lanes import FrameClassLanes, TranscriptLanes
from .labelled_lanes import ClassLanes, TagLanes
from .lanes import Lanes
from .pair_lanes import PairLanes
from .source_lanes import SourceLanes

if TYPE_CHECKING:
    from .corpus import Corpus
    from .placing import ShardFile

LANES: dict[tuple[str, str], type[Lanes]] = {  # (what a corpus holds, model.kind)
    ("text", "lm"): Lanes,
    ("text", "bilm"): BothWaysLanes,
    ("pairs", "lm"): PairLanes,
    ("pairs", "seq2seq"): SourceLanes,
    ("tags", "tagger"): TagLanes,
    ("classes", "classifier"): ClassLanes,
    ("recordings with classes", "classifier"): FrameClassLanes,
    ("recordings with transcripts", "ctc"): TranscriptLanes,
}
PRESETS = {  # content -> that which trains on it
    "pairs": "seq2seq",
    "tags": "tagger",
    "classes": "classifier",
    "transcripts": "speech-to-text",
}


def lanes_of(corpus: Corpus, kind: str) -> type[Lanes]:
    """The class of Lanes of a corpus for a kind of model. Raises UserError where such a model cannot learn from it."""
    content = f"recordings with {corpus.content}" if corpus.features else corpus.content
    found = LANES.get((content, kind))
    if found is None:
        reads = " or ".join(one for one, other in LANES if other == kind) or "nothing"
        fits = PRESETS.get(corpus.content)
        hint = f"--preset {fits}" if fits else "--set model.kind=lm, or another preset"
        raise UserError(f"{corpus.folder} holds {content}, and model.kind = {kind} reads {reads}: {hint}")
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
