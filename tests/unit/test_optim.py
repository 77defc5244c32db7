"""Optimisers on a whole gradient: clipping, rows of the embedding, PyTorch's steps through the configuration,
learning-rate schedules, and ten golden losses of a tiny training run.
"""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dllm.comm.averaging import Gradient
from dllm.config import ModelConfig, TrainConfig
from dllm.model.batch import Batch
from dllm.model.language_model import LanguageModel
from dllm.model.layout import Extent, Layout
from dllm.runs.state import State
from dllm.training import optim

TABLE = Extent(10, 50, (8, 5))  # a vector of fifty whose last forty are an embedding
OPTIMIZERS = pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw", "rmsprop"])


def in_parts(gradient):
    """The dense part in two, and the table."""
    return [(0, gradient[:4]), (4, gradient[4:10]), (10, gradient[10:])]


def made(**settings):
    """An optimiser, a state and a gradient."""
    rng = np.random.default_rng(1)
    optimizer = optim.make_optimizer(TrainConfig(**settings), TABLE)
    moments = [np.zeros(50) for _ in range(optimizer.moments)]
    return optimizer, State(rng.standard_normal(50), moments, *np.zeros((3, 0))), rng.standard_normal(50)


# clipping


def test_clip_by_norm_shortens_the_step_to_the_bound():
    optimizer, state, gradient = made(optimizer="sgd", clip=0.5)
    before, original = state.theta.copy(), gradient.copy()
    norm = optimizer.step(state, Gradient([(0, gradient)]), 1.0)
    assert norm == pytest.approx(np.linalg.norm(original), rel=1e-14)  # what it was before
    np.testing.assert_allclose(before - state.theta, 0.5 * original / norm, rtol=1e-12)
    np.testing.assert_array_equal(gradient, original)


def test_clip_by_norm_leaves_a_short_gradient_alone():
    optimizer, state, gradient = made(optimizer="sgd", clip=100.0)
    before = state.theta.copy()
    optimizer.step(state, Gradient([(0, gradient)]), 1.0)
    np.testing.assert_array_equal(before - gradient, state.theta)


def test_clip_by_value_bounds_every_element():
    optimizer, state, gradient = made(optimizer="sgd", clip=0.5, clip_by="value")
    before = state.theta.copy()
    norm = optimizer.step(state, Gradient([(0, gradient)]), 1.0)
    assert norm == pytest.approx(np.linalg.norm(gradient), rel=1e-14)
    np.testing.assert_array_equal(state.theta, before - np.clip(gradient, -0.5, 0.5))
    assert (abs(gradient) > 0.5).any()


@OPTIMIZERS
@pytest.mark.parametrize("clip_by", ["norm", "value"])
def test_no_clip_and_a_clip_out_of_reach_are_the_same(optimizer, clip_by):
    paths = []
    for clip in (0.0, 1e6):
        made_optimizer, state, gradient = made(optimizer=optimizer, clip=clip, clip_by=clip_by)
        made_optimizer.step(state, Gradient([(0, gradient)]), 0.1)
        paths.append(state.theta)
    np.testing.assert_array_equal(*paths)


def test_a_gradient_that_is_not_a_number_is_seen_in_the_norm():
    for place in (0, 49):
        optimizer, state, gradient = made(optimizer="sgd", clip=1.0)
        gradient[place] = np.nan
        assert np.isnan(optimizer.step(state, Gradient(in_parts(gradient), np.array([7])), 0.1))


# rows of the embedding

ROWS = np.array([1, 2, 6])
SETTINGS = [
    {"optimizer": "sgd"},
    {"optimizer": "sgd", "momentum": 0.9},
    {"optimizer": "sgd", "momentum": 0.9, "nesterov": True},
    {"optimizer": "sgd", "weight_decay": 0.1},
    {"optimizer": "adam"},
]


@pytest.mark.parametrize("clip", [{}, {"clip": 0.5}, {"clip": 0.5, "clip_by": "value"}])
@pytest.mark.parametrize("settings", SETTINGS)
def test_naming_the_rows_in_use_changes_nothing(settings, clip):
    thetas, norms = [], []
    for named in (False, True):
        optimizer, state, _ = made(**settings, **clip)
        rng = np.random.default_rng(2)
        for step in range(4):
            rows = ROWS if step % 2 == 0 else ROWS - 1  # rows that rest still feel momentum and decay
            gradient = np.zeros(50)
            gradient[:10] = rng.standard_normal(10)
            gradient[10:].reshape(8, 5)[rows] = rng.standard_normal((3, 5))
            norms.append(optimizer.step(state, Gradient(in_parts(gradient), rows if named else None), 0.1))
            state.step += 1
        thetas.append(state.theta)
    np.testing.assert_allclose(thetas[1], thetas[0], rtol=1e-14)
    np.testing.assert_allclose(norms[4:], norms[:4], rtol=1e-14)


def test_plain_sgd_reads_no_other_row_than_those_named():
    optimizer, state, gradient = made(optimizer="sgd")
    table = gradient[10:].reshape(8, 5)
    table[np.setdiff1d(np.arange(8), ROWS)] = np.nan
    before = state.theta.copy()
    assert np.isfinite(optimizer.step(state, Gradient(in_parts(gradient), ROWS), 1.0))
    change = (before - state.theta)[10:].reshape(8, 5)
    np.testing.assert_allclose(change[ROWS], table[ROWS], rtol=1e-12)
    assert not change[np.setdiff1d(np.arange(8), ROWS)].any()


# what the configuration names

TORCH = {
    "sgd": ("SGD", {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1}),
    "adam": ("Adam", {"beta1": 0.8, "beta2": 0.95, "epsilon": 1e-6, "weight_decay": 0.1}),
    "adamw": ("AdamW", {"beta1": 0.8, "beta2": 0.95, "epsilon": 1e-6, "weight_decay": 0.1}),
    "rmsprop": ("RMSprop", {"alpha": 0.9, "epsilon": 1e-6, "weight_decay": 0.1}),
}


@OPTIMIZERS
def test_a_configured_optimizer_takes_pytorchs_steps(optimizer):
    torch = pytest.importorskip("torch")
    kind, settings = TORCH[optimizer]
    options = {key.replace("epsilon", "eps"): value for key, value in settings.items()}
    if "beta1" in options:
        options["betas"] = options.pop("beta1"), options.pop("beta2")
    ours, state, _ = made(optimizer=optimizer, **settings)
    theirs = torch.nn.Parameter(torch.tensor(state.theta))
    stepper = getattr(torch.optim, kind)([theirs], lr=0.05, **options)
    rng = np.random.default_rng(3)
    for _ in range(5):
        gradient = rng.standard_normal(50)
        ours.step(state, Gradient([(0, gradient)]), 0.05)
        state.step += 1
        theirs.grad = torch.tensor(gradient)
        stepper.step()
    np.testing.assert_allclose(state.theta, theirs.detach().numpy(), rtol=1e-12, atol=1e-13)


# schedules


def rates(steps, total=None, epoch=0, factor=1.0, **settings):
    config = TrainConfig(lr=0.5, **settings)
    return [optim.learning_rate(config, step, epoch, factor, total or steps) for step in range(steps)]


def test_constant_is_constant():
    assert rates(5) == [0.5] * 5


@pytest.mark.parametrize("schedule", ["constant", "cosine", "epochs", "plateau"])
def test_warmup_rises_linearly_before_any_schedule(schedule):
    found = rates(20, warmup=4, schedule=schedule, decay=2.0, decay_after=1)
    np.testing.assert_allclose(found[:4], [0.125, 0.25, 0.375, 0.5])
    assert found[4] == 0.5


def test_cosine_goes_from_lr_to_min_lr_and_stays_there():
    found = rates(130, total=110, schedule="cosine", warmup=10, min_lr=0.1)
    assert found[10] == 0.5
    assert found[60] == pytest.approx(0.3)  # half way
    assert found[35] == pytest.approx(0.1 + 0.4 * (1 + 0.5**0.5) / 2)  # a quarter
    assert found[110:] == [pytest.approx(0.1)] * 20
    assert (np.diff(found[10:111]) < 0).all()


def test_cosine_of_nothing_but_warmup_does_not_divide_by_zero():
    assert rates(12, total=10, schedule="cosine", warmup=10)[10:] == [0.5, 0.0]


@pytest.mark.parametrize(("decay_after", "expected"), [(0, [0.5, 0.25, 0.125, 0.0625]), (1, [1, 0.5, 0.25, 0.125])])
def test_epochs_divides_after_each_epoch_beyond_decay_after(decay_after, expected):
    settings = {"schedule": "epochs", "decay": 2.0, "decay_after": decay_after}
    assert [rates(1, epoch=epoch, **settings)[0] / 0.5 for epoch in range(4)] == expected


def test_the_medium_model_of_zaremba_keeps_its_rate_for_six_epochs():
    config = TrainConfig(lr=1.0, schedule="epochs", decay=1.2, decay_after=6)
    found = [optim.learning_rate(config, 0, epoch, 1.0, 1) for epoch in range(39)]
    assert found[:6] == [1.0] * 6
    np.testing.assert_allclose(found[6:], 1.2 ** -np.arange(1.0, 34))


def test_plateau_divides_where_validation_is_no_better():
    config = TrainConfig(lr=0.5, schedule="plateau", decay=4.0)
    factor, best, factors = 1.0, np.inf, []
    for loss in (3.0, 2.0, 2.5, 1.5, 1.5, np.nan):
        factor = optim.stalled(config, factor, loss, best)
        best = min(best, loss)
        factors.append(factor)
    assert factors == [1, 1, 1 / 4, 1 / 4, 1 / 16, 1 / 64]
    assert optim.learning_rate(config, 0, 0, factor, 1) == 0.5 / 64


def test_other_schedules_do_not_mind_a_stall():
    assert optim.stalled(TrainConfig(decay=4.0, schedule="epochs"), 1.0, 3.0, 2.0) == 1.0


# golden losses


def golden_losses():
    """Ten steps of a tiny float64 run: two tied layers, dropout, clipping, Adam, warm-up and cosine."""
    shape = {"embedding": 16, "hidden": 16, "layers": 2, "tied": True, "dropout": 0.1}
    model_config = ModelConfig(**shape, init_output=0.5, forget_bias=1.0)
    train = TrainConfig(optimizer="adam", lr=0.1, schedule="cosine", warmup=2, clip=0.5)
    model = LanguageModel(Layout(model_config, 13, np.float64), 5, 4)
    P = model.layout.size
    optimizer = optim.make_optimizer(train, model.layout.table)
    state = State(np.zeros(P), [np.zeros(P), np.zeros(P)], *np.zeros((2, 2, 4, 16)), np.zeros(4))
    model.bind(state.theta)
    model.initialise(seed=1)
    stream = (np.arange(51)[:, None] + 3 * np.arange(4)) % 13  # (51, 4 lanes): each token is the last plus one
    losses = []
    for step in range(10):
        window = stream[step * 5 : step * 5 + 6]
        tokens, targets = np.ascontiguousarray(window[:-1]), np.ascontiguousarray(window[1:])
        found = model.forward(Batch(tokens, targets), state.h, state.c, 1 / 20, (1, step, np.arange(4)))
        losses.append(found.mean())
        model.backward()
        optimizer.step(state, Gradient([(0, model.gradient)]), optim.learning_rate(train, step, 0, 1.0, 10))
        state.move_on((state.place + 1) % 10, "epoch")
    return losses


# A change of the arithmetic, the initial values or the masks shows here. Where it is meant to be, write them anew with
#   PYTHONPATH=.:tests python -c "import test_optim; print(*test_optim.golden_losses(), sep=',\n')"
GOLDEN = [
    np.float64(2.5676527518696637),
    np.float64(2.6818648203671454),
    np.float64(2.5539790762741834),
    np.float64(2.5274214508078114),
    np.float64(2.3697307986557545),
    np.float64(2.2294136750059703),
    np.float64(1.9411006907318604),
    np.float64(1.6938862339641627),
    np.float64(1.6617874206305394),
    np.float64(1.461170908488528),
]


def test_ten_golden_losses():
    np.testing.assert_allclose(golden_losses(), GOLDEN, rtol=1e-10)


# blocks


@given(
    size=st.integers(0, 5 * optim.BLOCK),
    cuts=st.lists(st.integers(0, 8 * optim.BLOCK), max_size=12),
    first=st.integers(0, 9999),
)
@settings(deadline=None)
def test_blocks_end_at_the_last_edge_that_is_near_enough(size, cuts, first):
    edges, end = np.unique(np.array(cuts, np.int64)), first + size
    at = first
    for start, block in optim._blocks([(first, np.zeros(size, np.int8))], edges):
        stop = start + len(block)
        near = edges[(edges > at) & (edges <= at + optim.BLOCK)]
        assert start == at
        assert stop == (end if at + optim.BLOCK >= end else near[-1] if len(near) else at + optim.BLOCK)
        at = stop
    assert at == end
