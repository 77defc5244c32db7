"""The real Keras: it opens models of dllm and trains them on, and its models say the same here.

.ci/tools makes the environment. Keras computes by TensorFlow where that is in it, else by the PyTorch of the tests.
"""

import importlib.util
import json
import os
import pathlib
import subprocess

import numpy as np
import pytest
from helpers import several_commands
from helpers.model_folders import logits, make, make_kind

from dllm import import_
from dllm.data.sound_tokenizers import MelTokenizer
from dllm.data.tokenizer_files import save_tokenizer
from dllm.data.tokenizers import CharTokenizer
from dllm.exchange import formats
from dllm.inference.loaded_model import LoadedModel
from dllm.model.batch import Batch

ENVIRONMENT = pathlib.Path(os.environ.get("DLLM_TEST_KERAS") or "/nonexistent")
TORCH = importlib.util.find_spec("torch")
SCRIPT = pathlib.Path(__file__).parents[1] / "helpers" / "keras_side.py"
OURS = {
    "tagger": {"kind": "tagger", "bidirectional": True, "projection": 5},
    "tagger of frames": {"kind": "tagger", "features": 7, "layers": 2},
    "classifier, max": {"kind": "classifier", "bidirectional": True, "layers": 2},
    "classifier of frames, max": {"kind": "classifier", "features": 7},
    "classifier, mean": {"kind": "classifier", "pool": "mean", "bidirectional": True, "projection": 5},
    "classifier, last": {"kind": "classifier", "pool": "last", "bidirectional": True, "layers": 2, "biases": 2},
}
TEXTS = {"lm, one-hot": ("one-hot", 1), "lm, tied": ("tied", 2), "lm": ("untied", 3)}
THEIRS = "imdb", "lm", "lm-end", "lm-one-hot", "max"
BY_CONFIG = "mean-mask-zero", "tagger-mask-zero", "frames"  # whose weights alone do not say what they are
FITTED = "tagger", "classifier of frames, max", "classifier, max", "lm, one-hot", "lm, tied"  # a fit takes a second each
CHARS, CLASSES = list("abcdefghijkl"), {2: ("pos", "neg"), 3: ("z", "a", "m")}
LENGTHS, STEPS = np.array([7, 3, 1, 5]), 7
REVIEWS = [("pos", "a fine film"), ("neg", "a dull film"), ("pos", "fine"), ("neg", "dull and long and dull")]


def missing():
    """Why there is no Keras, or ""."""
    if not (ENVIRONMENT / "bin/python").exists():
        return "needs Keras: run .ci/tools FOLDER, then DLLM_TEST_KERAS=FOLDER/keras"
    return "" if TORCH or [*ENVIRONMENT.glob("lib/python3*/site-packages/tensorflow")] else "needs PyTorch or TensorFlow"


pytestmark = pytest.mark.skipif(bool(missing()), reason=missing())


def softmax(z):
    e = np.exp(z - z.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def said_here(opened, x, lengths):
    """Probabilities (texts,steps,labels), of a classifier (texts,1,labels), of texts (texts,steps) or of frames."""
    steps, lanes = x.shape[1], len(x)
    model = opened.network(steps, lanes)
    inputs = np.ascontiguousarray(np.swapaxes(x, 0, 1))
    inputs[np.arange(steps)[:, None] >= lengths] = 0
    targets = np.full((1 if opened.config.kind == "classifier" else steps, lanes), -1)
    nothing = np.zeros((0, lanes, 0), np.float32)
    model.forward(Batch(inputs, targets, lengths), nothing, nothing)
    return softmax(np.swapaxes(model.logits(), 0, 1))


def padded(x, padding, before):
    """Texts x (texts,steps) or frames, of LENGTHS, with padding behind or before them."""
    found = np.full_like(x, padding)
    for row, text, length in zip(found, x, LENGTHS, strict=True):
        row[STEPS - length if before else 0 :][:length] = text[:length]
    return found


def write_ours(folder):
    """Models of all shapes with model.keras, and texts for them."""
    rng = np.random.default_rng(1)
    for name in (*OURS, *TEXTS):
        shape = OURS.get(name, {"kind": "lm"})
        if name in TEXTS:
            make(folder / name, TEXTS[name][0], layers=TEXTS[name][1])
        else:
            make_kind(folder / name, shape)
        model = LoadedModel.open(folder / name)
        stored = formats.Stored(model.settings, model.tokenizer, model.tensors(), "fp32")
        for file, data in formats.pack(["keras"], stored).items():
            (folder / name / file).write_bytes(data)
        V, F = model.tokenizer.size, model.config.features
        x = rng.standard_normal((4, STEPS, F)).astype("f4") if F else rng.integers(0, V, (4, STEPS))
        padding = -1000 if F else V
        given = {"x": x, "whole": x, "behind": padded(x, padding, False), "before": padded(x, padding, True)}
        if name in TEXTS:
            given |= {"behind": x, "before": x}
        classes = rng.integers(0, V if name in TEXTS else 3, (4,) if shape["kind"] == "classifier" else (4, STEPS))
        np.savez(folder / name / "x.npz", **given, **({"targets": classes} if name in FITTED else {}))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """ours/NAME and theirs/NAME, after Keras has looked at the one and made the other; ours/imdb is of a preset."""
    folder = tmp_path_factory.mktemp("keras")
    (folder / "reviews.tsv").write_text("".join(f"{label}\t{text}\n" for label, text in REVIEWS * 8))
    (folder / "texts").write_text("".join(f"{text}\n" for _, text in REVIEWS))
    files = ["--classes", folder / "reviews.tsv", "--valid-classes", folder / "reviews.tsv"]
    train = ["--preset", "keras-imdb", "--max-steps", 12, "--progress", "none", "--set", "train.lanes=4"]
    lines = [
        ["dllm.prepare", "--tokenizer", "word", *files, "--out", folder / "corpus"],
        ["dllm.train", "--data", folder / "corpus", "--out", folder / "run", *train],
        ["dllm.export", folder / "run", "--out", folder / "ours" / "imdb", "--also", "keras"],
        ["dllm.tools.predict", folder / "ours" / "imdb", folder / "texts", "--json", "--out", folder / "said.json"],
    ]
    several_commands.run_several(folder / "commands", 0, lines, check=True)
    write_ours(folder / "ours")
    tokenizer = LoadedModel.open(folder / "ours" / "imdb").tokenizer
    rows = [tokenizer.encode(text.encode(), False) for _, text in REVIEWS]
    x = np.full((len(rows), max(map(len, rows))), tokenizer.size)
    for row, tokens in zip(x, rows, strict=True):
        row[: len(tokens)] = tokens
    np.savez(folder / "ours" / "imdb" / "x.npz", behind=x, before=x)
    where = [pathlib.Path(TORCH.origin).parents[1]] if TORCH else []
    words = [str(word) for word in (ENVIRONMENT / "bin/python", SCRIPT, folder, *where)]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(words, capture_output=True, text=True, timeout=240, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


def test_the_preset_trained_here_says_the_same_in_keras(folder):
    here = [json.loads(line)["probabilities"] for line in (folder / "said.json").read_text().splitlines()]
    there = np.load(folder / "ours" / "imdb" / "said.npz")["behind"]
    np.testing.assert_allclose(there, [[one["neg"], one["pos"]] for one in here], atol=1e-5)
    assert np.ptp(there[:, 0]) > 1e-3  # it says something of the texts


@pytest.mark.parametrize("side", ["behind", "before"])
@pytest.mark.parametrize("name", OURS)
def test_keras_computes_the_same_of_texts_of_different_lengths(folder, name, side):
    given, there = np.load(folder / "ours" / name / "x.npz"), np.load(folder / "ours" / name / "said.npz")[side]
    here = said_here(LoadedModel.open(folder / "ours" / name), given["x"], LENGTHS)
    for said, wanted, length in zip(there, here, LENGTHS, strict=True):
        if said.ndim == 2:
            said = said[STEPS - length :] if side == "before" else said[:length]
        np.testing.assert_allclose(said, wanted[:length] if said.ndim == 2 else wanted[0], atol=1e-5)


@pytest.mark.parametrize("name", TEXTS)
def test_keras_computes_the_logits_of_language_models(folder, name):
    model, x = LoadedModel.open(folder / "ours" / name).model(1), np.load(folder / "ours" / name / "x.npz")["x"]
    there = np.load(folder / "ours" / name / "said.npz")["behind"]
    np.testing.assert_allclose(there, [logits(model, text) for text in x], atol=1e-5)


def brought(tmp_path, file, tokenizer, *words):
    """The LoadedModel of what `import` makes of a file."""
    save_tokenizer(tmp_path, tokenizer)
    words = [str(file), "--tokenizer", str(tmp_path), "--out", str(tmp_path / "model"), *words]
    assert import_.main(words) == 0
    return LoadedModel.open(tmp_path / "model")


@pytest.mark.parametrize("name", FITTED)
def test_what_keras_has_trained_on_comes_back(folder, name, tmp_path):
    there, given = np.load(folder / "ours" / name / "said.npz"), np.load(folder / "ours" / name / "x.npz")
    assert there["losses"][-1] < there["losses"][0]
    model = LoadedModel.open(folder / "ours" / name)
    back = brought(tmp_path, folder / "ours" / name / "again.keras", model.tokenizer)
    unread = ("embedding",) if model.config.features else ("tied", "biases")
    for setting in ("kind", "embedding", "hidden", "layers", "bidirectional", "pool", "projection", "features"):
        assert setting in unread or getattr(back.config, setting) == getattr(model.config, setting)
    if name in TEXTS:
        here = np.stack([logits(back.model(1), text) for text in given["whole"]])
    else:
        here = said_here(back, given["whole"], np.full(4, STEPS)).reshape(there["again"].shape)
    np.testing.assert_allclose(there["again"], here, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "end"), [*((name, "keras") for name in (*THEIRS, *BY_CONFIG)), *((name, "weights.h5") for name in THEIRS)]
)
def test_models_of_keras_say_the_same_here(folder, name, end, tmp_path):
    given = np.load(folder / "theirs" / f"{name}.npz")
    x, there, skipped = given["x"], given["said"], name.endswith("mask-zero")
    classes = max(2, there.shape[-1])
    words = [] if name.startswith("lm") else ["--labels", ",".join(CLASSES[classes])]
    tokenizer = MelTokenizer(bands=7) if name == "frames" else CharTokenizer(CHARS[skipped:])
    model = brought(tmp_path, folder / "theirs" / f"{name}.{end}", tokenizer, *words)
    if name.startswith("lm"):
        here = np.stack([logits(model.model(1), text) for text in x])
        here = (here if name == "lm" else softmax(here))[:, -1 if name == "lm-end" else slice(None)]
        np.testing.assert_allclose(there, here, atol=1e-5)
        return
    there = np.concatenate([1 - there, there], axis=-1) if classes == 2 else softmax(there) if name == "max" else there
    here = said_here(model, x - skipped if name != "frames" else x, np.full(len(x), x.shape[1])).reshape(there.shape)
    np.testing.assert_allclose(there[..., np.argsort(CLASSES[classes])], here, atol=1e-5)


def test_a_lambda_of_keras_is_refused(folder, tmp_path, capsys):
    save_tokenizer(tmp_path, CharTokenizer(CHARS))
    code = import_.main([str(folder / "theirs" / "lambda.keras"), "--tokenizer", str(tmp_path), "--out", str(tmp_path / "x")])
    assert code == 2
    assert "layer 'lambda' (Lambda) is none of" in capsys.readouterr().err
