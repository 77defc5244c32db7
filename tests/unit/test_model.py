"""The language model as a whole: what `backward` announces, gradients against central differences, the Taylor test, other
precisions and numbers of threads, padding, and lanes that are split or carried on.
"""

import numpy as np
import pytest
from helpers.numerics import EVERY_KIND, KINDS, B, T, V, build, configured, reference, run, states, text

from dllm.comm.averaging import Gradient
from dllm.config import TrainConfig
from dllm.kernels import lstm, processor
from dllm.kernels.team import Team
from dllm.model.batch import Batch
from dllm.model.language_model import LanguageModel
from dllm.model.layout import Layout
from dllm.runs.state import State
from dllm.training import optim


def standard(model, vector):
    """The standard vector of a flat one."""
    return model.layout.export(vector, 0, model.layout.parameters)


def relative(found, expected):
    return np.linalg.norm(found - expected) / np.linalg.norm(expected)


# announcements


@EVERY_KIND
def test_slices_are_announced_in_order_and_are_final_then(kind):
    model, announced = build(configured(kind, dropout=0.3)), []
    tokens, targets, _ = text()
    keep = lambda part: announced.append((part, model.gradient[part].copy()))
    mask = (1, 2, np.arange(B))
    _, gradient = run(model, tokens, targets, *states(model.config), mask=mask, on_ready=keep)
    edges = [(part.start, part.stop) for part, _ in announced]
    assert [start for start, _ in edges] == [0, *(stop for _, stop in edges)][:-1]
    assert edges[-1][1] == gradient.size
    assert len(edges) >= 1 + model.config.layers  # layers leave one by one
    for part, copy in announced:
        np.testing.assert_array_equal(copy, gradient[part])
    assert np.isfinite(gradient).all()


def test_between_is_called_in_every_layer_of_the_backward_and_time_step_where_these_are_long(monkeypatch):
    model, calls = build(configured("three layers")), []
    monkeypatch.setattr(lstm, "STRIDE", 1)
    tokens, targets, _ = text()
    run(model, tokens, targets, *states(model.config), between=lambda: calls.append(1))
    assert len(calls) >= 3 * T


# differences


@EVERY_KIND
def test_gradient_by_central_differences_with_dropout_on(kind):
    model = build(configured(kind, dropout=0.3))
    (tokens, targets, rng), (h, c), mask = text(), states(model.config), (7, 3, np.arange(B) + 5)
    targets[-1, 0] = -1
    theta, scale = standard(model, model.theta), 0.1
    loss = lambda: scale * model.forward(Batch(tokens, targets), h.copy(), c.copy(), mask=mask).sum()
    gradient = standard(model, run(model, tokens, targets, h, c, scale, mask)[1])
    for name, tensor in {"all": slice(0, theta.size), **model.layout.tensors}.items():
        part = slice(tensor.start, tensor.stop)
        direction = rng.standard_normal(part.stop - part.start)
        values = []
        for sign in (1, -1):
            model.layout.load(model.theta, 0, theta)
            model.layout.load(model.theta, part.start, theta[part] + sign * 1e-5 * direction)
            values.append(loss())
        expected = gradient[part] @ direction
        assert (values[0] - values[1]) / 2e-5 == pytest.approx(expected, rel=1e-6), name


@pytest.mark.parametrize("kind", ["untied", "tied", "one-hot"])
def test_taylor_remainder_falls_with_slope_two(kind):
    model = build(configured(kind, dropout=0.2))
    (tokens, targets, rng), (h, c), mask = text(), states(model.config), (7, 3, np.arange(B))
    losses, gradient = run(model, tokens, targets, h, c, 0.1, mask)
    theta, gradient = standard(model, model.theta), standard(model, gradient)
    direction = rng.standard_normal(theta.size)
    steps = 1e-3 * 0.5 ** np.arange(5)
    remainders = []
    for step in steps:
        model.layout.load(model.theta, 0, theta + step * direction)
        ahead = model.forward(Batch(tokens, targets), h.copy(), c.copy(), mask=mask).sum()
        remainders.append(abs(0.1 * (ahead - losses.sum()) - step * (gradient @ direction)))
    slopes = np.diff(np.log(remainders)) / np.diff(np.log(steps))
    assert (abs(slopes - 2) < 0.05).all(), slopes


def test_float32_model_follows_the_float64_one():
    config = configured("two biases, tied, three layers", dropout=0.3)
    wide, narrow = build(config), build(config, dtype=np.float32)
    wide.layout.load(wide.theta, 0, standard(narrow, narrow.theta).astype(np.float64))
    tokens, targets, _ = text()
    h, c = states(config)
    mask = (1, 2, np.arange(B))
    losses, gradient = run(wide, tokens, targets, h, c, 0.1, mask)
    losses32, gradient32 = run(narrow, tokens, targets, h.astype(np.float32), c.astype(np.float32), 0.1, mask)
    assert losses32.dtype == gradient32.dtype == np.float32
    assert relative(losses32, losses) <= 1e-6
    assert relative(standard(narrow, gradient32), standard(wide, gradient)) <= 1e-5


@pytest.mark.skipif(not processor.BF16, reason="this processor has no bfloat16 instructions")
@pytest.mark.slow  # compiles all of a model's kernels for it
@EVERY_KIND
def test_bfloat16_model_follows_the_float32_one(kind):
    changes = {"hidden": 40, "dropout": 0.3} | ({"embedding": 40} if KINDS[kind].get("tied") else {})
    config = configured(kind, **changes)
    lanes = 7
    tokens, targets, _ = text(lanes=lanes)
    h, c = states(config, lanes).astype(np.float32)
    plain = build(config, dtype=np.float32, lanes=lanes)
    short = LanguageModel(plain.layout, T, lanes, theta=plain.theta, bf16=True)
    mask = (1, 2, np.arange(lanes))
    losses, gradient = run(plain, tokens, targets, h, c, 0.1, mask)
    rounded_losses, rounded = run(short, tokens, targets, h, c, 0.1, mask)
    assert 1e-6 < relative(rounded_losses, losses) <= 1e-2
    assert 1e-6 < relative(rounded, gradient) <= 2e-2


@pytest.mark.parametrize("precision", ["fp32", "fp64", *(["bf16"] if processor.BF16 else [])])
@pytest.mark.parametrize("kind", ["untied", "tied", "one-hot"])
def test_any_number_of_threads_gives_the_same_bits(kind, precision):
    config = configured(kind, **{"hidden": 70, "dropout": 0.3} | ({"embedding": 70} if kind == "tied" else {}))
    dtype, results = np.float64 if precision == "fp64" else np.float32, []
    tokens, targets, _ = text(lanes=9, width=9)
    for threads in (1, 2, 3, 7):
        layout = Layout(config, V, dtype)
        theta = np.zeros(layout.size, dtype)
        model = LanguageModel(layout, 9, 9, theta=theta, bf16=precision == "bf16", team=Team(threads))
        model.initialise(1)
        h, c = states(config, 9).astype(dtype)
        losses, gradient = run(model, tokens, targets, h, c, 0.1, (1, 2, np.arange(9)))
        optimizer = optim.make_optimizer(TrainConfig(optimizer="adam", clip=0.1), layout.table, model.operands.team)
        state = State(theta, [np.zeros_like(theta), np.zeros_like(theta)], h, c, np.zeros(9))
        norm = optimizer.step(state, Gradient([(0, gradient)]), 0.1)
        results.append((losses.tobytes(), gradient.tobytes(), theta.tobytes(), norm))
    assert len(set(results)) == 1


# padding, shorter windows, lanes


@EVERY_KIND
def test_all_padding_has_no_loss_and_no_gradient(kind):
    model = build(configured(kind))
    tokens, targets, _ = text()
    losses, gradient = run(model, tokens, np.full_like(targets, -1), *states(model.config))
    assert not losses.any()
    assert not gradient.any()


@EVERY_KIND
def test_padding_at_the_end_equals_a_shorter_window(kind):
    model = build(configured(kind, dropout=0.3))
    (tokens, targets, _), (h, c), mask = text(), states(model.config), (1, 2, np.arange(B))
    padded = targets.copy()
    padded[4:] = -1
    losses, gradient = run(model, tokens, padded, h, c, 0.1, mask)
    short_losses, short = run(model, tokens[:4], targets[:4], h, c, 0.1, mask)
    np.testing.assert_allclose(losses[:4], short_losses, rtol=1e-12)
    assert relative(gradient, short) <= 1e-12


@EVERY_KIND
def test_lanes_split_over_two_models_add_up_to_one(kind):
    config = configured(kind, dropout=0.3)
    tokens, targets, _ = text(lanes=5)
    lanes, (h, c) = np.arange(5) + 40, states(config, 5)
    losses, gradient = run(build(config, lanes=5), tokens, targets, h, c, 0.1, (1, 2, lanes))
    parts = []
    for part in (slice(0, 2), slice(2, 5)):
        model = build(config, lanes=part.stop - part.start)
        own = [np.ascontiguousarray(array[:, part]) for array in (tokens, targets, h, c)]
        parts.append(run(model, *own, 0.1, (1, 2, lanes[part])))
    assert relative(np.concatenate([part for part, _ in parts], axis=1), losses) <= 1e-12
    assert relative(parts[0][1] + parts[1][1], gradient) <= 1e-12


def test_dropout_changes_the_losses_and_no_mask_means_none():
    tokens, targets, _ = text()
    dropped, plain = build(configured(dropout=0.3)), build(configured())
    h, c = states(plain.config)
    without = plain.forward(Batch(tokens, targets), h.copy(), c.copy()).copy()
    np.testing.assert_array_equal(dropped.forward(Batch(tokens, targets), h.copy(), c.copy()), without)
    masks = [(1, 2, np.arange(B)), (1, 3, np.arange(B)), (2, 2, np.arange(B)), (1, 2, np.arange(B) + 1)]
    all_losses = [dropped.forward(Batch(tokens, targets), h.copy(), c.copy(), mask=mask).copy() for mask in masks]
    assert len({losses.tobytes() for losses in [without, *all_losses]}) == 5


# forward alone


@EVERY_KIND
@pytest.mark.parametrize("training", [True, False])
def test_two_windows_carried_on_equal_one_long_window(kind, training):
    config = configured(kind)
    tokens, targets, _ = text(width=2 * T)
    h, c = states(config)
    whole = build(config, window=2 * T, training=training).forward(Batch(tokens, targets), h.copy(), c.copy())
    model = build(config, training=training)
    halves = [model.forward(Batch(tokens[part], targets[part]), h, c).copy() for part in (slice(0, T), slice(T, None))]
    assert relative(np.concatenate(halves), whole) <= 1e-13


@EVERY_KIND
def test_losses_do_not_depend_on_training(kind):
    config = configured(kind, dropout=0.3)
    (tokens, targets, _), (h, c) = text(), states(config)
    after, losses = [], []
    for training in (True, False):
        state = h.copy(), c.copy()
        losses.append(build(config, training=training).forward(Batch(tokens, targets), *state))
        after.append(state)
    np.testing.assert_array_equal(*losses)
    np.testing.assert_array_equal(*after)


@EVERY_KIND
@pytest.mark.parametrize("lanes", [1, 3])
def test_losses_and_states_are_those_of_the_equations(kind, lanes):
    config = configured(kind)
    (tokens, targets, _), (h, c) = text(lanes=lanes), states(config, lanes)
    model = build(config, lanes=lanes, training=False)
    logits, last_h, last_c = reference(model, tokens, h, c)
    chosen = np.take_along_axis(logits, targets[..., None], axis=2)[..., 0]
    np.testing.assert_allclose(
        model.forward(Batch(tokens, targets), h, c), np.log(np.exp(logits).sum(axis=2)) - chosen, rtol=1e-12
    )
    np.testing.assert_allclose([h, c], [last_h, last_c], rtol=1e-12, atol=1e-14)


@EVERY_KIND
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_the_losses_of_a_lane_do_not_depend_on_those_beside_it_to_the_bit(kind, dtype):
    """With weights so large that some tokens need their largest logit taken off, and some do not."""
    model = build(configured(kind), lanes=9, dtype=dtype, training=False)
    model.theta *= 60
    tokens, targets, rng = text(lanes=9)
    h, c = states(model.config, 9).astype(dtype)
    losses = model.forward(Batch(tokens, targets), h.copy(), c.copy()).copy()
    assert np.isfinite(losses).all()
    for _ in range(20):
        some = rng.permutation(9)[: rng.integers(1, 10)]
        here, there, *states_there = (np.ascontiguousarray(array[:, some]) for array in (tokens, targets, h, c))
        np.testing.assert_array_equal(model.forward(Batch(here, there), *states_there), losses[:, some])
