"""The small kernels: embedding, Philox by the known answers of Random123, dropout,
optimiser updates by PyTorch's, and compiled functions against their own Python. The others have files of their own.
"""

import pathlib
import subprocess
import sys

import numpy as np
import pytest
from helpers.numerics import (
    CLOSE,
    DTYPES,
    gate_panels,
    in_panels,
    nan_panels,
    out_of_gate_panels,
    out_of_panels,
    padding,
    relative,
)

from dllm.kernels import dropout, embedding, gemm, optim

ROOT = pathlib.Path(__file__).parents[2]

# embedding


@DTYPES
@pytest.mark.parametrize("kind", ["plain", "tied", "gates"])
def test_embedding_is_a_product_with_one_hot_rows_and_its_gradient_adds_up_repeated_tokens(dtype, kind):
    rng, E = np.random.default_rng(3), 20
    tokens = rng.integers(0, 7, 50)  # seven of eleven rows, each several times
    table, dx, before = (rng.standard_normal(size).astype(dtype) for size in ((11, E), (50, E), (11, E)))
    onehot = np.eye(11)[tokens]
    if kind == "plain":
        x, dtable = nan_panels(50, E, dtype), before.copy()
        embedding.embedding_forward(x, tokens, table)
        embedding.embedding_backward(dtable, tokens, in_panels(dx))
        x = out_of_panels(x, E)
    elif kind == "tied":
        x, dtable = nan_panels(50, E, dtype), in_panels(before, 1)
        embedding.tied_embedding_forward(x, tokens, in_panels(table, 1), E)
        embedding.tied_embedding_backward(dtable, tokens, in_panels(dx), E)
        assert not padding(dtable, E).any()
        x, dtable = out_of_panels(x, E), out_of_panels(dtable, E)
    else:
        x, dtable = gate_panels(np.full_like(dx, np.nan)), before.copy()
        embedding.gates_forward(x, tokens, table)
        embedding.gates_backward(dtable, tokens, gate_panels(dx))
        x = out_of_gate_panels(x, E // 4)
    np.testing.assert_array_equal(x, onehot @ table)
    assert relative(dtable - before, onehot.T @ dx) <= CLOSE[dtype]
    np.testing.assert_array_equal(dtable[7:], before[7:])
    reference = before.copy()
    embedding.embedding_backward_reference(reference, tokens, dx)
    np.testing.assert_array_equal(dtable, reference)  # both add in order


# Philox and dropout

ONES = 0xFFFFFFFF
KNOWN_ANSWERS = [  # kat_vectors of Random123, philox4x32 with 10 rounds
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((ONES, ONES, ONES, ONES), (ONES, ONES), (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "answer"), KNOWN_ANSWERS)
def test_philox_gives_the_known_answers(counter, key, answer):
    words = [np.uint64(word) for word in counter + key]
    assert tuple(map(int, dropout.philox(*words))) == answer
    assert tuple(map(int, dropout.philox.py_func(*words))) == answer
    assert dropout.philox_reference(counter, key) == answer


def drop(x, p=0.4, lanes=None, seed=1, step=2, layer=3):
    T, B, H = x.shape
    y = nan_panels(T * B, H, x.dtype)
    lanes = np.arange(B) if lanes is None else np.asarray(lanes)
    dropout.dropout(y, in_panels(x.reshape(T * B, H)), 0, 0, T, p, lanes, seed, step, layer)
    assert not padding(y, H).any()
    return out_of_panels(y, H).reshape(T, B, H)


@DTYPES
@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 1, 2), (2, 2, 3), (1, 3, 4), (3, 2, 5), (2, 3, 17), (2, 1, 150)])
@pytest.mark.parametrize(("seed", "step", "layer"), [(1, 0, 0), (2**31 - 1, 7, 3), (2**40 + 5, 2**32 + 9, 255)])
def test_dropout_equals_its_reference(dtype, shape, seed, step, layer):
    x = np.random.default_rng(12).standard_normal(shape).astype(dtype)
    lanes = np.arange(shape[1]) * 1000 + 5
    expected = dropout.dropout_reference(x, 0.4, lanes, seed, step, layer)
    np.testing.assert_allclose(drop(x, 0.4, lanes, seed, step, layer), expected, rtol=4 * np.finfo(dtype).eps)


def test_dropout_keeps_the_right_share_of_every_column_and_scales_what_stays():
    x, p = np.ones((400, 10, 13)), 0.35
    y = drop(x, p)
    kept = y != 0
    np.testing.assert_allclose(y[kept], 1 / (1 - p), rtol=1e-15)
    assert abs(kept.mean() - (1 - p)) < 5 * np.sqrt(p * (1 - p) / x.size)
    assert (abs(kept.mean(axis=(0, 1)) - (1 - p)) < 5 * np.sqrt(p * (1 - p) / 4000)).all()


def test_dropout_of_zero_copies_and_works_in_place():
    x = np.random.default_rng(13).standard_normal((3, 4, 5))
    np.testing.assert_array_equal(drop(x, 0.0), x)
    y = in_panels(x.reshape(12, 5))
    dropout.dropout(y, y, 0, 0, 3, 0.4, np.arange(4), 1, 2, 3)
    np.testing.assert_array_equal(out_of_panels(y, 5).reshape(3, 4, 5), drop(x))


FAR = 2**32
OTHERS = [{"lanes": np.arange(10) + 10}, {"step": 3}, {"step": 2 + FAR}, {"layer": 4}, {"seed": 2}, {"seed": 1 + FAR}]


@pytest.mark.parametrize("other", OTHERS)
def test_masks_of_other_lanes_steps_layers_and_seeds_are_independent(other):
    x, p = np.ones((40, 10, 101)), 0.4
    same = ((drop(x, p) != 0) == (drop(x, p, **other) != 0)).mean()
    expected = p**2 + (1 - p) ** 2
    assert abs(same - expected) < 5 * np.sqrt(expected * (1 - expected) / x.size)


def test_masks_of_time_steps_and_lanes_of_one_call_are_independent():
    kept, p = drop(np.ones((100, 10, 101)), 0.4) != 0, 0.4
    expected = p**2 + (1 - p) ** 2
    for one, next_one in [(kept[1:], kept[:-1]), (kept[:, 1:], kept[:, :-1]), (kept[..., 1:], kept[..., :-1])]:
        assert abs((one == next_one).mean() - expected) < 5 * np.sqrt(expected * (1 - expected) / one.size)


def test_a_mask_does_not_depend_on_how_lanes_are_grouped():
    x = np.random.default_rng(14).standard_normal((4, 6, 9))
    apart = [drop(np.ascontiguousarray(x[:, part]), lanes=np.arange(6)[part]) for part in (slice(0, 3), slice(3, 6))]
    np.testing.assert_array_equal(drop(x), np.concatenate(apart, axis=1))


def test_dropout_is_its_own_adjoint_so_backward_has_the_forward_mask():
    rng = np.random.default_rng(15)
    x, dy = rng.standard_normal((2, 5, 3, 7))
    assert (drop(x) * dy).sum() == pytest.approx((x * drop(dy)).sum(), rel=1e-12)
    np.testing.assert_array_equal(drop(x) == 0, drop(dy) == 0)


# optimisers

SGD = {
    "plain": {"momentum": 0.0, "nesterov": False, "decay": 0.0},
    "decay": {"momentum": 0.0, "nesterov": False, "decay": 0.1},
    "momentum": {"momentum": 0.9, "nesterov": False, "decay": 0.1},
    "nesterov": {"momentum": 0.9, "nesterov": True, "decay": 0.1},
}
ADAM = {
    "adam": {"decay": 0.0, "decoupled": False},
    "adam with decay": {"decay": 0.1, "decoupled": False},
    "adamw": {"decay": 0.1, "decoupled": True},
}
RMSPROP = {"rmsprop": {"decay": 0.0}, "rmsprop with decay": {"decay": 0.1}}
CASES = [*SGD, *ADAM, *RMSPROP]
STEPS, SIZE = 6, 37


def trajectory(case, theta, gradients, update):
    """theta after every step, by the compiled kernels, their Python or the references: update(kind, ...) does one."""
    kind, options = next(
        (kind, cases[case]) for kind, cases in (("sgd", SGD), ("adam", ADAM), ("rmsprop", RMSPROP)) if case in cases
    )
    theta, moments, path = theta.copy(), [np.zeros_like(theta), np.zeros_like(theta)], []
    for step, gradient in enumerate(gradients, 1):
        theta, moments = update(kind, theta, gradient, moments, step, **options)
        path.append(theta.copy())
    return np.array(path)


def by_kernel(factor=1.0, limit=np.inf, python=False):
    run = (lambda kernel: kernel.py_func) if python else lambda kernel: kernel

    def update(kind, theta, g, moments, step, decay, momentum=None, nesterov=None, decoupled=None):
        if kind == "sgd":
            velocity = moments[0] if momentum else np.empty(0, theta.dtype)
            run(optim.sgd_update)(theta, g, velocity, 0.05, momentum, nesterov, decay, factor, limit)
        elif kind == "adam":
            options = (step, 0.05, 0.9, 0.95, 1e-6, decay, decoupled, factor, limit)
            run(optim.adam_update)(theta, g, *moments, *options)
        else:
            run(optim.rmsprop_update)(theta, g, moments[0], 0.05, 0.9, 1e-6, decay, factor, limit)
        return theta, moments

    return update


def by_reference(factor=1.0, limit=np.inf):
    def update(kind, theta, g, moments, step, **options):
        g = np.clip(g * factor, -limit, limit)
        if kind == "sgd":
            theta, *moments = optim.sgd_reference(theta, g, moments[0], 0.05, **options)
        elif kind == "adam":
            theta, *moments = optim.adam_reference(theta, g, *moments, step, 0.05, 0.9, 0.95, 1e-6, **options)
        else:
            theta, *moments = optim.rmsprop_reference(theta, g, moments[0], 0.05, 0.9, 1e-6, **options)
        return theta, moments

    return update


def by_torch(case, theta, gradients):
    torch = pytest.importorskip("torch")
    parameter = torch.nn.Parameter(torch.tensor(theta))
    if case in SGD:
        options = {**SGD[case]}
        optimizer = torch.optim.SGD([parameter], lr=0.05, weight_decay=options.pop("decay"), **options)
    elif case in ADAM:
        kind = torch.optim.AdamW if ADAM[case]["decoupled"] else torch.optim.Adam
        optimizer = kind([parameter], lr=0.05, betas=(0.9, 0.95), eps=1e-6, weight_decay=ADAM[case]["decay"])
    else:
        decay = RMSPROP[case]["decay"]
        optimizer = torch.optim.RMSprop([parameter], lr=0.05, alpha=0.9, eps=1e-6, weight_decay=decay)
    path = []
    for gradient in gradients:
        parameter.grad = torch.tensor(gradient)
        optimizer.step()
        path.append(parameter.detach().numpy().copy())
    return np.array(path)


def problem(dtype=np.float64):
    rng = np.random.default_rng(16)
    return rng.standard_normal(SIZE).astype(dtype), rng.standard_normal((STEPS, SIZE)).astype(dtype)


@DTYPES
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("factor", "limit"), [(1.0, np.inf), (0.3, np.inf), (1.0, 0.2), (0.5, 0.2)])
def test_updates_equal_their_references_over_several_steps(dtype, case, factor, limit):
    theta, gradients = problem(dtype)
    found = trajectory(case, theta, gradients, by_kernel(factor, limit))
    exact = trajectory(case, theta.astype(np.float64), gradients.astype(np.float64), by_reference(factor, limit))
    assert relative(found, exact) <= CLOSE[dtype]
    assert relative(found, theta) > 1e-2  # it moved


@pytest.mark.parametrize("case", CASES)
def test_updates_equal_pytorchs(case):
    theta, gradients = problem()
    found = trajectory(case, theta, gradients, by_kernel())
    np.testing.assert_allclose(found, by_torch(case, theta, gradients), rtol=1e-12, atol=1e-13)


@DTYPES
@pytest.mark.parametrize("case", CASES)
def test_compiled_updates_equal_their_python(dtype, case):
    theta, gradients = problem(dtype)
    ours, python = (trajectory(case, theta, gradients, by_kernel(0.5, 0.2, python)) for python in (False, True))
    assert relative(ours, python) <= CLOSE[dtype]


def test_clamp_keeps_nan():
    values = [optim.clamp(x, 2.0) for x in (-3.0, -2.0, 0.5, 3.0, np.inf, -np.inf, np.nan)]
    np.testing.assert_array_equal(values, [-2, -2, 0.5, 2, 2, -2, np.nan])


@DTYPES
@pytest.mark.parametrize("size", [0, 1, 4095, 4096, 4097, 100_003])
def test_sum_of_squares_is_exact_to_rounding(dtype, size):
    vector = np.random.default_rng(17).standard_normal(size).astype(dtype)
    expected = (vector.astype(np.float64) ** 2).sum()
    assert optim.sum_of_squares(vector) == pytest.approx(expected, rel=1e-6 if dtype == np.float32 else 1e-13)


# compiled functions against their own Python


def python_cases(dtype):
    rng = np.random.default_rng(18)
    new = lambda *shape: rng.standard_normal(shape).astype(dtype)
    tokens, lanes = np.array([4, 0, 4]), np.arange(3)
    R = gemm.width(dtype)
    yield embedding.embedding_forward, (new(1, 3, R), tokens, new(6, 4))
    yield embedding.embedding_backward, (new(6, 4), tokens, new(1, 3, R))
    yield dropout.dropout, (new(2, 6, R), new(2, 6, R), 0, 0, 2, 0.4, lanes, 1, 2, 3)


@DTYPES
def test_compiled_kernels_equal_their_python(dtype):
    for function, arguments in python_cases(dtype):
        copies = [[np.copy(part) if isinstance(part, np.ndarray) else part for part in arguments] for _ in range(2)]
        function(*copies[0])
        function.py_func(*copies[1])
        for ours, python in zip(*copies, strict=True):
            np.testing.assert_allclose(ours, python, rtol=0, atol=CLOSE[dtype], err_msg=function.__name__)
        assert not all(map(np.array_equal, copies[0], arguments)), function.__name__


def test_what_is_used_of_reduce_is_compiled_by_its_warm_up():
    """In a process of its own, where nothing else has compiled any."""
    lines = [line for path in ROOT.glob("dllm/**/*.py") for line in path.read_text(encoding="utf-8").splitlines()]
    used = {name for line in lines if "kernels.reduce import " in line for name in line.partition(" import ")[2].split(", ")}
    assert {"sum_ranks", "weighted_sum"} <= used
    source = (
        "import numpy as np; from dllm.kernels import reduce; reduce.warm_up(np.float32); "
        "print(*[name for name, found in vars(reduce).items() if hasattr(found, 'py_func') and found.signatures])"
    )
    run = subprocess.run([sys.executable, "-c", source], cwd=ROOT, capture_output=True, text=True, check=True, timeout=120)
    assert used <= {*run.stdout.split()}
