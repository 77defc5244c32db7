"""Models of all kinds but the language model as wholes: what `backward` announces, gradients against differences and PyTorch,
padding and lanes of any length, other precisions and numbers of threads, layers that are frozen, and beginnings by others.
"""

import numpy as np
import pytest
from helpers.model_kinds import (
    EVERY_SHAPE,
    LENGTHS,
    READ_WHOLE,
    SHAPES,
    SMOOTHING,
    B,
    S,
    TorchModel,
    V,
    batch_of,
    build,
    configured,
    part_of,
    run,
    states,
    tensors,
)
from helpers.numerics import relative
from hypothesis import given, settings
from hypothesis import strategies as st

from dllm.config import ModelConfig
from dllm.errors import UserError
from dllm.kernels import processor
from dllm.kernels.gemm import from_panels
from dllm.model import inheriting
from dllm.model.base import Learning
from dllm.model.batch import Batch
from dllm.model.kinds import make_model
from dllm.model.layout import Layout

MASK = (7, 3, np.arange(B) + 5)
EMPTY = np.zeros(B, np.int64)


def losses_of(model, batch, mask=None):
    h, c = states(model.config).astype(model.dtype)
    return model.forward(batch, h, c, mask=mask).copy()


@EVERY_SHAPE
def test_slices_are_announced_in_order_and_are_final_then(shape):
    model, announced = build(configured(shape, dropout=0.3)), []
    gradient = run(
        model, batch_of(model.config), mask=MASK, on_ready=lambda part: announced.append((part, model.gradient[part].copy()))
    )[1]
    assert [part.start for part, _ in announced] == [0, *(part.stop for part, _ in announced)][:-1]
    assert announced[-1][0].stop == gradient.size
    assert len(announced) >= 1 + model.config.layers
    for part, copy in announced:
        np.testing.assert_array_equal(copy, gradient[part])
    assert np.isfinite(gradient).all()


@EVERY_SHAPE
def test_gradient_by_central_differences_with_dropout_on(shape):
    model, scale, rng = build(configured(shape, dropout=0.3)), 0.1, np.random.default_rng(4)
    batch, layout = batch_of(model.config), model.layout
    theta, gradient = layout.pack(model.theta), layout.pack(run(model, batch, scale, MASK)[1])
    for name, tensor in {"all": slice(0, theta.size), **layout.tensors}.items():
        part = slice(tensor.start, tensor.stop)
        direction = rng.standard_normal(part.stop - part.start)
        values = []
        for sign in (1, -1):
            layout.load(model.theta, 0, theta)
            layout.load(model.theta, part.start, theta[part] + sign * 1e-5 * direction)
            values.append(scale * losses_of(model, batch, MASK).sum())
        bound = 1e-2 * np.linalg.norm(gradient[part]) * np.linalg.norm(direction)
        assert abs((values[0] - values[1]) / 2e-5 - gradient[part] @ direction) <= 1e-6 * bound, name


@pytest.mark.parametrize("learning", [Learning(), SMOOTHING], ids=["plain", "smoothed"])
@EVERY_SHAPE
def test_losses_and_all_gradients_equal_pytorchs(shape, learning):
    """nn.LSTM over packed sequences; a lane that is empty changes nothing, and PyTorch does not get it."""
    torch = pytest.importorskip("torch")
    config = configured(shape)
    if learning.smoothing and config.kind == "ctc":
        pytest.skip("a transcript is not smoothed")
    model, batch = build(config, learning=learning), batch_of(config)
    losses, gradient = run(model, batch, 0.1)
    some = np.flatnonzero(LENGTHS)
    if config.kind != "bilm":
        assert not losses[:, LENGTHS == 0].any()
        parts = (
            part if part is None else np.ascontiguousarray(part[..., some] if part.ndim < 3 else part[:, some])
            for part in batch
        )
        batch, losses = Batch(*parts), losses[:, some]
    peer = TorchModel(torch, model, learning.smoothing)
    expected, objective = peer.losses(batch)
    (0.1 * objective).backward()
    assert relative(losses, expected.detach().numpy()) <= 1e-12
    found, theirs = tensors(model, gradient), peer.gradients()
    assert found.keys() == theirs.keys()
    for name in found:
        assert relative(found[name], theirs[name]) <= 1e-9, name


@pytest.mark.parametrize("shape", READ_WHOLE)
@settings(max_examples=8, deadline=None)
@given(lengths=st.lists(st.integers(0, S), min_size=1, max_size=B), seed=st.integers(0, 99))
def test_a_lane_depends_on_neither_its_padding_nor_the_lanes_beside_it(shape, lengths, seed):
    """The whole is the sum of lanes alone, in windows that end where they do."""
    model = MODELS.setdefault(shape, build(configured(shape)))
    batch = batch_of(model.config, np.array(lengths), seed)
    losses, gradient = run(model, batch, 0.1)
    other = batch.inputs.copy()
    for lane, length in enumerate(lengths):
        other[length:, lane] = 3
    again = run(model, batch._replace(inputs=other), 0.1)
    np.testing.assert_allclose(again[0], losses, rtol=1e-13)
    assert relative(again[1], gradient) <= 1e-13
    total = np.zeros_like(gradient)
    for lane, length in enumerate(lengths):
        own, part = run(model, part_of(batch, lane, max(1, length)), 0.1)
        np.testing.assert_allclose(own[:, 0], losses[: len(own), lane], rtol=1e-12, atol=1e-14)
        assert not losses[len(own) :, lane].any()
        total += part
    assert relative(total, gradient) <= 1e-12


MODELS = {}


@pytest.mark.parametrize("lengths", [LENGTHS, EMPTY], ids=["no targets", "empty lanes"])
@EVERY_SHAPE
def test_where_there_is_no_target_there_is_no_loss_and_no_gradient(shape, lengths):
    """But of frames, of which an empty transcript says that they are silent."""
    model = build(configured(shape))
    batch = batch_of(model.config, EMPTY if model.config.kind == "ctc" else lengths)
    losses, gradient = run(model, batch._replace(targets=np.full_like(batch.targets, -1)))
    assert not losses.any()
    assert not gradient.any()


@EVERY_SHAPE
def test_losses_do_not_depend_on_training(shape):
    config = configured(shape, dropout=0.3)
    np.testing.assert_array_equal(
        *(losses_of(build(config, training=training), batch_of(config)) for training in (True, False))
    )


@EVERY_SHAPE
def test_float32_model_follows_the_float64_one(shape):
    config = configured(shape, dropout=0.3)
    (wide, expected), (narrow, found) = (
        (model, run(model, batch_of(config), 0.1, MASK)) for model in (build(config), build(config, np.float32))
    )
    assert found[0].dtype == (np.float64 if config.kind == "ctc" else np.float32)
    assert relative(found[0], expected[0]) <= 2e-6
    assert relative(narrow.layout.pack(found[1]), wide.layout.pack(expected[1])) <= 1e-5


WIDE = {"hidden": 48, "dropout": 0.3}
WIDELY = {
    "seq2seq, tied": WIDE | {"embedding": 40},
    "seq2seq, copying": WIDE,
    "tagger, frames": WIDE,
    "classifier, mean": WIDE,
    "bilm, tied": WIDE | {"embedding": 48},
    "ctc": WIDE,
}


@pytest.mark.parametrize("precision", ["fp32", "fp64", *(["bf16"] if processor.BF16 else [])])
@pytest.mark.parametrize("shape", WIDELY)
def test_any_number_of_threads_gives_the_same_bits(shape, precision):
    config, dtype, results = configured(shape, **WIDELY[shape]), np.float64 if precision == "fp64" else np.float32, []
    for threads in (1, 2, 3):
        model = build(config, dtype, threads, precision == "bf16", learning=SMOOTHING)
        results.append([part.tobytes() for part in run(model, batch_of(config), 0.1, MASK)])
    assert results[0] == results[1] == results[2]


@pytest.mark.skipif(not processor.BF16, reason="this processor has no bfloat16 instructions")
@pytest.mark.parametrize("shape", WIDELY)
def test_bfloat16_model_follows_the_float32_one(shape):
    config = configured(shape, **WIDELY[shape])
    found, rounded = (run(build(config, np.float32, bf16=bf16), batch_of(config), 0.1, MASK) for bf16 in (False, True))
    assert 1e-6 < relative(rounded[0], found[0]) <= 1e-2
    assert 1e-6 < relative(rounded[1], found[1]) <= 3e-2


# layers that are frozen


@pytest.mark.parametrize("shape", [shape for shape in SHAPES if not SHAPES[shape].get("tied")])
def test_layers_are_freed_from_the_output_down_one_at_a_time(shape):
    config = configured(shape)
    model, batch = build(config, learning=Learning(unfreeze=10)), batch_of(config)
    whole = tensors(model, run(build(config), batch)[1])
    layers = config.encoder_layers if config.kind == "seq2seq" else config.layers
    for stage in range(layers + 3):
        announced = []
        found = tensors(model, run(model, batch, mask=(1, 10 * stage + 9, np.arange(B)), on_ready=announced.append)[1])
        assert announced[-1].stop == model.layout.size
        for name in found:
            first = 0
            for part in name.split("."):
                first = layers - int(part) if part.isdigit() and not name.startswith("decoder") else first
            first = layers + 1 if name == "embedding.weight" else first
            expected = whole[name] if stage >= first else np.zeros_like(whole[name])
            np.testing.assert_array_equal(found[name], expected, err_msg=f"{name} in stage {stage}")


# what is taken of a model of text


def parent_of(kind, **changes):
    """A model of text, and the states (L,T,B,H) of its layers in each of its directions, on the same text."""
    config = ModelConfig(**{"kind": kind, "embedding": 6, "hidden": 16, "layers": 2, **changes})
    layout = Layout(config, V, np.float64)
    theta = np.zeros(layout.size)
    layout.load(theta, 0, np.random.default_rng(8).uniform(-0.6, 0.6, layout.parameters))
    model = make_model(layout, S, B, theta=theta)
    tokens = np.random.default_rng(9).integers(0, V, (S, B))
    inputs = tokens if kind == "lm" else np.concatenate([tokens, tokens[::-1]], axis=1)
    h, c = np.zeros((2, layout.carried, B, 16))
    model.forward(Batch(inputs, inputs), h, c)
    ways = [model._lstms] if kind == "lm" else model._lstms
    return model, tokens, [[hidden(lstm) for lstm in way] for way in ways]


def hidden(lstm):
    """States (T,B,H) behind each step of the last window."""
    rows = np.empty((S * B, 16))
    from_panels(rows, lstm.memory.h, B)
    return rows.reshape(S, B, 16)


@pytest.mark.parametrize("parent", ["lm", "bilm"])
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("kind", ["tagger", "classifier", "seq2seq"])
def test_an_encoder_begins_with_the_states_of_a_model_of_text(kind, layers, bidirectional, parent):
    old, tokens, expected = parent_of(parent, layers=layers)
    whole = {"kind": kind, "bidirectional": bidirectional, "labels": 0 if kind == "seq2seq" else 5}
    config = ModelConfig(**{**whole, **inheriting.shape(old.config, kind, {})})
    assert (config.encoder_layers if kind == "seq2seq" else config.layers) == layers
    model = build(config)
    inheriting.inherit(model.layout, model.theta, old.layout, old.theta, "RUN")
    model.bind(model.theta)
    losses_of(model, batch_of(config, np.full(B, S))._replace(inputs=tokens))
    for layer in range(layers):
        for way, lstm in enumerate(model.encoder.layers[layer][: len(expected)]):
            np.testing.assert_allclose(hidden(lstm), expected[way][layer], rtol=1e-12, err_msg=f"layer {layer}, way {way}")


@pytest.mark.parametrize(
    ("shape", "changes"),
    [
        ("tagger", {"hidden": 32}),
        ("tagger", {"embedding": 7}),
        ("tagger", {"layers": 3}),
        ("tagger", {"biases": 2}),
        ("seq2seq, dot", {"encoder_layers": 3}),
        ("classifier, frames", {}),
    ],
)
def test_a_model_of_text_of_another_shape_is_refused_in_one_line(shape, changes):
    old = parent_of("lm")[0]
    model = build(configured(shape, **changes))
    with pytest.raises(UserError, match=r"^--init-from RUN is of another shape: .*, .* here$") as caught:
        inheriting.inherit(model.layout, model.theta, old.layout, old.theta, "RUN")
    assert "\n" not in str(caught.value)


def test_a_model_of_another_vocabulary_is_refused():
    old, model = parent_of("lm")[0], build(configured("tagger"))
    layout = Layout(old.config, V + 1, np.float64)
    with pytest.raises(UserError, match=r"embedding.weight is \(12, 6\) there, embedding.weight \(11, 6\) here"):
        inheriting.inherit(model.layout, model.theta, layout, np.zeros(layout.size), "RUN")
