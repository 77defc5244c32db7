"""ONNX files: the checker of the onnx package takes all of them, and its own evaluator says what dllm says."""

import re
import sys

import numpy as np
import onnx
import pytest
from helpers.model_folders import make_kind
from helpers.numerics import relative
from helpers.onnx_models import EVERY_SHAPE, SHAPES, by_onnx, given, said, stored, write
from onnx.reference import ReferenceEvaluator

from dllm.errors import UserError
from dllm.exchange import formats, onnx_file
from dllm.model import torch_weights

WEIGHTS = pytest.mark.parametrize("weights", torch_weights.KINDS)
OF_TEXT = pytest.mark.parametrize("shape", [name for name in SHAPES if name.startswith("lm")])


@pytest.mark.parametrize("weights", ["fp32", "int8"])
@EVERY_SHAPE
def test_the_checker_takes_every_kind(shape, weights, tmp_path):
    write(tmp_path, shape, weights)
    for path in tmp_path.glob("*.onnx"):
        onnx.checker.check_model(path, full_check=True)
        model = onnx.load(path)
        kinds = {tensor.name: tensor.data_type for tensor in model.graph.initializer}
        matrices = [name for name in kinds if re.search(r"\.weight(_[ih]h_l\d+)?$", name)]
        assert matrices
        assert {kinds[name] for name in matrices} == {onnx.TensorProto.INT8 if weights == "int8" else onnx.TensorProto.FLOAT}


@WEIGHTS
@OF_TEXT
def test_the_evaluator_says_what_dllm_says_of_text(shape, weights, tmp_path):
    model = write(tmp_path, shape, weights)
    evaluate = lambda path, inputs: _named(ReferenceEvaluator(str(path)), inputs)
    batch, state = given(model.config, model.vocabulary)
    logs, after = by_onnx(evaluate, tmp_path, model.config, batch, state)
    expected, expected_after = said(model, batch, state)
    assert relative(logs, expected) <= 1e-5
    assert relative(after, expected_after) <= 1e-5


def _named(evaluator, inputs):
    return dict(zip(evaluator.output_names, evaluator.run(None, inputs), strict=True))


def test_what_has_no_such_file_is_refused_in_one_line(tmp_path):
    make_kind(tmp_path / "model", {"kind": "bilm"})
    with pytest.raises(UserError, match=r"of kind bilm there is no such file; there is of lm, .*seq2seq"):
        formats.pack(["onnx"], stored(tmp_path / "model", "fp32"))


def test_more_than_a_file_holds_is_refused(tmp_path):
    make_kind(tmp_path / "model", {"kind": "lm"})
    known = stored(tmp_path / "model", "fp32")
    large = np.broadcast_to(np.float32(0), (onnx_file.LARGEST // 8, 3))  # which takes no memory
    with pytest.raises(UserError, match=r"the weights take 3\.2 GB there, and a file holds 2"):
        formats.pack(["onnx"], known._replace(arrays={"embedding.weight": large}))


def test_what_is_to_be_installed_is_said(tmp_path, monkeypatch):
    make_kind(tmp_path / "model", {"kind": "lm"})
    monkeypatch.setitem(sys.modules, "onnx", None)  # as where it is not installed
    with pytest.raises(UserError, match=re.escape("pip install 'dllm[onnx]'")):
        formats.pack(["onnx"], stored(tmp_path / "model", "fp32"))
