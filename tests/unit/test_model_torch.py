"""Losses, gradients and carried state of every kind of model against those of PyTorch's nn.LSTM."""

import numpy as np
import pytest
from helpers.numerics import EVERY_KIND, B, T, V, build, configured, relative, run, states, tensors, text

from dllm.model.batch import Batch


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

    model.forward(Batch(first, targets), h, c)  # h and c are carried on
    ours, gradient = run(model, second, second_targets, h, c, scale=0.1)
    assert relative(ours.reshape(-1), losses.detach().numpy()) <= 1e-12
    found, expected = tensors(model, gradient), gradients()
    assert found.keys() == expected.keys()
    for name in found:
        assert relative(found[name], expected[name]) <= 1e-9, name
    model.forward(Batch(second, second_targets), h, c)
    assert relative(h, state[0].detach().numpy()) <= 1e-12
    assert relative(c, state[1].detach().numpy()) <= 1e-12
