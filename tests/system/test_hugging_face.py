"""Model folders in the real transformers: DLLM_TEST_TRANSFORMERS=FOLDER has versions of it at FOLDER/4 and FOLDER/5."""

import importlib.util
import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest
from helpers.model_folders import logits
from helpers.numerics import relative
from helpers.text_tokenizers import NASTY, SAMPLE, built

from dllm import import_
from dllm.config import Config, ModelConfig
from dllm.errors import UserError
from dllm.files import safetensors
from dllm.inference import model_folder
from dllm.inference.generation import Sampling, continuation, source_prompt, start_tokens
from dllm.inference.loaded_model import LoadedModel
from dllm.inference.search import GREEDY
from dllm.model import torch_weights
from dllm.model.layout import Layout

PROGRAM = pathlib.Path(__file__).parents[1] / "helpers" / "in_transformers.py"
NEW = 12  # tokens that are generated
FOLDER = pathlib.Path(os.environ.get("DLLM_TEST_TRANSFORMERS", "nowhere"))
VERSIONS = sorted(path.parent for path in FOLDER.glob("*/transformers"))
pytestmark = [
    pytest.mark.skipif(not VERSIONS, reason="no transformers at DLLM_TEST_TRANSFORMERS: .ci/tools FOLDER gets it"),
    pytest.mark.skipif(not importlib.util.find_spec("torch"), reason="no PyTorch"),
]
MODELS = {  # name: (tokenizer, how it is stored, shape)
    "wide": (built("byte"), "fp32", {"embedding": 64, "hidden": 384}),
    "tied": (built("bpe"), "fp32", {"embedding": 48, "hidden": 48, "layers": 2, "tied": True, "biases": 2}),
    "one_hot": (built("char", unknown=False), "bf16", {"embedding": 0, "hidden": 40, "layers": 3}),
    "pairs": (built("word", pairs=True), "fp32", {"embedding": 24, "hidden": 64}),
    "tied_pairs": (built("char", pairs=True), "bf16", {"embedding": 32, "hidden": 32, "tied": True}),
    "small": (built("word"), "int8", {"embedding": 24, "hidden": 64}),
    "tagger": (built("bpe"), "fp32", {"kind": "tagger", "embedding": 8, "hidden": 8, "labels": 2}),
}
CAUSAL = [name for name, (_, stored, shape) in MODELS.items() if stored != "int8" and "kind" not in shape]
PROMPTS = ["two spaces and a tab", "time"]
MEASURED = {"split": "test", "tokens": 9, "before": 8.0, "after": 8.25, "corpus": "ab" * 32}
TRAINED = {"step": 1, "averaged": 1, "tokens": 9, "corpus": None, "measured": [MEASURED], "recipe": {}}


def make(out, tokenizer, stored, shape):
    """A model folder with random parameters of a size that those of trained models have."""
    config = ModelConfig(**shape)
    tokenizer.labels = ("A", "B") if config.labels else ()
    layout = Layout(config, tokenizer.size, np.float32)
    theta, scale = np.zeros(layout.size, np.float32), 2 / np.sqrt(config.hidden)
    values = np.random.default_rng(5).uniform(-scale, scale, layout.parameters)
    layout.load(theta, 0, values.astype(np.float32))
    data = safetensors.pack(torch_weights.encode(torch_weights.read_vector(layout, theta), stored))
    facts = model_folder.describe(Config(model=config), tokenizer, stored, data)
    model_folder.write(out, data, tokenizer, facts | ({"training": TRAINED} if out.name == "wide" else {"imported": "nothing"}))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    for name, model in MODELS.items():
        make(folder / name, *model)
    return folder


@pytest.fixture(scope="module", params=VERSIONS, ids=lambda path: path.name)
def found(request, folders):
    """Name of a model -> what one version found of it."""
    folder = folders / f"in-{request.param.name}"
    folder.mkdir()
    jobs = [
        {
            "folder": str(folders / name), "texts": [*NASTY, SAMPLE], "prompts": PROMPTS, "new": NEW,
            "saved": str(folder / name),
            "tokens": tokens(name).tolist() if name in CAUSAL else None,
        }
        for name in MODELS
    ]  # fmt: skip
    (folder / "jobs.json").write_text(json.dumps(jobs))
    environment = os.environ | {"PYTHONPATH": str(request.param), "HF_HOME": str(folder / "home"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, PROGRAM, folder / "jobs.json"]
    run = subprocess.run(
        command, cwd=folder, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=250
    )
    assert run.returncode == 0, run.stderr[-3000:]
    told = json.loads((folder / "jobs.found").read_text())
    assert told["version"].partition(".")[0] == request.param.name
    return dict(zip(MODELS, told["found"], strict=True)) | {"folder": folder}


def tokens(name):
    """Some of a model's vocabulary, in a row."""
    return np.random.default_rng(6).integers(0, MODELS[name][0].size, 24)


def prompt(name, text):
    """Tokens of a prompt, as dllm makes them."""
    tokenizer = MODELS[name][0]
    return source_prompt(tokenizer, text) if tokenizer.pairs else start_tokens(tokenizer, text)


@pytest.mark.parametrize("name", MODELS)
def test_texts_have_the_same_numbers_also_when_saved_again(found, name):
    tokenizer, one = MODELS[name][0], found[name]
    assert (one["size"], one["pad"]) == (tokenizer.size + 1, tokenizer.size)
    for again in ("ids", "ids_again") if name in CAUSAL else ("ids",):
        for text, numbers in zip([*NASTY, SAMPLE], one[again], strict=True):
            try:
                assert numbers == tokenizer.encode(text.encode(), end=False).tolist(), text
            except UserError:
                assert "Missing [UNK] token" in numbers


@pytest.mark.parametrize("name", CAUSAL)
def test_logits_are_those_of_dllm_and_pads_change_nothing(found, folders, name):
    ours, theirs = logits(LoadedModel.open(folders / name).model(1), tokens(name)), np.array(found[name]["logits"])
    assert found[name]["loading"] == {}
    assert found[name]["complaints"] == []
    assert np.abs(ours - theirs).max() <= 1e-5
    assert relative(ours, theirs) <= 1e-5
    assert found[name]["padded"] <= 1e-5
    chosen = log_probabilities(ours)[np.arange(len(ours) - 1), tokens(name)[1:]]
    assert found[name]["loss"] == pytest.approx(-chosen.mean(), rel=1e-5)
    assert found[name]["falls"]


def log_probabilities(scores):
    shifted = scores - scores.max(1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(1, keepdims=True))


@pytest.mark.parametrize("name", CAUSAL)
def test_texts_go_on_as_in_dllm_alone_in_a_batch_and_in_a_pipeline(found, folders, name):
    model, one, tokenizer = LoadedModel.open(folders / name), found[name], MODELS[name][0]
    greedy = [[*continuation(model, start_tokens(tokenizer, text), NEW, Sampling(temperature=0), GREEDY)] for text in PROMPTS]
    for rows in (one["greedy"], one["together"]):
        assert [_until(row, tokenizer.end) for row in rows] == greedy
    whole, continued = one["decoded"]
    assert one["pipeline"] in (whole, PROMPTS[0] + continued)  # the latter of version 5
    assert np.array(one["drawn"]).shape[0] == 4
    assert len({tuple(row) for row in one["drawn"]}) > 1


def _until(row, end):
    return row[: row.index(end)] if end in row else row


@pytest.mark.parametrize("name", CAUSAL)
def test_a_beam_has_the_probability_that_dllm_gives_it(found, folders, name):
    """So rows of states go with their beams."""
    one, model = found[name], LoadedModel.open(folders / name).model(1)
    row = np.array(one["beam"])
    assert row[: one["prompt"]].tolist() == prompt(name, PROMPTS[0]).tolist()
    scores = log_probabilities(logits(model, row))
    steps = np.arange(one["prompt"], len(row))
    assert len(steps) == NEW
    assert scores[steps - 1, row[steps]].sum() == pytest.approx(one["score"], abs=1e-3)


@pytest.mark.parametrize("name", CAUSAL)
def test_what_it_saves_is_the_same_to_the_bit_and_dllm_imports_it(found, folders, name, tmp_path, capsys):
    assert found[name]["same"]
    saved = found["folder"] / name
    with pytest.raises(UserError, match=r"was saved by transformers: dllm import .* makes a model folder of it"):
        LoadedModel.open(saved)
    code = import_.main([str(saved / "model.safetensors"), "--tokenizer", str(saved), "--out", str(tmp_path / "model")])
    assert (code, capsys.readouterr().err) == (0, "")
    again, first = LoadedModel.open(tmp_path / "model"), LoadedModel.open(folders / name)
    assert again.fingerprint == first.fingerprint
    assert again.config == first.config
    assert again.tokenizer.to_json() == first.tokenizer.to_json()


@pytest.mark.parametrize("name", CAUSAL)
def test_the_lines_of_the_card_do_what_they_say(found, name):
    printed, tokenizer = found[name]["printed"], MODELS[name][0]
    numbers = tokenizer.encode(b"Once upon a time", end=False).tolist()
    assert printed["inputs"] == prompt(name, "Once upon a time").tolist()
    assert printed["text"].strip()
    if tokenizer.pairs:
        assert printed["pair"] == [tokenizer.end, *numbers, tokenizer.sep, *numbers, tokenizer.end]


@pytest.mark.parametrize("name", MODELS)
def test_hugging_face_reads_the_card(found, name):
    card, causal = found[name]["card"], name in CAUSAL
    assert card["library_name"] == ("transformers" if causal else "pytorch")
    assert card["pipeline_tag"] == ("token-classification" if name == "tagger" else "text-generation")
    assert {"lstm", "dllm"} < set(card["tags"])
    assert card["license"] == "other"
    if name == "wide":
        (entry,) = card["model-index"]
        (result,) = entry["results"]
        assert result["metrics"][0]["value"] == MEASURED["after"]
        assert result["dataset"]["split"] == "test"
    else:
        assert "model-index" not in card
