"""Copying against its reference, the reference by complex step, and softmax, attention and gate together beside PyTorch."""

import numpy as np
import pytest
from helpers.numerics import CLOSE, DTYPES, check_by_complex_step, check_by_differences, in_panels, out_of_panels, relative
from hypothesis import given, settings
from hypothesis import strategies as st

from dllm.kernels import copying, softmax
from dllm.kernels.operands import Operands


def arrays(T, S, B, V, lengths, dtype=np.float64, seed=1):
    """Attention that adds up to one within its length, tokens, targets some of which are none, losses and a gate's logits."""
    rng = np.random.default_rng(seed)
    A = rng.random((B, T, S)) * (np.arange(S) < np.asarray(lengths)[:, None])[:, None]
    A /= np.maximum(A.sum(axis=2, keepdims=True), 1e-9)
    tokens, targets = rng.integers(0, V, (S, B)), rng.integers(0, V, (T, B))
    targets[rng.random(targets.shape) < 0.2] = -1
    loss, z = 3 * rng.random((T, B)), rng.standard_normal((T, B))
    return A.astype(dtype), tokens, targets, loss.astype(dtype), z.astype(dtype), rng


def mixed(A, tokens, targets, lengths, loss, z, scale=1.0):
    """Losses (T,B), and gradients w, dz (T,B), dA of the kernels, in memory that was no number before."""
    (T, B), lengths, dtype = targets.shape, np.asarray(lengths), A.dtype
    a, da, w, out = (np.full(T * B, np.nan, dtype) for _ in range(4))
    rows = np.flatnonzero(targets >= 0)
    copying.copied(a, A, tokens, targets, lengths)
    gate = in_panels(z.reshape(-1, 1))
    dgate, losses, weights = np.zeros_like(gate), loss.reshape(-1)[rows].copy(), np.full(len(rows), np.nan, dtype)
    copying.mix(losses, weights, dgate, da, a, gate, rows, scale)
    dA = np.full_like(A, np.nan)
    copying.copied_backward(dA, da, tokens, targets, lengths)
    w[:], out[:] = 0, 0
    w[rows], out[rows] = weights, losses
    assert not dgate[..., 1:].any()
    return *(x.reshape(T, B) for x in (out, w, out_of_panels(dgate, 1))), dA


def objective(A, tokens, targets, lengths, loss, z):
    found = copying.mix_reference(loss, copying.copied_reference(A, tokens, targets, lengths), z)
    return found[targets >= 0].sum()


@DTYPES
@settings(deadline=None, max_examples=40)
@given(st.data())
def test_copying_equals_its_reference_for_any_lengths(dtype, data):
    T, S, B, V = (data.draw(st.integers(1, most)) for most in (6, 9, 4, 5))
    lengths = data.draw(st.lists(st.integers(0, S), min_size=B, max_size=B))
    A, tokens, targets, loss, z, _ = arrays(T, S, B, V, lengths, dtype)
    losses, w, dz, dA = mixed(A, tokens, targets, lengths, loss, z, 0.37)
    real, exact = targets >= 0, [x.astype(np.float64) for x in (A, loss, z)]
    a = copying.copied_reference(exact[0], tokens, targets, lengths)
    expected = copying.mix_backward_reference(exact[1], a, exact[2])
    assert relative(losses, copying.mix_reference(exact[1], a, exact[2]) * real) <= CLOSE[dtype]
    assert relative(w, expected[0] * real) <= CLOSE[dtype]
    assert relative(dz, 0.37 * expected[2] * real) <= 10 * CLOSE[dtype]
    there = copying.matches(tokens, targets, lengths)
    assert relative(dA, there * (0.37 * expected[1].T[:, :, None])) <= 10 * CLOSE[dtype]


def test_copying_by_complex_step_and_central_differences():
    lengths = [5, 0, 3]
    A, tokens, targets, loss, z, rng = arrays(4, 5, 3, 4, lengths)
    _, w, dz, dA = mixed(A, tokens, targets, lengths, loss, z)
    inputs, gradients = {"A": A, "loss": loss, "z": z}, {"A": dA, "loss": w, "z": dz}
    check_by_complex_step(lambda **x: objective(tokens=tokens, targets=targets, lengths=lengths, **x), inputs, gradients, rng)
    kernel = lambda **x: mixed(tokens=tokens, targets=targets, lengths=lengths, **x)[0].sum()
    check_by_differences(kernel, inputs, gradients, rng)


@DTYPES
def test_what_neither_the_vocabulary_nor_the_source_has_is_an_infinite_loss_at_worst(dtype):
    lengths, tokens, targets = [1, 1, 1, 1], np.array([[0, 0, 0, 0]]), np.array([[0, 0, 1, 0]])
    A, z = np.array([1, 0, 1, 1], dtype).reshape(4, 1, 1), np.array([[0, 100, -200, np.nan]], dtype)
    loss = np.array([[1000, 1000, 1000, 1]], dtype)
    losses, w, dz, dA = mixed(A, tokens, targets, lengths, loss, z)
    np.testing.assert_allclose(losses[0, :3], [np.log(2), 1000, 1200], rtol=1e-6)
    np.testing.assert_allclose(w[0, :3], [0, 1, 1], atol=1e-30)
    np.testing.assert_allclose(dz[0, :3], [0.5, 0, -1], atol=1e-7)
    assert np.isfinite(dA[:3]).all()
    assert np.isnan(losses[0, 3])


@DTYPES
def test_distributions_add_up_to_one_and_give_targets_what_the_loss_gives_them(dtype):
    S, B, V, N = 6, 3, 7, 5
    source, lengths = np.array([2, 0, 0, 1, 2]), np.array([6, 1, 4])
    A, _, targets, _, z, rng = arrays(1, S, N, V, lengths[source], dtype)
    tokens = rng.integers(0, V, (S, B))
    q = rng.random((N, V)).astype(dtype)
    q /= q.sum(axis=1, keepdims=True)
    P = q.copy()
    copying.mix_distributions(P, A[:, 0].copy(), in_panels(z.reshape(-1, 1)), tokens, source, lengths)
    np.testing.assert_allclose(P.sum(axis=1), 1, rtol=1e-5 if dtype == np.float32 else 1e-12)
    shared = np.ascontiguousarray(tokens[:, source])
    for v in range(V):
        targets[:] = v
        losses = mixed(A, shared, targets, lengths[source], -np.log(q[:, v])[None], z)[0]
        np.testing.assert_allclose(P[:, v], np.exp(-losses[0]), rtol=1e-5 if dtype == np.float32 else 1e-12)


def test_softmax_gate_and_attention_together_equal_pytorchs():
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    (T, S, B, V, H), lengths = (4, 6, 3, 9, 5), np.array([6, 2, 4])
    A, tokens, targets, _, z, rng = arrays(T, S, B, V, lengths)
    y, W = rng.standard_normal((T * B, H)), rng.standard_normal((V, H + 1))
    there = {name: torch.tensor(x, requires_grad=True) for name, x in {"A": A, "z": z, "y": y, "W": W}.items()}
    q = torch.softmax(there["y"] @ there["W"][:, :H].T + there["W"][:, H], dim=1).reshape(T, B, V)
    g = torch.sigmoid(there["z"])[..., None]
    index = torch.tensor(tokens.T)[:, None].expand(B, T, S)
    P = g * q + (1 - g) * torch.zeros(B, T, V, dtype=torch.float64).scatter_add(2, index, there["A"]).transpose(0, 1)
    real = torch.tensor(targets >= 0)
    theirs = -torch.log(P.gather(2, torch.tensor(targets.clip(0))[..., None])[..., 0]) * real
    (0.3 * theirs.sum()).backward()

    rows, N = np.flatnonzero(targets >= 0), int((targets >= 0).sum())
    a, da, gate = np.zeros(T * B), np.zeros(T * B), in_panels(z.reshape(-1, 1))
    dgate, losses, inputs, columns = np.zeros_like(gate), np.zeros(N), in_panels(y[rows]), in_panels(W)
    dy, dW, dA = np.full_like(inputs, np.nan), np.full_like(columns, np.nan), np.full_like(A, np.nan)
    copying.copied(a, A, tokens, targets, lengths)

    def weigh(part, losses):
        weights = np.empty(len(losses))
        copying.mix(losses, weights, dgate, da, a, gate, rows[part], 0.3)
        return weights

    chunk = softmax.Chunk(5, H, V, Operands(np.float64), True)
    softmax.softmax_cross_entropy(losses, dy, dW, chunk, inputs, 0, columns, targets.reshape(-1)[rows], 0.3, weigh=weigh)
    copying.copied_backward(dA, da, tokens, targets, lengths)
    assert relative(losses, theirs.detach().numpy().reshape(-1)[rows]) <= 1e-9
    assert relative(out_of_panels(dy, H), there["y"].grad.numpy()[rows]) <= 1e-9
    assert relative(out_of_panels(dW, H + 1), there["W"].grad.numpy()) <= 1e-9
    assert relative(out_of_panels(dgate, 1).reshape(T, B), there["z"].grad.numpy()) <= 1e-9
    assert relative(dA, there["A"].grad.numpy() * copying.matches(tokens, targets, lengths)) <= 1e-9
