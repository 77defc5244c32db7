"""Lanes: the global batch as L contiguous parts of a split, dealt out over ranks, read a window at a time.

Every lane of a corpus has floor(tokens / lanes) tokens, as in the published recipes; the remainder of fewer than `lanes`
tokens is left out. With private corpora lanes of different ranks differ in length: the short ones end in padding.
"""

import numpy as np

from ..errors import UserError
from ..kernels.softmax import IGNORE

AHEAD = 1 << 16  # tokens of a lane read at a time


def deal(lanes, ranks, rank):
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
    """

    def __init__(self, corpus, split, lanes, of, window, first=None):
        self.corpus, self.split, self.T = corpus, split, window
        tokens = corpus.split(split)["tokens"]
        self.length = tokens // of
        if self.length < 2:
            raise UserError(f"split '{split}' of {corpus.folder} has {tokens} tokens: too few for {of} lanes")
        self.starts = [lane * self.length for lane in lanes]
        self.numbers = np.arange(len(lanes), dtype=np.int64) + (lanes.start if first is None else first)
        self.predicted = self.length - 1  # tokens of a lane that are predicted in an epoch
        self._buffers = {}
        if self.starts:
            corpus.verify(split, self.starts[0], self.starts[-1] + self.length)

    def window(self, number, width):
        """Tokens and targets (width,B) int64 of window `number`; targets are -1 where a lane has ended."""
        begin = number * self.T
        there = max(0, min(width, self.predicted - begin))
        tokens = np.zeros((width, len(self.starts)), np.int64)
        targets = np.full_like(tokens, IGNORE)
        if there:
            for lane, start in enumerate(self.starts):
                text = self._read(lane, start, begin, begin + there + 1)
                tokens[:there, lane], targets[:there, lane] = text[:-1], text[1:]
        return tokens, targets

    def _read(self, lane, start, begin, end):
        """Tokens [begin, end) of a lane, from a buffer that is filled AHEAD."""
        at, buffer = self._buffers.get(lane, (0, ()))
        if not (at <= begin and end <= at + len(buffer)):
            stop = min(self.length, max(end, begin + AHEAD))
            at, buffer = begin, self.corpus.read(self.split, start + begin, start + stop)
            self._buffers[lane] = at, buffer
        return buffer[begin - at : end - at]


class Schedule:
    """How many windows an epoch has and how many tokens of all ranks each holds; the same on every rank.

    Parameters
    ----------
    predicted : sequence of int
        For every lane of the job the tokens it predicts in an epoch.
    window : int
        T.
    last : "keep" or "drop"
        What becomes of a shorter window at the end.
    """

    def __init__(self, predicted, window, last="keep"):
        self.predicted, self.T = np.asarray(predicted, np.int64), window
        longest = int(self.predicted.max(initial=0))
        self.windows = max(1, longest // window) if last == "drop" else -(-longest // window)
        self.per_epoch = sum(self.tokens(number) for number in range(self.windows))

    def width(self, number):
        """T' of window `number`: time steps in which any lane has a token."""
        return int(min(self.T, self.predicted.max() - number * self.T))

    def tokens(self, number):
        """Tokens that all ranks together predict in window `number`."""
        return int(np.clip(self.predicted - number * self.T, 0, self.T).sum())
