"""The model of speech: its losses and gradients against PyTorch and differences, for frames of lanes of any length."""

import numpy as np
import pytest

from dllm.config import ModelConfig
from dllm.kernels.team import Team
from dllm.model.batch import Batch
from dllm.model.ctc import Ctc
from dllm.model.kinds import make_model
from dllm.model.layout import Layout

F, LABELS, S, B = 5, 4, 12, 4
NOTHING = np.zeros((0, 0, 0))
SIZES = [
    {"bidirectional": True, "layers": 2, "projection": 8},
    {"bidirectional": False, "layers": 1},
]


def model_of(dtype=np.float64, threads=1, training=True, bf16=False, **sizes):
    config = ModelConfig(kind="ctc", features=F, labels=LABELS, hidden=16, **sizes)
    layout = Layout(config, LABELS, dtype)
    theta = np.zeros(layout.size, dtype)
    model = make_model(layout, S, B, theta=theta, training=training, team=Team(threads), bf16=bf16)
    model.initialise(3)
    model.bind(theta)
    return model


def batch_of(seed=1):
    rng = np.random.default_rng(seed)
    targets = np.full((4, B), -1)
    for lane, text in enumerate(([1, 1, 0, 3], [2], [], [0, 2, 1])):
        targets[: len(text), lane] = text
    return Batch(rng.standard_normal((S, B, F)).astype(np.float32), targets, np.array([12, 7, 0, 4]))


def computed(model, batch=None, scale=0.5):
    losses = model.forward(batch or batch_of(), NOTHING, NOTHING, scale).copy()
    model.backward()
    return losses, model.gradient.copy()


@pytest.mark.parametrize("sizes", SIZES)
def test_the_gradient_is_the_difference_of_losses(sizes):
    model = model_of(**sizes)
    losses, gradient = computed(model)
    assert losses.shape == (4, B)
    assert (losses[1:] == 0).all()
    assert losses[0, 2] == 0
    way, start, step = np.zeros_like(gradient), model.theta.copy(), 1e-5
    for name, extent in model.layout.tensors.items():
        model.layout.write(way, name, np.random.default_rng(extent.start).standard_normal(extent.shape))
    sums = []
    for sign in (1, -1):
        model.theta[:] = start + sign * step * way
        model.bind(model.theta)
        sums.append(0.5 * model.forward(batch_of(), NOTHING, NOTHING, 0.5).sum())
    assert gradient @ way == pytest.approx((sums[0] - sums[1]) / (2 * step), rel=1e-6)


def test_losses_and_gradients_are_those_of_pytorch():
    torch = pytest.importorskip("torch")
    model = model_of(**SIZES[0])
    losses, gradient = computed(model)
    read = lambda name: torch.tensor(model.layout.read(model.theta, name), requires_grad=True)
    weights = {name: read(name) for name in model.layout.tensors}
    batch = batch_of()
    total, each = 0, []
    for lane, length in enumerate(batch.lengths):
        text = batch.targets[:, lane][batch.targets[:, lane] >= 0]
        if not length:
            each.append(0)
            continue
        x = torch.tensor(batch.inputs[:length, lane], dtype=torch.float64)
        for layer in range(2):
            sides = []
            for direction in ("forward", "backward"):
                Wx, Wh, b = (weights[f"encoder.{layer}.{direction}.{one}"] for one in ("weight_x", "weight_h", "bias"))
                h, c, out = torch.zeros(16, dtype=torch.float64), torch.zeros(16, dtype=torch.float64), []
                for step in x if direction == "forward" else x.flip(0):
                    i, f, g, o = (step @ Wx + h @ Wh + b.sum(0)).split(16)
                    c = f.sigmoid() * c + i.sigmoid() * g.tanh()
                    h = o.sigmoid() * c.tanh()
                    out.append(h)
                sides.append(torch.stack(out if direction == "forward" else out[::-1]))
            x = torch.cat(sides, 1)
        z = (x @ weights["projection.weight"]).tanh() @ weights["output.weight"].T + weights["output.bias"]
        loss = torch.nn.functional.ctc_loss(
            z.log_softmax(1)[:, None], torch.tensor(text)[None], torch.tensor([length]), torch.tensor([len(text)]),
            blank=LABELS, reduction="none",
        )  # fmt: skip
        each.append(loss.item())
        total = total + 0.5 * loss.sum()
    total.backward()
    assert np.allclose(losses[0], each, rtol=1e-9)
    for name, weight in weights.items():
        assert np.allclose(model.layout.read(gradient, name), weight.grad.numpy(), rtol=1e-9, atol=1e-12), name


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_threads_change_no_bit(dtype):
    first = computed(model_of(dtype, 1, **SIZES[0]))
    for threads in (2, 3):
        for one, other in zip(first, computed(model_of(dtype, threads, **SIZES[0])), strict=True):
            assert (one == other).all()


def test_bf16_is_close_to_fp32():
    whole, rounded = (computed(model_of(np.float32, bf16=bf16, **SIZES[0])) for bf16 in (False, True))
    assert np.allclose(whole[0], rounded[0], rtol=0.02)
    assert np.linalg.norm(whole[1] - rounded[1]) < 0.05 * np.linalg.norm(whole[1])


def test_lanes_do_not_see_each_other_or_what_is_behind_their_end():
    model, batch = model_of(**SIZES[0]), batch_of()
    losses, gradient = computed(model)
    other = batch.inputs.copy()
    for lane, length in enumerate(batch.lengths):
        other[length:, lane] = 7
    again = computed(model, batch._replace(inputs=other))
    assert np.allclose(losses, again[0], rtol=1e-12)
    assert np.allclose(gradient, again[1], rtol=1e-9, atol=1e-13)
    alone = Batch(batch.inputs[:7, 1:2], batch.targets[:, 1:2], batch.lengths[1:2])
    assert model.forward(alone, NOTHING, NOTHING, 1.0)[0, 0] == pytest.approx(losses[0, 1], rel=1e-12)


def test_a_model_learns_what_is_said_and_writes_it_down():
    """Each label is a frame of its own, 2 to 4 times, with noise between."""
    rng = np.random.default_rng(5)

    def spoken(count):
        inputs, targets, lengths = rng.standard_normal((S, B, F)) * 0.1, np.full((3, B), -1), np.zeros(B, np.int64)
        for lane in range(B):
            for label in rng.integers(0, LABELS, count):
                targets[np.argmax(targets[:, lane] < 0), lane] = label
                steps = rng.integers(2, 4)
                inputs[lengths[lane] : lengths[lane] + steps, lane, label] += 1
                lengths[lane] += steps + 1
        return Batch(inputs.astype(np.float32), targets, lengths)

    model = model_of(np.float64, **SIZES[1])
    moments = np.zeros((2, len(model.theta)))
    for step in range(1, 301):
        losses, gradient = computed(model, spoken(3), 1 / 12)
        moments[0] += 0.1 * (gradient - moments[0])
        moments[1] += 0.01 * (gradient**2 - moments[1])
        model.theta -= 0.02 * moments[0] / (1 - 0.9**step) / (np.sqrt(moments[1] / (1 - 0.99**step)) + 1e-8)
        model.bind(model.theta)
    batch = spoken(3)
    plain = Ctc(model.layout, S, B, theta=model.theta, training=False)
    for beams in (0, 4):
        assert plain.transcribe(batch.inputs, batch.lengths, beams) == batch.targets.T.tolist()
    nothing = np.zeros((2, B, F), np.float32)
    assert plain.transcribe(nothing, np.array([0, 1, 2, 0]))[0] == []
    assert losses.sum() / 12 < 0.2
