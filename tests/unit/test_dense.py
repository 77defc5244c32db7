"""tanh of rows in place, and its gradient, against NumPy's, PyTorch's and the complex step."""

import numpy as np
import pytest
from helpers.numerics import CLOSE, DTYPES, check_by_complex_step, in_panels, out_of_panels, padding, relative

from dllm.kernels import dense


@DTYPES
@pytest.mark.parametrize("shape", [(1, 1), (3, 20), (7, 64)])
def test_tanh_and_its_gradient_equal_their_references(dtype, shape):
    rng = np.random.default_rng(1)
    a, dy = (2 * rng.standard_normal((2, *shape))).astype(dtype)
    y, d = in_panels(a), in_panels(dy)
    dense.tanh_rows(y)
    dense.tanh_backward(d, y)
    exact = np.tanh(a.astype(np.float64))
    assert relative(out_of_panels(y, shape[1]), exact) <= CLOSE[dtype]
    assert relative(out_of_panels(d, shape[1]), dense.tanh_backward_reference(dy.astype(np.float64), exact)) <= CLOSE[dtype]
    assert not padding(y, shape[1]).any()
    assert not padding(d, shape[1]).any()


@DTYPES
def test_rows_beside_a_part_of_panels_are_not_touched(dtype):
    a = np.random.default_rng(2).standard_normal((6, 40)).astype(dtype)
    y = in_panels(a)
    dense.tanh_rows(y[:, 2:5])
    found = out_of_panels(y, 40)
    np.testing.assert_allclose(found[2:5], np.tanh(a[2:5]), rtol=CLOSE[dtype])
    found[2:5] = a[2:5]
    np.testing.assert_array_equal(found, a)


def test_the_gradient_of_tanh_by_complex_step_and_pytorch():
    rng = np.random.default_rng(3)
    a, dy = rng.standard_normal((2, 3, 20))
    expected = dense.tanh_backward_reference(dy, np.tanh(a))
    check_by_complex_step(lambda a: (dy * np.tanh(a)).sum(), {"a": a}, {"a": expected}, rng)
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    there = torch.tensor(a, requires_grad=True)
    (torch.tanh(there) * torch.tensor(dy)).sum().backward()
    y, d = in_panels(a), in_panels(dy)
    dense.tanh_rows(y)
    dense.tanh_backward(d, y)
    assert relative(out_of_panels(d, 20), there.grad.numpy()) <= 1e-9
