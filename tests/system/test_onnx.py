"""ONNX Runtime says what dllm says, of every kind and any weights; greedy texts are equal; the lines of the page run."""

import pathlib
import re
import subprocess

import numpy as np
import pytest
from helpers import onnx_sessions
from helpers.model_folders import commands, make_kind
from helpers.numerics import relative
from helpers.onnx_models import EVERY_SHAPE, SHAPES, by_onnx, given, said, write

import dllm
from dllm.inference.loaded_model import LoadedModel

pytestmark = pytest.mark.skipif(bool(onnx_sessions.missing()), reason=onnx_sessions.missing())
PAGE = pathlib.Path(__file__).parents[2] / "docs/how-to/export-and-import.md"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    with onnx_sessions.Sessions(tmp_path_factory.mktemp("onnx")) as sessions:
        yield sessions


@pytest.mark.parametrize("weights", ["fp32", "int8"])  # bf16 becomes fp32
@EVERY_SHAPE
def test_onnx_runtime_says_what_dllm_says(shape, weights, run, tmp_path):
    model = write(tmp_path, shape, weights)
    batch, state = given(model.config, model.vocabulary)
    expected, after = said(model, batch, state)
    there = np.ones(expected.shape[:2], bool)
    if model.config.kind in ("tagger", "ctc"):
        there = np.arange(len(expected))[:, None] < batch.lengths
    for together in {True, model.config.kind != "seq2seq"}:
        logs, states = by_onnx(run, tmp_path, model.config, batch, state, together)
        assert relative(logs[there], expected[there]) <= 1e-5
        assert np.abs(logs[there] - expected[there]).max() <= 1e-5 * np.abs(expected[there]).max()
        assert not after.size or relative(states, after) <= 1e-5


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A folder with models/mine as the page has it, and the same in int8 and of pairs; each with its ONNX files."""
    folder = tmp_path_factory.mktemp("exported")
    (folder / "models").mkdir()
    make_kind(folder / "text", SHAPES["lm, tied, two layers"])
    make_kind(folder / "answers", SHAPES["seq2seq, copying"])
    lines = [
        "export text --out models/mine --also onnx",
        "export text --out int8 --also onnx --weights int8",
        "export answers --out pairs --also onnx",
    ]
    for code, text in commands(folder / "out", *lines, cwd=folder):
        assert code == 0, text
    return folder


def greedy(run, folder, model, first, steps):
    """The most likely tokens (steps,) behind those of `first` (n,)."""
    tokens, found = np.array(first)[:, None], []
    h, c = np.zeros((2, model.config.layers, 1, model.config.hidden), np.float32)
    for _ in range(steps):
        there = run(folder / "model.onnx", {"tokens": tokens, "h": h, "c": c})
        h, c, tokens = there["h_next"], there["c_next"], there["logits"][-1:].argmax(2)
        found.append(int(tokens[0, 0]))
    return found


@pytest.mark.parametrize("name", ["models/mine", "int8"])
def test_greedy_texts_are_equal(name, exported, run):
    model = LoadedModel.open(exported / name)
    found = greedy(run, exported / name, model, model.tokenizer.encode(b"abcad", False), 60)
    assert model.tokenizer.decode(found).decode() == dllm.load(exported / name).generate("abcad", tokens=60, temperature=0)


def test_greedy_answers_are_equal(exported, run):
    model, answers = LoadedModel.open(exported / "pairs"), []
    for source in ("abcdef", "kjihgfedcba", "a"):
        tokens = model.tokenizer.encode(source.encode(), False).astype(np.int64)[:, None]
        lengths = {"lengths": np.array([len(tokens)])}
        read = run(exported / "pairs/encoder.onnx", {"tokens": tokens} | lengths)
        known = {"memory": read["memory"], "keys": read["keys"], "source": tokens} | lengths
        h, c, last, found = read["h"], read["c"], model.tokenizer.sep, []
        while len(found) < 30:
            there = run(exported / "pairs/decoder.onnx", {"tokens": np.array([[last]]), "h": h, "c": c, **known})
            h, c, logits = there["h_next"], there["c_next"], there["logits"][0, 0]
            logits[model.tokenizer.sep] = -np.inf  # which no search says
            last = int(logits.argmax())
            if last == model.tokenizer.end:
                break
            found.append(last)
        answers.append((model.tokenizer.decode(found).decode(), dllm.load(exported / "pairs").answer(source, tokens=30)))
    assert all(one == other for one, other in answers), answers
    assert len(set(answers)) > 1


def test_the_page_s_lines_run_and_say_the_same(exported, run):
    script = next(text for text in re.findall("```python\n(.*?)```", PAGE.read_text(), re.S) if "onnxruntime" in text)
    done = subprocess.run(
        [onnx_sessions.PYTHON, "-c", script], cwd=exported, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    model = LoadedModel.open(exported / "models/mine")
    assert [int(word) for word in done.stdout.split()] == greedy(run, exported / "models/mine", model, [1, 2, 3], 20)
