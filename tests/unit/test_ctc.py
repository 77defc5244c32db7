"""CTC: losses and gradients against all paths, PyTorch and differences; what is found by the searches against all texts."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dllm.kernels.ctc import beam_search, best_path, ctc_loss_and_gradient, log_probabilities, loss_of_paths, spoken
from dllm.kernels.team import Team

FEW = settings(max_examples=40, deadline=None, derandomize=True, database=None)
ONE = Team(1)


def computed(z, texts, frames, scale=1.0, team=ONE, dtype=np.float64):
    """(losses (B,), dz (T,B,V)) of lanes whose texts are lists of labels."""
    targets = np.full((max([len(text) for text in texts] + [1]), len(texts)), -1)
    for n, text in enumerate(texts):
        targets[: len(text), n] = text
    losses, dz = np.empty(len(texts)), np.full(z.shape, np.nan, dtype)
    lengths = np.array([len(text) for text in texts])
    ctc_loss_and_gradient(losses, dz, z.astype(dtype), targets, np.array(frames), lengths, scale, team)
    return losses, dz


@FEW
@given(st.lists(st.integers(0, 1), max_size=4), st.integers(1, 5), st.integers(0, 99))
def test_a_loss_is_that_of_all_paths_that_say_the_text(text, T, seed):
    z = 2 * np.random.default_rng(seed).standard_normal((T, 1, 3))
    (loss,), _ = computed(z, [text], [T])
    assert loss == pytest.approx(loss_of_paths(log_probabilities(z[:, 0]), text), rel=1e-12, abs=1e-14)


def test_losses_and_gradients_are_those_of_pytorch():
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(1)
    T, B, V = 40, 6, 7
    z, frames, lengths = rng.standard_normal((T, B, V)) * 3, np.array([40, 31, 17, 5, 12, 1]), [12, 9, 3, 2, 0, 1]
    texts = [rng.integers(0, V - 1, n).tolist() for n in lengths]
    losses, dz = computed(z, texts, frames, 0.25)
    theirs = torch.tensor(z, requires_grad=True)
    flat = torch.tensor([label for text in texts for label in text])
    loss = torch.nn.functional.ctc_loss(
        theirs.log_softmax(2), flat, torch.tensor(frames), torch.tensor(lengths), blank=V - 1, reduction="none"
    )
    (loss.sum() * 0.25).backward()
    assert np.allclose(losses, loss.detach().numpy(), rtol=1e-9, atol=0)
    assert np.allclose(dz, theirs.grad.numpy(), rtol=1e-9, atol=1e-12)


@FEW
@given(st.integers(1, 9), st.lists(st.integers(0, 3), max_size=5), st.integers(0, 99))
def test_gradients_are_the_differences_of_losses(T, text, seed):
    rng = np.random.default_rng(seed)
    z, step, way = rng.standard_normal((T, 1, 5)), 1e-5, rng.standard_normal((T, 1, 5))
    (loss,), dz = computed(z, [text], [T])
    if math.isinf(loss):
        assert (dz == 0).all()
        return
    (above,), (below,) = (computed(z + sign * step * way, [text], [T])[0] for sign in (1, -1))
    assert (dz * way).sum() == pytest.approx((above - below) / (2 * step), rel=1e-6, abs=1e-9)


def test_a_text_that_takes_more_frames_than_there_are_is_infinitely_unlikely_and_moves_nothing():
    z = np.zeros((3, 4, 3))
    losses, dz = computed(z, [[0, 1, 0], [0, 0, 1], [0, 1, 0, 1], [0, 0]], [3, 3, 3, 3])
    assert np.isinf(losses).tolist() == [False, True, True, False]
    assert (dz[:, 1:3] == 0).all()
    assert (dz[:, 0] != 0).any()


def test_a_lane_without_frames_and_frames_behind_a_length_count_for_nothing():
    rng = np.random.default_rng(2)
    z = rng.standard_normal((6, 3, 4))
    losses, dz = computed(z, [[1, 2], [], [0]], [4, 0, 6])
    alone, of_alone = computed(z[:4, :1], [[1, 2]], [4])
    assert losses[0] == pytest.approx(alone[0], rel=1e-12)
    assert losses[1] == 0
    assert np.allclose(dz[:4, 0], of_alone[:, 0], rtol=1e-12)
    assert (dz[4:, 0] == 0).all()
    assert (dz[:, 1] == 0).all()


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_threads_change_no_bit(dtype):
    rng = np.random.default_rng(3)
    z, texts = rng.standard_normal((30, 7, 6)), [rng.integers(0, 5, n).tolist() for n in range(7)]
    first = computed(z, texts, [30] * 7, dtype=dtype)
    for threads in (2, 3):
        for one, other in zip(first, computed(z, texts, [30] * 7, team=Team(threads), dtype=dtype), strict=True):
            assert (one == other).all()


def test_a_path_says_what_is_left_without_repetitions_and_blanks():
    assert spoken([3, 1, 1, 3, 1, 2, 2, 0], 3) == [1, 1, 2, 0]
    assert best_path(np.eye(4)[[3, 1, 1, 3, 1]]) == [1, 1]


@FEW
@given(st.integers(1, 5), st.integers(2, 3), st.integers(0, 99))
def test_a_wide_search_finds_the_likeliest_of_all_texts(T, V, seed):
    y = log_probabilities(2 * np.random.default_rng(seed).standard_normal((T, V)))
    texts = {tuple(spoken(path, V - 1)) for path in itertools.product(range(V), repeat=T)}
    losses = {text: loss_of_paths(y, text) for text in texts}
    found, logprob = beam_search(y, 64)
    assert losses[tuple(found)] == pytest.approx(min(losses.values()), rel=1e-12)
    assert -logprob == pytest.approx(losses[tuple(found)], rel=1e-9)


def test_a_search_sees_that_many_paths_say_one_text():
    y = np.log([[0.4, 0.6], [0.4, 0.6]])  # two blanks have 0.36, and `a` has 0.64 by three paths
    assert best_path(y) == []
    assert beam_search(y, 2) == ([0], pytest.approx(math.log(0.64)))
    assert beam_search(y, 1)[0] == []
