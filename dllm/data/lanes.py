"""Lanes: the global batch as L contiguous parts of a split, dealt out over ranks, read a window at a time.

Every lane of a corpus has floor(tokens / lanes) tokens, as in the published recipes; the remainder of fewer than `lanes`
tokens is left out. With private corpora lanes of different ranks differ in length: the short ones end in padding.

Lanes of pairs (pairs.py) are cut between pairs, and each of their windows holds as many whole pairs as fit: no pair is cut by
the truncation of back-propagation, and every window may begin from zero states (train.carry = window), as generation does.
Only targets, with the <end> behind them, are predicted and counted.
"""

import itertools

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
        self.numbers = np.arange(len(lanes), dtype=np.int64) + (lanes.start if first is None else first)
        self._buffers = {}
        self._cut(lanes, of)
        self.length = max(self.lengths, default=0)

    def _cut(self, lanes, of):
        """Set starts and lengths, a lane's tokens in the split; and steps, those of an epoch, in which it is given a token."""
        tokens = self.corpus.split(self.split)["tokens"]
        length = tokens // of
        if length < 2:
            raise UserError(f"split '{self.split}' of {self.corpus.folder} has {tokens} tokens: too few for {of} lanes")
        self.starts, self.lengths = [lane * length for lane in lanes], [length] * len(lanes)
        self.steps = [length - 1] * len(lanes)
        if self.starts:
            self.corpus.verify(self.split, self.starts[0], self.starts[-1] + length)

    def counts(self, windows):
        """Tokens (windows,) int64 that these lanes together predict in each window."""
        return _in_windows(self.steps, windows, self.T)

    def window(self, number, width):
        """Tokens and targets (width,B) int64 of window `number`; targets are -1 where nothing is predicted."""
        tokens = np.zeros((width, len(self.starts)), np.int64)
        targets = np.full_like(tokens, IGNORE)
        for lane in range(len(self.starts)):
            begin, end = self._inputs(lane, number, width)
            if begin < end:
                text = self._read(lane, begin, end + 1)
                tokens[: end - begin, lane], targets[: end - begin, lane] = text[:-1], self._targets(text)
        return tokens, targets

    def _inputs(self, lane, number, width):
        """The range of a lane's tokens that are the inputs of a window."""
        begin = number * self.T
        return begin, min(begin + width, self.steps[lane])

    def _targets(self, text):
        """What is predicted behind each token of `text` (n,), (n - 1,)."""
        return text[1:]

    def _read(self, lane, begin, end):
        """Tokens [begin, end) of a lane, from a buffer that is filled AHEAD."""
        at, buffer = self._buffers.get(lane, (0, ()))
        if not (at <= begin and end <= at + len(buffer)):
            start, stop = self.starts[lane], min(self.lengths[lane], max(end, begin + AHEAD))
            at, buffer = begin, self.corpus.read(self.split, start + begin, start + stop)
            self._buffers[lane] = at, buffer
        return buffer[begin - at : end - at]


class PairLanes(Lanes):
    """Lanes of a corpus of pairs: a lane begins with the <end> that is the last token of the one before."""

    def _cut(self, lanes, of):
        corpus, entry = self.corpus, self.corpus.split(self.split)
        self._sep, self._end, where = corpus.tokenizer.sep, corpus.tokenizer.end, f"split '{self.split}' of {corpus.folder}"
        if entry["pairs"] < of:
            raise UserError(f"{where} has {entry['pairs']} pairs: too few for {of} lanes")
        if entry["longest"] > self.T:
            raise UserError(
                f"{where} has a pair of {entry['longest']} tokens and a window must hold it: --set train.window="
                f"{entry['longest']}, or leave long ones out with dllm.prepare --longest"
            )
        last, longest = entry["tokens"] - 1, entry["longest"]
        nominal = [last * lane // of for lane in range(lanes.start, lanes.stop + 1)] if lanes else [0]
        corpus.verify(self.split, nominal[0], nominal[-1] + longest + 1)
        cuts = []
        for place in nominal:
            ends = np.flatnonzero(corpus.read(self.split, place, place + longest + 1) == self._end)
            if not len(ends):
                raise UserError(f"{where} is not what its manifest says: prepare the data anew")
            cuts.append(place + int(ends[0]))
        self.starts, self.lengths = cuts[:-1], [stop - start + 1 for start, stop in itertools.pairwise(cuts)]
        self._packed = [self._pack(lane) for lane in range(len(lanes))]
        self.steps = [(len(begins) - 2) * self.T + begins[-1] - begins[-2] if len(begins) > 1 else 0
                      for begins, _ in self._packed]  # fmt: skip

    def _pack(self, lane):
        """Where the windows of a lane begin and, last, where it ends (n + 1,); and what each predicts (n,)."""
        seps, ends = [], []
        for start in range(0, self.lengths[lane], AHEAD):
            text = self._read(lane, start, min(start + AHEAD, self.lengths[lane]))
            seps.append(np.flatnonzero(text == self._sep) + start)
            ends.append(np.flatnonzero(text == self._end) + start)
        seps, ends = np.concatenate(seps), np.concatenate(ends)
        orderly = len(seps) == len(ends) - 1 and (ends[:-1] < seps).all() and (seps < ends[1:]).all()
        if not orderly or np.diff(ends).max(initial=0) > self.T:
            raise UserError(f"split '{self.split}' of {self.corpus.folder} is not made of pairs: prepare the data anew")
        behind = np.concatenate([[0], np.cumsum(ends[1:] - seps)])  # predicted up to each <end>
        pairs = [0]
        while pairs[-1] < len(seps):
            pairs.append(int(np.searchsorted(ends, ends[pairs[-1]] + self.T, "right")) - 1)
        return ends[pairs], np.diff(behind[pairs])

    def counts(self, windows):
        totals = np.zeros(windows, np.int64)
        for _, counted in self._packed:
            counted = counted[:windows]
            totals[: len(counted)] += counted
        return totals

    def _inputs(self, lane, number, width):
        begins, _ = self._packed[lane]
        return (begins[number], begins[number + 1]) if number < len(begins) - 1 else (0, 0)

    def _targets(self, text):
        marks = np.flatnonzero((text[:-1] == self._sep) | (text[:-1] == self._end))
        last = marks[np.searchsorted(marks, np.arange(len(text) - 1), "right") - 1]  # the first token is an <end>
        return np.where(text[last] == self._sep, text[1:], IGNORE)


def read_lanes(corpus, split, lanes, of, window, first=None):
    """The Lanes that suit a corpus."""
    kind = PairLanes if corpus.tokenizer.pairs else Lanes
    return kind(corpus, split, lanes, of, window, first)


def make_schedule(gather, lanes, window, last="keep"):
    """The Schedule of the Lanes of all ranks. Collective: gather(value) gives the values of all ranks, a list."""
    schedule = Schedule(np.concatenate(gather(np.array(lanes.steps, np.int64))), window, last)
    schedule.count(sum(gather(lanes.counts(schedule.windows))))
    return schedule


def _in_windows(steps, windows, T):
    """How many of `steps`, a number for each lane, lie in each window (windows,)."""
    starts = T * np.arange(windows)[:, None]
    return np.clip(np.asarray(steps, np.int64) - starts, 0, T).sum(axis=1)


class Schedule:
    """How many windows an epoch has and how many tokens of all ranks each holds; the same on every rank.

    Parameters
    ----------
    steps : sequence of int
        For every lane of the job the time steps of an epoch in which it is given a token.
    window : int
        T.
    last : "keep" or "drop"
        What becomes of a shorter window at the end.
    """

    def __init__(self, steps, window, last="keep"):
        self.steps, self.T = np.asarray(steps, np.int64), window
        longest = int(self.steps.max(initial=0))
        self.windows = max(1, longest // window) if last == "drop" else -(-longest // window)
        self.count(_in_windows(self.steps, self.windows, window))

    def count(self, tokens):
        """Predicted are `tokens` (windows,), not one in each step of each lane."""
        self._tokens = [int(number) for number in tokens]
        self.per_epoch = sum(self._tokens)

    def width(self, number):
        """T' of window `number`: time steps in which any lane has a token."""
        return int(min(self.T, self.steps.max() - number * self.T))

    def tokens(self, number):
        """Tokens that all ranks together predict in window `number`."""
        return self._tokens[number]
