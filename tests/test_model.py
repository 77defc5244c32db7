"""The language model as a whole: what `backward` announces, losses and gradients against PyTorch's nn.LSTM and against
central differences, the Taylor test, padding, and lanes that are split or carried on.
"""

import numpy as np
import pytest
from numerics import EVERY_KIND, KINDS, configured

from dllm import optim
from dllm.config import TrainConfig
from dllm.kernels import lstm, tiles
from dllm.kernels.team import Team
from dllm.layout import Layout
from dllm.model import LanguageModel
from dllm.state import State

V, T, B = 11, 6, 3


def build(config, seed=1, lanes=B, window=T, dtype=np.float64, training=True):
    layout = Layout(config, V, dtype)
    theta = np.zeros(layout.size, dtype)
    layout.load(theta, 0, np.random.default_rng(seed).uniform(-0.6, 0.6, layout.parameters).astype(dtype))
    return LanguageModel(config, V, dtype, window, lanes, theta, training)


def standard(model, vector):
    """The standard vector of a flat one."""
    return model.layout.export(vector, 0, model.layout.parameters)


def tensors(model, vector):
    """name -> tensor of a flat vector."""
    return {name: model.layout.read(vector, name) for name in model.layout.tensors}


def text(seed=2, width=T, lanes=B):
    """Tokens and targets (T,B), and the generator that made them."""
    rng = np.random.default_rng(seed)
    return rng.integers(0, V, (width, lanes)), rng.integers(0, V, (width, lanes)), rng


def states(config, lanes=B, seed=3):
    return 0.5 * np.random.default_rng(seed).standard_normal((2, config.layers, lanes, config.hidden))


def run(model, tokens, targets, h, c, scale=1.0, mask=None, **callbacks):
    """Losses and gradient as the training step gets them; h and c stay as they are."""
    model.gradient[:] = np.nan  # whatever is there must be overwritten ...
    if model.layout.table is not None:
        model.gradient[model.layout.table.start :] = 0  # ... but for rows of the embedding, which the caller zeroes
    losses = model.forward(tokens, targets, h.copy(), c.copy(), scale, mask).copy()
    model.backward(**callbacks)
    return losses, model.gradient.copy()


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


# PyTorch


def torch_model(torch, config, tensors):
    """nn.Embedding, nn.LSTM and nn.Linear with our tensors. Returns forward(tokens, state) and gradients() by name."""
    one_hot = config.embedding == 0
    lstm = torch.nn.LSTM(V if one_hot else config.embedding, config.hidden, config.layers, dtype=torch.float64)
    output = torch.nn.Linear(config.hidden, V, dtype=torch.float64)
    embedding = None if one_hot else torch.nn.Embedding(V, config.embedding, dtype=torch.float64)
    if config.tied:
        output.weight = embedding.weight
    places = {"output.bias": (output.bias, False)}
    if not config.tied:
        places["output.weight"] = output.weight, False
    places["embedding.weight"] = (lstm.weight_ih_l0, True) if one_hot else (embedding.weight, False)
    for layer in range(config.layers):
        places[f"lstm.{layer}.weight_h"] = getattr(lstm, f"weight_hh_l{layer}"), True
        if layer or not one_hot:
            places[f"lstm.{layer}.weight_x"] = getattr(lstm, f"weight_ih_l{layer}"), True
    with torch.no_grad():
        for name, (parameter, transposed) in places.items():
            parameter.copy_(torch.tensor(tensors[name].T if transposed else tensors[name]))
        for layer in range(config.layers):
            bias = tensors[f"lstm.{layer}.bias"]
            getattr(lstm, f"bias_ih_l{layer}").copy_(torch.tensor(bias[0]))
            getattr(lstm, f"bias_hh_l{layer}").copy_(torch.tensor(bias[1] if config.biases == 2 else 0 * bias[0]))

    def forward(tokens, state):
        x = torch.nn.functional.one_hot(tokens, V).double() if one_hot else embedding(tokens)
        y, state = lstm(x, state)
        return output(y), state

    def gradients():
        found = {name: parameter.grad.numpy() for name, (parameter, _) in places.items()}
        found = {name: gradient.T if places[name][1] else gradient for name, gradient in found.items()}
        for layer in range(config.layers):
            pair = [getattr(lstm, f"bias_{kind}_l{layer}").grad.numpy() for kind in ("ih", "hh")]
            found[f"lstm.{layer}.bias"] = np.stack(pair[: config.biases])
        return found

    return forward, gradients


@pytest.mark.parametrize("biases", [1, 2])
@EVERY_KIND
def test_losses_and_all_gradients_equal_pytorchs_in_a_window_that_carries_state(kind, biases):
    torch = pytest.importorskip("torch")
    config = configured(kind, biases=biases)
    model = build(config)
    h, c = states(config)
    (first, targets, rng), (second, second_targets, _) = text(4), text(5)
    second_targets[rng.random((T, B)) < 0.2] = -1
    forward, gradients = torch_model(torch, config, tensors(model, model.theta))
    state = forward(torch.tensor(first), (torch.tensor(h), torch.tensor(c)))[1]
    logits, state = forward(torch.tensor(second), tuple(part.detach() for part in state))
    flat = logits.reshape(-1, V), torch.tensor(second_targets).reshape(-1)
    losses = torch.nn.functional.cross_entropy(*flat, ignore_index=-1, reduction="none")
    (losses.sum() * 0.1).backward()

    model.forward(first, targets, h, c)  # h and c are carried on
    ours, gradient = run(model, second, second_targets, h, c, scale=0.1)
    assert relative(ours.reshape(-1), losses.detach().numpy()) <= 1e-12
    found, expected = tensors(model, gradient), gradients()
    assert found.keys() == expected.keys()
    for name in found:
        assert relative(found[name], expected[name]) <= 1e-9, name
    model.forward(second, second_targets, h, c)
    assert relative(h, state[0].detach().numpy()) <= 1e-12
    assert relative(c, state[1].detach().numpy()) <= 1e-12


# differences


@EVERY_KIND
def test_gradient_by_central_differences_with_dropout_on(kind):
    model = build(configured(kind, dropout=0.3))
    (tokens, targets, rng), (h, c), mask = text(), states(model.config), (7, 3, np.arange(B) + 5)
    targets[-1, 0] = -1
    theta, scale = standard(model, model.theta), 0.1
    loss = lambda: scale * model.forward(tokens, targets, h.copy(), c.copy(), mask=mask).sum()
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
        ahead = model.forward(tokens, targets, h.copy(), c.copy(), mask=mask).sum()
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


@pytest.mark.skipif(not tiles.BF16, reason="this processor has no bfloat16 instructions")
@EVERY_KIND
def test_bfloat16_model_follows_the_float32_one(kind):
    changes = {"hidden": 40, "dropout": 0.3} | ({"embedding": 40} if KINDS[kind].get("tied") else {})
    config = configured(kind, **changes)
    lanes = 7
    tokens, targets, _ = text(lanes=lanes)
    h, c = states(config, lanes).astype(np.float32)
    plain = build(config, dtype=np.float32, lanes=lanes)
    short = LanguageModel(config, V, np.float32, T, lanes, plain.theta, bf16=True)
    mask = (1, 2, np.arange(lanes))
    losses, gradient = run(plain, tokens, targets, h, c, 0.1, mask)
    rounded_losses, rounded = run(short, tokens, targets, h, c, 0.1, mask)
    assert 1e-6 < relative(rounded_losses, losses) <= 1e-2
    assert 1e-6 < relative(rounded, gradient) <= 2e-2


@pytest.mark.parametrize("precision", ["fp32", "fp64", *(["bf16"] if tiles.BF16 else [])])
@pytest.mark.parametrize("kind", ["untied", "tied", "one-hot"])
def test_any_number_of_threads_gives_the_same_bits(kind, precision):
    config = configured(kind, **{"hidden": 70, "dropout": 0.3} | ({"embedding": 70} if kind == "tied" else {}))
    dtype, results = np.float64 if precision == "fp64" else np.float32, []
    tokens, targets, _ = text(lanes=9, width=9)
    for threads in (1, 2, 3, 7):
        layout = Layout(config, V, dtype)
        theta = np.zeros(layout.size, dtype)
        shape = config, V, dtype, 9, 9
        model = LanguageModel(*shape, theta, bf16=precision == "bf16", team=Team(threads))
        model.initialise(1)
        h, c = states(config, 9).astype(dtype)
        losses, gradient = run(model, tokens, targets, h, c, 0.1, (1, 2, np.arange(9)))
        optimizer = optim.make(TrainConfig(optimizer="adam", clip=0.1), layout.table, model.operands.team)
        state = State(theta, [np.zeros_like(theta), np.zeros_like(theta)], h, c, np.zeros(9))
        norm = optimizer.step(state, [(0, gradient)], None, 0.1)
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
    without = plain.forward(tokens, targets, h.copy(), c.copy()).copy()
    np.testing.assert_array_equal(dropped.forward(tokens, targets, h.copy(), c.copy()), without)
    masks = [(1, 2, np.arange(B)), (1, 3, np.arange(B)), (2, 2, np.arange(B)), (1, 2, np.arange(B) + 1)]
    all_losses = [dropped.forward(tokens, targets, h.copy(), c.copy(), mask=mask).copy() for mask in masks]
    assert len({losses.tobytes() for losses in [without, *all_losses]}) == 5


# forward alone


@EVERY_KIND
@pytest.mark.parametrize("training", [True, False])
def test_two_windows_carried_on_equal_one_long_window(kind, training):
    config = configured(kind)
    tokens, targets, _ = text(width=2 * T)
    h, c = states(config)
    whole = build(config, window=2 * T, training=training).forward(tokens, targets, h.copy(), c.copy())
    model = build(config, training=training)
    halves = [model.forward(tokens[part], targets[part], h, c).copy() for part in (slice(0, T), slice(T, None))]
    assert relative(np.concatenate(halves), whole) <= 1e-13


@EVERY_KIND
def test_losses_do_not_depend_on_training(kind):
    config = configured(kind, dropout=0.3)
    (tokens, targets, _), (h, c) = text(), states(config)
    after, losses = [], []
    for training in (True, False):
        state = h.copy(), c.copy()
        losses.append(build(config, training=training).forward(tokens, targets, *state))
        after.append(state)
    np.testing.assert_array_equal(*losses)
    np.testing.assert_array_equal(*after)


@EVERY_KIND
@pytest.mark.parametrize("B", [1, 3])
def test_logits_are_those_of_the_losses(kind, B):
    config = configured(kind)
    (tokens, targets, _), (h, c) = text(lanes=B), states(config, B)
    losses = build(config, lanes=B).forward(tokens, targets, h.copy(), c.copy())
    model = build(config, lanes=B, training=False)
    for width in range(1, T + 1):
        state = h.copy(), c.copy()
        logits = model.logits(tokens[:width], *state)
        expected = np.log(np.exp(logits).sum(axis=1)) - logits[np.arange(B), targets[width - 1]]
        np.testing.assert_allclose(losses[width - 1], expected, rtol=1e-12)
    for step in range(T):  # a token at a time, the state carried
        logits = model.logits(tokens[step : step + 1], h, c)
    expected = np.log(np.exp(logits).sum(axis=1)) - logits[np.arange(B), targets[-1]]
    np.testing.assert_allclose(losses[-1], expected, rtol=1e-12)
