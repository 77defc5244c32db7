"""Where tensors lie: each element once, padding of zeros, the standard vector in parts, and published sizes of models."""

import itertools

import numpy as np
import pytest
from helpers.numerics import EVERY_KIND, configured

from dllm.config import ModelConfig
from dllm.model import layout as layout_module
from dllm.model.layout import Layout

V = 11


@EVERY_KIND
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("hidden", [6, 16, 40])
def test_layout_holds_each_element_of_each_tensor_once_and_pads_with_zeros(kind, dtype, hidden):
    config = configured(kind, hidden=hidden)
    if config.tied:
        config = configured(kind, hidden=hidden, embedding=hidden)
    layout = Layout(config, V, dtype)
    for extents, size in ((layout.tensors, layout.parameters), (layout.blocks, layout.size)):
        assert [extent.start for extent in extents.values()] == [0, *(extent.stop for extent in extents.values())][:-1]
        assert list(extents.values())[-1].stop == size
    assert list(layout.tensors)[-1] == "embedding.weight"
    vector, values = np.zeros(layout.size, dtype), np.arange(1, layout.parameters + 1, dtype=dtype)
    layout.load(vector, 0, values)
    assert np.count_nonzero(vector) == layout.parameters
    np.testing.assert_array_equal(np.sort(vector)[layout.size - layout.parameters :], values)
    assert all(np.shares_memory(array, vector) for array in layout.arrays(vector).values())
    for name, extent in layout.tensors.items():
        np.testing.assert_array_equal(layout.read(vector, name).reshape(-1), values[extent.start : extent.stop])


@pytest.mark.parametrize("part", [1, 7, 100, 1 << 20])
def test_parts_of_the_standard_vector_are_read_and_written_one_by_one(monkeypatch, part):
    monkeypatch.setattr(layout_module, "PART", part)
    layout = Layout(configured("two biases"), V, np.float64)
    values, edges = np.random.default_rng(1).standard_normal(layout.parameters), [0, 1, 70, 71, 400, layout.parameters]
    vector = np.zeros(layout.size)
    for start, stop in itertools.pairwise(edges):
        layout.load(vector, start, values[start:stop])
    for start, stop in itertools.pairwise(edges):
        np.testing.assert_array_equal(layout.export(vector, start, stop), values[start:stop])


def test_number_of_parameters_is_that_of_the_published_models():
    ptb = ModelConfig(embedding=650, hidden=650, layers=2, biases=2)
    assert Layout(ptb, 10_000, np.float32).parameters == 2 * 10_000 * 650 + 10_000 + 2 * (2 * 650 * 2600 + 2 * 2600)
    char = ModelConfig(embedding=0, hidden=128, layers=2)
    assert Layout(char, 65, np.float32).parameters == 65 * 512 + 128 * 512 + 512 + 2 * 128 * 512 + 512 + 65 * 128 + 65
    assert sum(Layout(char, 65, np.float32).weights().values()) == 3 * 128 * 512 + 65 * 128
    tied = ModelConfig(embedding=200, hidden=200, layers=2, tied=True)
    assert sum(Layout(tied, 33_278, np.float32).weights().values()) == 2 * 8 * 200**2 + 33_278 * 200
