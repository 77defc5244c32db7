r"""Beam search for many sources at once: the likeliest texts that a model gives to each, with their scores (Graves 2012).

    s(Y) = log P(Y) / ((5 + n) / 6)^alpha + beta sum_i log min(sum_t a_ti, 1)       Wu et al. 2016, n tokens with the end

A beam is a row: all kept texts of all sources are rows of one step. Of what goes on from the rows of a source the most likely
`width` are taken; those that end leave the beam. A search is over when no row can beat the last of the wanted texts any more:
log P only falls, and the longest text possible has the largest divisor, so log P / ((5 + longest) / 6)^alpha bounds what
becomes of a row. What a source gets does not depend on the others, to the bit, as long as rows of `Streams` do not.
"""

from __future__ import annotations

from collections.abc import Collection, Generator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np

from ..kernels.types import Array

LEAST = 1e-10  # of the attention that a place got in all: its logarithm is finite


@dataclass(frozen=True, kw_only=True)
class Beam:
    """How texts are searched for. One row a source takes the most likely token each time."""

    width: int = 1  # rows that are kept for a source
    length_penalty: float = 1.0  # alpha, at least 0: larger ones prefer longer texts; 0: log P itself
    coverage: float = 0.0  # beta, at least 0: larger ones prefer texts that attend to all of the source
    least: int = 0  # tokens of a text, without its end
    best: int = 1  # texts that are wanted of each source, at most `width`

    def divisor(self, length: int) -> float:
        """What log P of a text of so many tokens is divided by."""
        return float(((5 + length) / 6) ** self.length_penalty)


GREEDY = Beam()


class Found(NamedTuple):
    """A text that a search has found."""

    tokens: list[int]  # without the end
    logprob: float  # log P, nats, with that of the end
    score: float  # s
    ended: bool  # by its end, not by the limit
    places: list[int]  # of the source, that each token attended to most; [] without attention


class Streams(Protocol):
    """Texts that a model takes further, a row each."""

    @property
    def vocabulary(self) -> int:
        """How many tokens there are."""

    def begin(self, sources: Sequence[Array]) -> Array | None:
        """Let row n be the beginning of a text for source n, (n,) int64.

        Returns (B,) int64, places of each source that `attention` speaks of; None where the model has no attention.
        """

    def choose(self, most: int) -> tuple[Array, Array]:
        """The most likely next tokens (N,most) int64 of every row and their log-probabilities, float64, the best first.

        Raises UserError where the model's numbers are not finite.
        """

    def attention(self) -> Array:
        """(N,S), how much each place of its source counted for what `choose` has told of a row; 0 behind its last."""

    def advance(self, parents: Array, tokens: Array) -> None:
        """Let row i be what row parents[i] was, one token further. parents, tokens : (N,) int64"""


def search(
    streams: Streams, sources: Sequence[Array], tokens: int, beam: Beam, end: int | None, banned: Collection[int] = ()
) -> list[list[Found]]:
    """The best texts for each source, the best first: at most `beam.best`.

    Parameters
    ----------
    streams : Streams
        It has room for `beam.width` rows a source.
    sources : sequence of (n,) int64
    tokens : int
        Of a text at most, with its end. Texts that have not ended then stand behind those that have.
    beam : Beam
    end : int or None
        The token that ends a text; None: all have `tokens` tokens.
    banned : collection of int
        Tokens that no text has.

    Raises
    ------
    UserError
        Where the model's numbers are not finite.
    """
    work = steps(streams, sources, tokens, beam, end, banned)
    while True:
        try:
            next(work)
        except StopIteration as done:
            found: list[list[Found]] = done.value
            return found


def steps(
    streams: Streams, sources: Sequence[Array], tokens: int, beam: Beam, end: int | None, banned: Collection[int] = ()
) -> Generator[None, None, list[list[Found]]]:
    """`search`, with a pause behind each step."""
    state = _Search(streams, sources, tokens, beam, end, banned)
    for position in range(tokens):
        parents = state.step(position)
        if not len(parents) or position == tokens - 1:
            break
        streams.advance(parents, state.text[:, -1])
        yield
    return state.found()


class _Search:
    """The rows that go on, by source and then the most likely first, and what has ended."""

    def __init__(
        self, streams: Streams, sources: Sequence[Array], tokens: int, beam: Beam, end: int | None, banned: Collection[int]
    ) -> None:
        count = len(sources)
        self.streams, self.beam, self.end, self.longest = streams, beam, end, tokens
        self.banned = [*banned]
        self.most = min(streams.vocabulary, beam.width + len(self.banned) + (beam.least > 0))
        self.owner, self.total, self.text = np.arange(count), np.zeros(count), np.zeros((count, 0), np.int64)
        self.ended: list[list[Found]] = [[] for _ in sources]
        self.lengths = streams.begin(sources)
        self.places = np.zeros((count, 0), np.int64)
        self.cover = np.zeros((count, 0 if self.lengths is None else int(self.lengths.max(initial=0))))

    def step(self, position: int) -> Array:
        """Take every row a token further, `position` tokens behind its beginning. Returns the rows they come from."""
        next_tokens, logprobs = self.streams.choose(self.most)
        not_now = [*self.banned, self.end] if self.end is not None and position < self.beam.least else self.banned
        totals = np.where(np.isin(next_tokens, not_now), -np.inf, self.total[:, None] + logprobs)
        parents, columns = self._best(totals)
        self.owner, self.total, chosen = self.owner[parents], totals[parents, columns], next_tokens[parents, columns]
        self.text = np.concatenate([self.text[parents], chosen[:, None]], axis=1)
        self.places, self.cover = self.places[parents], self.cover[parents]
        if self.lengths is not None:
            attention = self.streams.attention()[parents]
            self.places = np.concatenate([self.places, attention.argmax(axis=1)[:, None]], axis=1)
            self.cover = self.cover + attention
        going = np.ones(len(parents), bool) if self.end is None else chosen != self.end
        for row in np.flatnonzero(~going).tolist():
            ended = self.ended[self.owner[row]]
            ended.append(self._found(row, True))
            ended.sort(key=lambda one: -one.score)
            del ended[self.beam.best :]  # which nobody will want: a long search ends thousands
        sources, first = np.unique(self.owner[going], return_index=True)
        for source, most in zip(sources.tolist(), self.total[going][first].tolist(), strict=True):
            if self._is_over(source, most):
                going[self.owner == source] = False
        self.owner, self.total, self.text = self.owner[going], self.total[going], self.text[going]
        self.places, self.cover = self.places[going], self.cover[going]
        came_from: Array = parents[going]
        return came_from

    def found(self) -> list[list[Found]]:
        """What is wanted of each source."""
        for row, source in enumerate(self.owner):
            self.ended[source].append(self._found(row, False))
        return [sorted(found, key=lambda one: (not one.ended, -one.score))[: self.beam.best] for found in self.ended]

    def _best(self, totals: Array) -> tuple[Array, Array]:
        """Row and column of the `width` largest of `totals` (N,most) for each source, by source, the largest first."""
        N, most = totals.shape
        _, first, group, counts = np.unique(self.owner, return_index=True, return_inverse=True, return_counts=True)
        grid = np.full((len(first), counts.max(initial=0), most), -np.inf)
        grid[group, np.arange(N) - first[group]] = totals
        flat = grid.reshape(len(first), -1)
        order = np.argsort(-flat, axis=1, kind="stable")[:, : self.beam.width]
        groups, ranks = np.nonzero(np.take_along_axis(flat, order, axis=1) > -np.inf)
        chosen = order[groups, ranks]
        return first[groups] + chosen // most, chosen % most

    def _is_over(self, source: int, total: float) -> bool:
        """Whether no row of a source can still be among the wanted texts; total : log P of its most likely row."""
        ended, best = self.ended[source], self.beam.best
        return len(ended) >= best and ended[best - 1].score >= total / self.beam.divisor(self.longest)

    def _found(self, row: int, ended: bool) -> Found:
        text, total = self.text[row].tolist(), float(self.total[row])
        score = total / self.beam.divisor(len(text))
        if self.lengths is not None and self.beam.coverage:
            covered = self.cover[row, : self.lengths[self.owner[row]]]
            score += self.beam.coverage * float(np.log(np.clip(covered, LEAST, 1)).sum())
        count = len(text) - ended
        return Found(text[:count], total, score, ended, self.places[row, :count].tolist() if self.lengths is not None else [])
