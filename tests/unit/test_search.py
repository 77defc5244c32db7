"""Beam search against all texts there are and against a plain search, on a table of probabilities; any batch alike."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dllm.inference import search
from dllm.inference.search import Beam

V, END = 5, 4
WIDE = 400


class Table:
    """Streams of a model whose next token depends on the source and the last two, with attention to the source."""

    vocabulary = V

    def __init__(self, attends=True, seed=3):
        rng = np.random.default_rng(seed)
        logits = rng.normal(size=(7, V + 1, V + 1, V)) * 2
        self.table = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
        self.looks, self.attends = np.exp(2 * rng.normal(size=(V + 1, 9))), attends

    def weights(self, source, last):
        weights = self.looks[last, : len(source)]
        return weights / weights.sum()

    def begin(self, sources):
        self.sources, self.owner = sources, np.arange(len(sources))
        self.last = np.full((len(sources), 2), V)
        return np.array([len(source) for source in sources]) if self.attends else None

    def choose(self, most):
        kinds = [int(self.sources[owner].sum()) % 7 for owner in self.owner]
        rows = self.table[kinds, self.last[:, 0], self.last[:, 1]]
        tokens = np.argsort(-rows, axis=1, kind="stable")[:, :most]
        return tokens, np.take_along_axis(rows, tokens, axis=1)

    def attention(self):
        found = np.zeros((len(self.owner), max(map(len, self.sources))))
        for row, owner in enumerate(self.owner):
            found[row, : len(self.sources[owner])] = self.weights(self.sources[owner], self.last[row, 1])
        return found

    def advance(self, parents, tokens):
        self.owner = self.owner[parents]
        self.last = np.stack([self.last[parents, 1], tokens], axis=1)


def after(model, source, text):
    """log p of every token behind a text."""
    return model.table[int(source.sum()) % 7][tuple([V, V, *text][-2:])]


def scored(model, source, text, alpha, beta):
    """(s, log P) of a text with its end, as the formula stands."""
    total = sum(after(model, source, text[:at])[token] for at, token in enumerate(text))
    cover = sum(model.weights(source, ([V, *text])[at]) for at in range(len(text)))
    coverage = beta * np.log(np.minimum(cover, 1)).sum() if beta else 0
    return total / ((5 + len(text)) / 6) ** alpha + coverage, total


def ended_texts(longest, least=0, without=()):
    allowed = [token for token in range(V) if token != END and token not in without]
    for length in range(least, longest):
        for text in itertools.product(allowed, repeat=length):
            yield (*text, END)


SOURCES = [np.array(source) for source in ([1, 2], [3], [0, 1, 2, 3, 4], [2, 2, 2], [6])]


@pytest.mark.parametrize(("alpha", "beta", "least", "banned"), [(0, 0, 0, ()), (1.5, 0, 2, (1,)), (0.6, 0.4, 0, (0, 3))])
def test_beams_wide_enough_find_the_best_of_all_texts_in_order(alpha, beta, least, banned):
    model, longest, best = Table(), 5, 6
    beam = Beam(width=WIDE, length_penalty=alpha, coverage=beta, least=least, best=best)
    for source, found in zip(SOURCES, search.search(model, SOURCES, longest, beam, END, banned), strict=True):
        every = [(scored(model, source, text, alpha, beta), text) for text in ended_texts(longest, least, banned)]
        every.sort(key=lambda one: -one[0][0])
        assert [(*one.tokens, END) for one in found] == [text for _, text in every[:best]]
        np.testing.assert_allclose([(one.score, one.logprob) for one in found], [both for both, _ in every[:best]])
        assert all(one.ended for one in found)


def plain_search(model, source, longest, beam, banned):
    """The same, one source at a time with lists, never over before the longest text: all texts that end."""
    kept, ended = [((), 0.0)], []
    for position in range(longest):
        further = []
        for text, total in kept:
            for token, logprob in enumerate(after(model, source, text)):
                if token not in banned and not (token == END and position < beam.least):
                    further.append(((*text, token), total + logprob))
        further = sorted(further, key=lambda one: -one[1])[: beam.width]
        ended += [text for text, _ in further if text[-1] == END]
        kept = [one for one in further if one[0][-1] != END]
    score = lambda text: scored(model, source, text, beam.length_penalty, beam.coverage)[0]
    first = sorted(ended, key=score, reverse=True)
    return (first + sorted((text for text, _ in kept), key=score, reverse=True))[: beam.best]


@settings(max_examples=120, deadline=None, derandomize=True, database=None)
@given(
    st.integers(1, 6), st.integers(1, 3), st.sampled_from([0.0, 0.7, 1.0, 3.0]), st.sampled_from([0.0, 0.5]),
    st.integers(0, 4), st.integers(1, 9), st.sets(st.integers(0, 2), max_size=2), st.integers(0, 50),
)  # fmt: skip
def test_a_search_of_many_is_the_plain_one_of_each(width, best, alpha, beta, least, longest, banned, seed):
    """In any batch, to the bit; and stopping early loses nothing."""
    beam = Beam(width=max(width, best), length_penalty=alpha, coverage=beta, least=least, best=best)
    model = Table(seed=seed)
    found = search.search(model, SOURCES, longest, beam, END, banned)
    for number, source in enumerate(SOURCES):
        expected = plain_search(model, source, longest, beam, banned)
        assert [(*one.tokens, *[END] * one.ended) for one in found[number]] == expected
        assert search.search(model, [source], longest, beam, END, banned) == [found[number]]
        for one in found[number]:
            looked = [int(np.argmax(model.weights(source, last))) for last in [V, *one.tokens][: len(one.tokens)]]
            assert one.places == looked
    assert search.search(model, SOURCES[::-1], longest, beam, END, banned) == found[::-1]


def test_a_search_is_over_as_soon_as_nothing_can_become_better(monkeypatch):
    model, steps = Table(), []
    monkeypatch.setattr(Table, "advance", lambda self, *rest, old=Table.advance: steps.append(1) or old(self, *rest))
    for alpha, most in ((0.0, 10), (0.5, 150)):
        steps.clear()
        search.search(model, SOURCES, 300, Beam(width=4, length_penalty=alpha), END)
        assert 0 < len(steps) < most


def test_without_attention_or_an_end_all_texts_are_whole():
    model = Table(attends=False)
    found = search.search(model, SOURCES, 4, Beam(width=3, best=3), None)
    assert {len(one.tokens) for every in found for one in every} == {4}
    assert not any(one.ended or one.places for every in found for one in every)
    for source, every in zip(SOURCES, found, strict=True):
        assert [one.score for one in every] == sorted((one.score for one in every), reverse=True)
        totals = [scored(model, source, tuple(one.tokens), 0, 0)[1] for one in every]
        np.testing.assert_allclose([one.logprob for one in every], totals)
