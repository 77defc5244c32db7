"""The initial values of a model: their ranges, the bias of the forget gate, and that they follow from the seed alone."""

import numpy as np
import pytest

from dllm.config import ModelConfig
from dllm.model.language_model import LanguageModel
from dllm.model.layout import Layout


def initialised(config, seed=1, dtype=np.float64):
    layout = Layout(config, 200, dtype)
    model = LanguageModel(layout, 1, 1, theta=np.full(layout.size, np.nan, dtype))
    model.initialise(seed)
    return {name: model.layout.read(model.theta, name) for name in model.layout.tensors}


def fills(values, bound):
    """Uniform on +-bound: within it, near its ends, and of its variance."""
    return 0.9 * bound < abs(values).max() <= bound and abs(values.std() / bound - 3**-0.5) < 0.1


@pytest.mark.parametrize("embedding", [16, 0])
def test_initial_values_keep_to_their_ranges(embedding):
    config = ModelConfig(embedding=embedding, hidden=25, layers=2, init_output=0.05, init_output_bias=0.3)
    bounds = {"output.weight": 0.05, "output.bias": 0.3, **({"embedding.weight": 0.05} if embedding else {})}
    for name, tensor in initialised(config).items():
        assert fills(tensor, bounds.get(name, 1 / 5)), name
    everywhere = initialised(ModelConfig(init=0.07, init_output=0.07))
    assert all(fills(tensor, 0.07) for name, tensor in everywhere.items() if name != "output.bias")
    assert not everywhere["output.bias"].any()


@pytest.mark.parametrize("biases", [1, 2])
def test_forget_bias_is_the_bias_of_the_forget_gate_alone(biases):
    plain = initialised(ModelConfig(hidden=25, layers=2, biases=biases))
    higher = initialised(ModelConfig(hidden=25, layers=2, biases=biases, forget_bias=1.5))
    for name, tensor in higher.items():
        if name.endswith("bias") and name.startswith("lstm"):
            assert (tensor[0, 25:50] == 1.5).all()
            tensor[0, 25:50] = plain[name][0, 25:50]
        np.testing.assert_array_equal(tensor, plain[name], err_msg=name)


def test_initial_values_follow_from_the_seed_alone():
    config = ModelConfig(embedding=16, hidden=16, layers=2)
    one, same, other = (initialised(config, seed) for seed in (1, 1, 2))
    narrow = initialised(config, 1, np.float32)
    for name in one.keys() - {"output.bias"}:
        np.testing.assert_array_equal(one[name], same[name])
        np.testing.assert_array_equal(one[name].astype(np.float32), narrow[name])
        assert not np.isin(one[name], other[name]).any()
    assert not np.isin(one["lstm.0.weight_h"], one["lstm.1.weight_h"]).any()
