"""Factors of bfloat16, bit by bit: how words and pairs lie, those of weights, and those that the optimiser leaves behind."""

import itertools

import numpy as np
import pytest
from helpers.numerics import B, T, V, configured, guarded, in_panels, rounded, run, spoil, states, text
from hypothesis import given, settings
from hypothesis import strategies as st

from dllm.comm.averaging import Gradient
from dllm.config import TrainConfig
from dllm.kernels import operands as kernels
from dllm.kernels import processor
from dllm.kernels.operands import Operands, Weight
from dllm.kernels.team import Team
from dllm.model.batch import Batch
from dllm.model.factors import Factors
from dllm.model.language_model import LanguageModel
from dllm.model.layout import Layout
from dllm.runs.state import State
from dllm.training import optim

pytestmark = pytest.mark.skipif(not processor.BF16, reason="products of bfloat16 are no faster than float32's here")
SIZE = st.one_of(st.integers(1, 40), st.sampled_from([47, 48, 49, 63, 64, 65, 97]))
ROWS = st.integers(0, 3)
LAYOUTS = {  # a kernel: what it makes of a matrix, words or pairs, and of which: its transpose or itself
    "to_words": ("words", False),
    "to_pairs": ("pairs", False),
    "transpose_to_words": ("words", True),
    "transpose_to_pairs": ("pairs", True),
}


def bits(x, rows, columns):
    """The upper halves of x rounded to bfloat16, with zeros up to multiples of `rows` and `columns`."""
    whole = np.zeros([-(-n // step) * step for n, step in zip(x.shape, (rows, columns), strict=True)], np.uint16)
    whole[: len(x), : x.shape[1]] = rounded(x).view(np.uint32) >> 16
    return whole


def words_of(x):
    """A left factor (N/32,M,16) of x (M,N): columns 2k and 2k + 1 of a row are a word."""
    halves = bits(x, 1, 32)
    return halves.view(np.uint32).reshape(len(x), -1, 16).transpose(1, 0, 2)


def pairs_of(x):
    """A right factor (N/16,K/2,16) of x (K,N): rows 2k and 2k + 1 of a column are a word, in whole spans of 16 words."""
    halves = bits(x, 32, 16).astype(np.uint32)
    return (halves[0::2] | halves[1::2] << np.uint32(16)).reshape(-1, halves.shape[1] // 16, 16).transpose(1, 0, 2)


ORACLES = {"words": words_of, "pairs": pairs_of}


def weights(shape, seed=1):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("name", LAYOUTS)
@given(K=SIZE, N=SIZE, row=ROWS, x_row=ROWS, stream=st.booleans())
@settings(max_examples=40, deadline=None)
def test_words_and_pairs_lie_as_they_should_with_zeros_beyond(name, K, N, row, x_row, stream):
    """At the edges of memory; rows before the first stay as they are, and what lies around the source is no number."""
    kind, turned = LAYOUTS[name]
    x = weights((K, N))
    panels = in_panels(np.concatenate([np.full((x_row, N), np.nan, np.float32), x]))
    whole = np.zeros((K, panels.shape[0] * 16), np.float32)
    whole[:, :N] = x
    expected = ORACLES[kind](whole.T if turned else whole)
    out = np.empty((len(expected), row + expected.shape[1], 16), np.uint32)
    spoil(out)
    out = guarded(out)
    getattr(kernels, name)(out, row, guarded(panels), x_row, K, stream)
    np.testing.assert_array_equal(out[:, row:], expected)
    assert (out[:, :row] == 0xFFFFFFFF).all()


@given(D=SIZE, panels=st.integers(1, 9), cuts=st.sets(st.integers(0, 4)), threads=st.sampled_from([1, 3]))
@settings(max_examples=40, deadline=None)
def test_factors_of_a_weight_are_those_of_its_matrix_in_whatever_parts_they_are_made(D, panels, cuts, threads):
    x = weights((D, 16 * panels))
    weight = Weight(Operands(np.float32, True, Team(threads)), in_panels(x))
    for make in (weight.take_all, lambda: [weight.take(*part) for part in reversed(parts)]):
        spoil(weight.factor, weight.of_transpose)
        edges = sorted({0, panels, *(2 * cut for cut in cuts if 2 * cut < panels)})
        parts = list(itertools.pairwise(edges))
        make()
        np.testing.assert_array_equal(weight.factor, pairs_of(x))
        np.testing.assert_array_equal(weight.transposed(weight.operands), pairs_of(x.T))


# factors of a model


def made(kind="untied", threads=1):
    """A layout, parameters, and their factors, which hold no numbers."""
    layout = Layout(configured(kind, hidden=40, embedding={"tied": 40, "one-hot": 0}.get(kind, 35)), V, np.float32)
    theta = weights(layout.size)
    factors = Factors(layout, Operands(np.float32, True, Team(threads)), theta)
    forget(factors)
    return layout, theta, factors


def forget(factors):
    for weight in factors.weights.values():
        spoil(weight.factor, weight.of_transpose)


def check(factors, layout, theta):
    """They are those of theta."""
    arrays = layout.arrays(theta)
    for name, weight in factors.weights.items():
        x = arrays[name].transpose(1, 0, 2).reshape(arrays[name].shape[1], -1)
        np.testing.assert_array_equal(weight.factor, pairs_of(x))
        np.testing.assert_array_equal(weight.transposed(weight.operands), pairs_of(x.T))


@pytest.mark.parametrize("kind", ["untied", "tied", "one-hot"])
@given(data=st.data())
@settings(max_examples=20, deadline=None)
def test_parts_of_the_vector_may_be_final_in_any_order_and_by_any_thread(kind, data):
    threads = data.draw(st.sampled_from([1, 3]))
    layout, _, factors = made(kind, threads)
    near_edges = st.sampled_from(factors.edges.tolist()).flatmap(lambda edge: st.integers(max(edge - 1, 0), edge + 1))
    cuts = data.draw(st.sets(st.one_of(st.integers(0, layout.size), near_edges), max_size=30))
    edges = sorted({0, layout.size, *(cut for cut in cuts if cut < layout.size)})
    parts = data.draw(st.permutations(list(itertools.pairwise(edges))))
    told = parts[: data.draw(st.integers(0, len(parts)))]  # of the others nobody says anything
    new = weights(layout.size, 2)
    factors.begin(new)
    Team(threads).share(lambda first, last: [factors.take(*part) for part in told[first:last]], len(told))
    factors.finish()
    factors.bind(new, written=True)
    factors.ready()
    check(factors, layout, new)


def test_factors_that_were_written_are_kept_for_one_use_and_others_made_anew():
    layout, theta, factors = made()
    factors.ready()
    check(factors, layout, theta)

    def written():
        factors.begin(theta)
        factors.finish()
        forget(factors)  # so that one sees who makes them again

    def anew():
        factors.ready()
        return not all((weight.factor == 0xFFFFFFFF).all() for weight in factors.weights.values())

    written()
    factors.bind(theta, written=True)
    assert not anew()
    assert anew()  # somebody may have changed theta since
    written()
    factors.bind(theta)
    assert anew()
    written()
    factors.bind(theta)
    factors.bind(theta, written=True)
    assert not anew()
    forget(factors)
    factors.begin(theta)  # and never finished
    factors.bind(theta, written=True)
    assert anew()
    check(factors, layout, theta)


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("kind", ["untied", "tied", "one-hot"])
@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_steps_with_factors_by_the_optimiser_are_those_with_new_ones_to_the_bit(kind, threads, optimizer, monkeypatch):
    monkeypatch.setattr(optim, "BLOCK", 3000)  # more than a pair of panels, and no multiple of it
    taken = []
    monkeypatch.setattr(Factors, "_make", lambda self, *span, make=Factors._make: (taken.append(span), make(self, *span)))
    layout = made(kind)[0]
    (tokens, targets, _), results = text(), []
    h, c = states(layout.config).astype(np.float32)
    for written in (True, False):
        theta = np.zeros(layout.size, np.float32)
        layout.load(theta, 0, weights(layout.parameters) / 4)
        config = TrainConfig(optimizer=optimizer, momentum=0.0, clip=1.0)
        model = LanguageModel(layout, T, B, theta=theta, bf16=True, team=Team(threads))
        step = optim.make_optimizer(config, layout.table, model.operands.team)
        moments = lambda: [np.zeros_like(theta) for _ in range(step.moments)]
        state, spare = (State(vector, moments(), h, c, np.zeros(B)) for vector in (theta, np.zeros_like(theta)))
        for number in range(4):
            _, gradient = run(model, tokens, targets, h, c, 0.1)
            if number == 2:
                gradient[5] = np.nan  # a step that is left out
            parts = [(start, gradient[start : start + 4321]) for start in range(0, layout.size, 4321)]
            step.step(state, Gradient(parts), 0.05, spare, model.factors if written else None)
            pairs = len(model.factors.edges) - 1
            assert not written or number == 2 or 0 < len(taken) < pairs  # by blocks, of several pairs, and the rest
            taken.clear()
            state, spare = spare, state
            model.bind(state.theta, written=written)
        results.append((state.theta.tobytes(), model.forward(Batch(tokens, targets), h.copy(), c.copy()).tobytes()))
    assert results[0] == results[1]
    assert np.isfinite(state.theta).all()
