"""The LSTM kernels against their plain reference, the reference by complex step, the kernels by central differences."""

import numpy as np
import pytest
from helpers.numerics import (
    CLOSE,
    DTYPES,
    SpoiltOperands,
    check_by_complex_step,
    check_by_differences,
    gate_panels,
    in_panels,
    nan_panels,
    out_of_gate_panels,
    out_of_panels,
    padding,
    relative,
    rounded,
)

from dllm.kernels import gemm, lstm, processor
from dllm.kernels.operands import Weight
from dllm.kernels.team import Team

# T, B, D, H
SHAPES = [(1, 1, 1, 1), (1, 3, 2, 5), (7, 1, 3, 2), (5, 2, 1, 3), (4, 3, 11, 7), (3, 5, 13, 17), (5, 31, 3, 19)]
SHAPES += [(3, 4, 16, 16), (2, 15, 33, 40)]


def lstm_arrays(shape, dtype, seed):
    T, B, D, H = shape
    rng = np.random.default_rng(seed)
    sizes = {"x": (T, B, D), "h0": (B, H), "c0": (B, H), "Wx": (D, 4 * H), "Wh": (H, 4 * H), "b": (4 * H,)}
    arrays = {name: rng.standard_normal(size).astype(dtype) for name, size in sizes.items()}
    return arrays, rng.standard_normal((T, B, H)).astype(dtype), rng


def lstm_compiled(x, h0, c0, Wx, Wh, b, dh=None, between=None, ready=False, bf16=False, threads=1, ends=True):
    """Forward, and where dh is given backward, with outputs full of NaN before; ready: with the input product done."""
    (T, B, D), H, dtype = x.shape, h0.shape[1], x.dtype
    operands = SpoiltOperands(dtype, bf16, Team(threads))
    h, c = nan_panels((T + 1) * B, H, dtype), nan_panels((T + 1) * B, H, dtype)
    for state, start in ((h, h0), (c, c0)):
        state[:, :B] = 0
        gemm.to_panels(state, 0, start)
    flat = x.reshape(T * B, D)
    inputs = None if ready else in_panels(flat)
    gates = gate_panels(flat @ Wx) if ready else np.full((4 * len(h), T * B, h.shape[2]), np.nan, dtype)
    weights = [None if ready else Weight(operands, gate_panels(Wx)), Weight(operands, gate_panels(Wh))]
    for weight in filter(None, weights):
        weight.take_all()
    bias = gate_panels(b[None])[:, 0].copy()
    lstm.lstm_forward(h, c, gates, operands, inputs, 0, *weights, bias, T, B)
    whole = lambda state: out_of_panels(state, H).reshape(T + 1, B, H)
    assert not padding(h, H).any()
    assert not padding(c, H).any()
    if dh is None:
        return whole(h), whole(c)
    saved = out_of_gate_panels(gates, H).reshape(T, B, 4 * H)
    nan = lambda array: None if array is None else np.full_like(array, np.nan)
    dWx, dWh = (nan(weight and weight.panels) for weight in weights)
    dx, db = nan(inputs), nan(bias)
    scratch = nan_panels(B, H, dtype), nan_panels(B, H, dtype)
    dh_panels = in_panels(dh.reshape(T * B, H))
    lstm.lstm_backward(dx, dWx, dWh, db, gates, *scratch, operands, dh_panels, inputs, 0, h, c, *weights, T, B, between, ends)
    gradients = {"Wh": out_of_gate_panels(dWh, H), "b": out_of_gate_panels(db[:, None], H)[0]}
    if ends:
        gradients |= {name: out_of_panels(state, H) for name, state in zip(("h0", "c0"), scratch, strict=True)}
    if ready:
        gradients["a"] = out_of_gate_panels(gates, H)
    else:
        gradients |= {"x": out_of_panels(dx, D).reshape(T, B, D), "Wx": out_of_gate_panels(dWx, H)}
        assert not padding(dx, D).any()
    return whole(h), whole(c), saved, gradients


def lstm_reference(x, h0, c0, Wx, Wh, b, dh):
    h, c, gates = lstm.lstm_forward_reference(x, h0, c0, Wx, Wh, b)
    gradients = lstm.lstm_backward_reference(dh, gates, x, h, c, Wx, Wh)
    return h, c, gates, dict(zip(("x", "Wx", "Wh", "b", "h0", "c0"), gradients, strict=True))


@DTYPES
@pytest.mark.parametrize("shape", SHAPES)
def test_lstm_equals_its_reference(dtype, shape):
    arrays, dh, _ = lstm_arrays(shape, dtype, 4)
    found = lstm_compiled(**arrays, dh=dh)
    exact = lstm_reference(**{name: array.astype(np.float64) for name, array in {**arrays, "dh": dh}.items()})
    for ours, theirs in zip(found[:3], exact[:3], strict=True):
        assert relative(ours, theirs) <= CLOSE[dtype]
    for name, gradient in exact[3].items():
        assert relative(found[3][name], gradient) <= CLOSE[dtype], name


@pytest.mark.skipif(not processor.BF16, reason="products of bfloat16 are no faster than float32's here")
@pytest.mark.parametrize("shape", [*SHAPES, (4, 33, 40, 70)])
def test_bfloat16_lstm_follows_its_reference(shape):
    """With inputs, weights and a state that bfloat16 holds the first step rounds no factor; later ones round h, and all da."""
    arrays, dh, _ = lstm_arrays(shape, np.float32, 9)
    arrays = {name: rounded(array) if name in ("x", "h0", "Wx", "Wh") else array for name, array in arrays.items()}
    found = lstm_compiled(**arrays, dh=dh, bf16=True)
    exact = lstm_reference(**{name: array.astype(np.float64) for name, array in {**arrays, "dh": dh}.items()})
    for ours, theirs in zip(found[:3], exact[:3], strict=True):
        assert relative(ours[:2], theirs[:2]) <= (CLOSE[np.float32] if ours is not found[2] else 5e-3)
        assert relative(ours, theirs) <= 5e-3
    for name, gradient in exact[3].items():
        assert relative(found[3][name], gradient) <= 1e-2, name
    assert relative(found[3]["Wh"], exact[3]["Wh"]) > 1e-5  # it is bfloat16
    other = lstm_compiled(**arrays, dh=dh, bf16=True, threads=3)
    for ours, theirs in zip((*found[:3], *found[3].values()), (*other[:3], *other[3].values()), strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("shape", SHAPES)
def test_lstm_reference_by_complex_step(shape):
    arrays, dh, rng = lstm_arrays(shape, np.float64, 5)
    gradients = lstm_reference(**arrays, dh=dh)[3]
    loss = lambda **arrays: (dh * lstm.lstm_forward_reference(**arrays)[0][1:]).sum()
    check_by_complex_step(loss, arrays, gradients, rng)


@pytest.mark.parametrize("shape", SHAPES)
def test_lstm_kernel_by_central_differences(shape):
    arrays, dh, rng = lstm_arrays(shape, np.float64, 6)
    gradients = lstm_compiled(**arrays, dh=dh)[3]
    loss = lambda **arrays: (dh * lstm_compiled(**arrays)[0][1:]).sum()
    check_by_differences(loss, arrays, gradients, rng)


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 100])
def test_lstm_calls_between_after_so_many_steps(monkeypatch, steps):
    (T, B, D, H), calls = (4, 3, 11, 7), []
    arrays, dh, _ = lstm_arrays((T, B, D, H), np.float64, 8)
    whole = lstm_compiled(**arrays, dh=dh)[3]
    monkeypatch.setattr(lstm, "STRIDE", steps * 8 * B * H * H)
    part = lstm_compiled(**arrays, dh=dh, between=lambda: calls.append(1))[3]
    assert len(calls) == -(-T // steps)
    for name, gradient in whole.items():
        np.testing.assert_array_equal(part[name], gradient)


def test_lstm_takes_a_ready_input_product():
    T, B, D, H = 4, 3, 11, 7
    arrays, dh, _ = lstm_arrays((T, B, D, H), np.float64, 7)
    h, _, _, gradients = lstm_compiled(**arrays, dh=dh)
    again, _, _, others = lstm_compiled(**arrays, dh=dh, ready=True)
    np.testing.assert_allclose(again, h, rtol=1e-13)
    assert relative(others["Wh"], gradients["Wh"]) <= 1e-12
    assert relative(arrays["x"].reshape(-1, D).T @ others["a"], gradients["Wx"]) <= 1e-12  # gates became da


def test_the_gradients_of_the_first_state_are_those_of_pytorch_and_change_no_other():
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    arrays, dh, _ = lstm_arrays((4, 3, 11, 7), np.float64, 10)
    found, without = (lstm_compiled(**arrays, dh=dh, ends=ends)[3] for ends in (True, False))
    for name, gradient in without.items():
        np.testing.assert_array_equal(found[name], gradient)
    module = torch.nn.LSTM(11, 7, dtype=torch.float64)
    ours = arrays["Wx"].T, arrays["Wh"].T, arrays["b"], 0 * arrays["b"]
    with torch.no_grad():
        for parameter, array in zip(module.parameters(), ours, strict=True):
            parameter.copy_(torch.tensor(array))
    states = [torch.tensor(arrays[name][None], requires_grad=True) for name in ("h0", "c0")]
    (module(torch.tensor(arrays["x"]), tuple(states))[0] * torch.tensor(dh)).sum().backward()
    for name, state in zip(("h0", "c0"), states, strict=True):
        assert relative(found[name], state.grad[0].numpy()) <= 1e-9
