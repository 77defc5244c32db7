"""Lanes: the global batch as L contiguous parts of a split, dealt out over ranks, read a window at a time.

Every lane of a corpus has floor(tokens / lanes) tokens, as in the published recipes; the remainder of fewer than `lanes`
tokens is left out. With private corpora lanes of different ranks differ in length: the short ones end in padding.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import numpy as np

from ..comm.messages import largest, total
from ..errors import UserError
from ..kernels.softmax import IGNORE
from ..kernels.types import Array
from ..model.batch import Batch

if TYPE_CHECKING:
    from mpi4py import MPI

    from .corpus import Corpus
    from .placing import ShardFile

AHEAD = 1 << 16  # tokens of a lane read at a time
NOTHING: Array = np.empty(0, np.int64)


def deal(lanes: int, ranks: int, rank: int) -> range:
    """The range of lanes that a rank computes: contiguous, and no rank has more than one more than another."""
    return range(lanes * rank // ranks, lanes * (rank + 1) // ranks)


class Lanes:
    """The lanes of one rank over one split.

    Parameters
    ----------
    corpus : Corpus
    split : str
    lanes : range
        The lanes of this rank, numbered within the corpus.
    of : int
        How many lanes the corpus is cut into.
    window : int
        T.
    first : int
        The global number of the first lane; differs from lanes.start with private corpora.

    Attributes
    ----------
    stride : int
        How far a window takes a lane, whose place in an epoch is counted in tokens.
    steps : list of int
        By lane, the places of an epoch.
    shortens : bool
        Of the class: whether a record that is longer than a window is read in part.
    """

    shortens: ClassVar[bool] = False

    def __init__(self, corpus: Corpus, split: str, lanes: range, of: int, window: int, first: int | None = None) -> None:
        self.corpus, self.split, self.T = corpus, split, window
        self.stride = window
        self._buffers: dict[int, tuple[int, Array]] = {}  # lane -> (first token, those that were read)
        self.starts: list[int] = []
        self.lengths: list[int] = []
        self.steps: list[int] = []
        self._cut(lanes, of)  # refuses more lanes than there can be
        self.numbers = np.arange(len(lanes), dtype=np.int64) + (lanes.start if first is None else first)
        self.length = max(self.lengths, default=0)
        self.arrange(0, 0)

    @classmethod
    def files(cls, corpus: Corpus, split: str, lanes: range, of: int) -> list[ShardFile]:
        """The shards that such lanes read; supply.py brings them. Raises UserError where there cannot be so many lanes."""
        length = cls._length(corpus, split, of)
        return corpus.files(split, lanes.start * length, lanes.stop * length) if lanes else []

    @classmethod
    def most(cls, corpus: Corpus, split: str) -> int:
        """The most lanes into which a split can be cut."""
        tokens: int = corpus.split(split)["tokens"]
        return tokens // 2

    @staticmethod
    def _length(corpus: Corpus, split: str, of: int) -> int:
        """Tokens of a lane. Raises UserError."""
        tokens: int = corpus.split(split)["tokens"]
        if tokens // of < 2:
            raise UserError(f"split '{split}' of {corpus.folder} has {tokens} tokens: too few for {of} lanes")
        return tokens // of

    def _cut(self, lanes: range, of: int) -> None:
        """Set starts and lengths, a lane's tokens in the split; and steps, its places: tokens that predict another."""
        length = self._length(self.corpus, self.split, of)
        self.starts, self.lengths = [lane * length for lane in lanes], [length] * len(lanes)
        self.steps = [length - 1] * len(lanes)

    def arrange(self, seed: int, epoch: int) -> bool:
        """Take the order of an epoch. Returns whether `shapes` are others than before: those of running text never are."""
        return False

    def shapes(self, places: Array) -> tuple[Array, Array]:
        """Of windows that begin at `places` (n,) the tokens that these lanes together predict, and time steps: (n,) int64 each.

        A window ends before the next multiple of T.
        """
        steps, ends = np.array(self.steps, np.int64), (places // self.T + 1) * self.T
        inside = np.maximum(np.minimum(steps, ends[:, None]) - places[:, None], 0)
        return inside.sum(axis=1), inside.max(axis=1, initial=0)

    def window(self, place: int, width: int) -> Batch:
        """The window that begins at `place`, of `width` steps."""
        return self._window(place, width, self.steps)

    def _window(self, place: int, width: int, steps: list[int]) -> Batch:
        """steps : of each column, how many tokens are predicted in an epoch"""
        tokens = np.zeros((width, len(steps)), np.int64)
        targets = np.full_like(tokens, IGNORE)
        for lane, most in enumerate(steps):
            there = min(width, most - place)
            if there > 0:
                text = self._read(lane, place, place + there + 1)
                tokens[:there, lane], targets[:there, lane] = text[:-1], text[1:]
        return Batch(tokens, targets)

    def _read(self, lane: int, begin: int, end: int) -> Array:
        """Tokens [begin, end) of a lane, from a buffer that is filled AHEAD."""
        at, buffer = self._buffers.get(lane, (0, NOTHING))
        if not (at <= begin and end <= at + len(buffer)):
            start, stop = self.starts[lane], min(self.lengths[lane], max(end, begin + AHEAD))
            at, buffer = begin, self.corpus.read(self.split, start + begin, start + stop)
            self._buffers[lane] = at, buffer
        return buffer[begin - at : end - at]


class Schedule:
    """The windows of an epoch: where each begins, how wide it is and how many tokens it holds; the same on every rank.

    A window is named by the place at which it begins, a multiple of the stride. Where a run goes on from another place, which
    it reached with windows of another width, the window there is a shorter one that ends before the next multiple.

    Parameters
    ----------
    lanes : Lanes
        This rank's.
    last : "keep" or "drop"
        What becomes of a shorter window at the end.
    comm : MPI.Comm, optional
        Of all ranks that have lanes. Collective. None: there are no others.
    place : int
        Where the run goes on.
    """

    def __init__(self, lanes: Lanes, last: str = "keep", comm: MPI.Comm | None = None, place: int = 0) -> None:
        longest = int(largest(comm, np.array([max(lanes.steps, default=0)]))[0])
        self._lanes, self._comm, self.longest = lanes, comm, longest
        self.windows = max(1, longest // lanes.stride) if last == "drop" else -(-longest // lanes.stride)
        self.places = list(range(0, self.end, lanes.stride))
        self._count(sorted({*self.places, place}))

    def _count(self, places: list[int]) -> None:
        tokens, widths = self._lanes.shapes(np.array(places, np.int64))
        self._tokens: dict[int, int] = dict(zip(places, total(self._comm, tokens).tolist(), strict=True))
        self._widths: dict[int, int] = dict(zip(places, largest(self._comm, widths).tolist(), strict=True))
        self.per_epoch = sum(self._tokens[place] for place in self.places)

    def begin_epoch(self, seed: int, epoch: int) -> None:
        """Take the order of an epoch, where lanes have one for each. Collective."""
        if self._lanes.arrange(seed, epoch):
            self._count(self.places)

    @property
    def end(self) -> int:
        """The place behind an epoch's last window."""
        return self.windows * self._lanes.stride

    def after(self, place: int) -> int:
        """The place behind the window at `place`; 0: it was the last one of the epoch."""
        after = (place // self._lanes.stride + 1) * self._lanes.stride
        return after if after < self.end else 0

    def progress(self, place: int) -> float:
        """The part of an epoch before `place`."""
        return place / self.end

    def left(self, place: int) -> int:
        """The windows of an epoch from `place` on."""
        return self.windows - place // self._lanes.stride

    def width(self, place: int) -> int:
        """T' of the window at `place`: time steps in which any lane has a token."""
        return self._widths[place]

    def tokens(self, place: int) -> int:
        """Tokens that all ranks together predict in the window at `place`."""
        return self._tokens[place]
