"""Model folders of all kinds: PyTorch runs the card's script and says the same, weights come back, lies are refused."""

import json
import re

import numpy as np
import pytest
from helpers.model_folders import make_kind
from helpers.numerics import relative

from dllm.config import Config, ModelConfig
from dllm.data.corpus import Corpus
from dllm.errors import UserError
from dllm.inference import model_folder
from dllm.inference.loaded_model import LoadedModel
from dllm.kernels.softmax import IGNORE
from dllm.model import blocks, torch_weights
from dllm.model.batch import Batch
from dllm.tools import info

MODELS = {
    "bilm": {"kind": "bilm", "layers": 2},
    "bilm, tied": {"kind": "bilm", "embedding": 16, "tied": True},
    "seq2seq": {"kind": "seq2seq"},
    "seq2seq, both, three layers": {"kind": "seq2seq", "bidirectional": True, "layers": 3, "encoder_layers": 2},
    "seq2seq, tied, dot": {"kind": "seq2seq", "attention": "dot", "tied": True, "layers": 2},
    "seq2seq, projection": {"kind": "seq2seq", "bidirectional": True, "projection": 10},
    "seq2seq, copy": {"kind": "seq2seq", "bidirectional": True, "copy": True, "layers": 2},
    "tagger": {"kind": "tagger", "bidirectional": True, "layers": 2},
    "tagger, projection": {"kind": "tagger", "projection": 5},
    "classifier, max": {"kind": "classifier", "bidirectional": True, "layers": 2},
    "classifier, mean": {"kind": "classifier", "pool": "mean", "projection": 7},
    "classifier, last": {"kind": "classifier", "pool": "last", "bidirectional": True},
    "classifier of sound": {"kind": "classifier", "bidirectional": True, "features": 6},
    "ctc": {"kind": "ctc", "bidirectional": True, "layers": 2, "features": 6},
}
EVERY_MODEL = pytest.mark.parametrize("name", MODELS)
V, S, B = 13, 7, 3
LENGTHS = np.array([7, 4, 1])
RNG = np.random.default_rng(3)
TOKENS, FRAMES = RNG.integers(0, V - 2, (S, B)), RNG.standard_normal((S, B, 6)).astype(np.float32)
BEFORE = np.concatenate([np.full((1, B), V - 2), RNG.integers(0, V - 2, (4, B))])


def ours(model):
    """-log P (T,B,classes) of every class, as losses of targets that are it."""
    config, classes = model.config, blocks.outputs(model.config, model.vocabulary)
    inputs = FRAMES if config.features else TOKENS
    rows = {"seq2seq": len(BEFORE), "classifier": 1}.get(config.kind, S)
    state = lambda: np.zeros((2, model.layout.carried, B, config.hidden), np.float32)
    found = []
    for number in range(classes):
        targets = np.full((rows, B), number)
        if config.kind == "bilm":  # both halves: onwards, and backwards what is before
            both, nothing = np.concatenate([TOKENS, TOKENS[::-1]], axis=1), np.full((S, B), IGNORE)
            halves = [np.concatenate(parts, axis=1) for parts in ([targets, nothing], [nothing, targets])]
            found.append([model.forward(Batch(both, half), *state()).copy() for half in halves])
        else:
            found.append(model.forward(Batch(inputs, targets, LENGTHS, BEFORE), *state()).copy())
    return np.moveaxis(np.array(found, np.float64), 0, -1)


def in_pytorch(torch, folder):
    """What the script of the card computes, as `ours`."""
    script = re.search("```python\n(.*?)```", (folder / "README.md").read_text(), re.S)[1]
    given = script.replace('"model.safetensors"', repr(str(folder / "model.safetensors")))
    for what, value in (("[[0], [1]]", TOKENS), ("[2]", LENGTHS), (f"[[{V - 2}]]", BEFORE)):
        given = given.replace(f"torch.tensor({what})", f"torch.tensor({value.tolist()})")
    given = given.replace("torch.zeros(2, 1, 6)", f"torch.tensor({FRAMES.tolist()})")
    names = {}
    exec(given, names)
    logits = [names[name] for name in ("logits", "logits_before") if name in names]
    found = [-torch.log_softmax(one, -1).detach().double().numpy() for one in logits]
    return np.array([found[0], found[1][::-1]]) if len(found) == 2 else found[0]


def losses_of_transcripts(torch, logs):
    """Of each label by itself, by PyTorch's CTC, as `ours` has them in the first row."""
    labels = logs.shape[-1] - 1
    logs, lengths = torch.tensor(-logs), torch.tensor(LENGTHS)
    one = torch.ones(B, dtype=torch.int64)
    find = lambda label: torch.nn.functional.ctc_loss(logs, one[:, None] * label, lengths, one, labels, "none")
    return np.stack([find(label) for label in range(labels)], axis=-1)


@EVERY_MODEL
@pytest.mark.parametrize(("stored", "biases"), [("fp32", 1), ("bf16", 2), ("int8", 1)])
def test_the_card_s_script_says_the_same_in_pytorch(name, stored, biases, tmp_path):
    torch = pytest.importorskip("torch")
    make_kind(tmp_path / "model", MODELS[name] | {"biases": biases}, stored)
    opened = LoadedModel.open(tmp_path / "model")
    model, theirs = opened.network(S, B), in_pytorch(torch, tmp_path / "model")
    if model.config.kind == "ctc":
        found, theirs = transcripts(model), losses_of_transcripts(torch, theirs)[None]
    else:
        found = ours(model)
        theirs = theirs.reshape(found.shape)
    there = (
        (np.arange(found.shape[-3])[:, None] < LENGTHS) if model.config.kind == "tagger" else np.ones(found.shape[-3:-1], bool)
    )
    assert relative(found[..., there, :], theirs[..., there, :]) <= 1e-5


def transcripts(model):
    labels = model.config.labels
    nothing = np.zeros((0, B, 16), np.float32)
    find = lambda label: model.forward(Batch(FRAMES, np.full((1, B), label), LENGTHS), nothing, nothing)[0].copy()
    return np.stack([find(label) for label in range(labels)], axis=-1)[None]


@EVERY_MODEL
def test_weights_of_a_folder_are_those_of_the_model(name, tmp_path):
    model = make_kind(tmp_path / "model", MODELS[name] | {"biases": 2})
    opened = LoadedModel.open(tmp_path / "model")
    np.testing.assert_array_equal(opened.vector, model.theta)
    assert opened.config == model.config
    assert list(opened.tokenizer.labels) == (["A", "B", "C"] if model.config.kind in blocks.LABELLED else [])


def test_what_a_module_of_pytorch_has_is_what_a_folder_has(tmp_path):
    torch = pytest.importorskip("torch")
    make_kind(tmp_path / "model", MODELS["tagger"] | {"biases": 2})
    lstm = torch.nn.LSTM(4, 16, 2, bidirectional=True)
    names = {f"encoder.{name}": tuple(tensor.shape) for name, tensor in lstm.state_dict().items()}
    shapes = torch_weights.shapes(LoadedModel.open(tmp_path / "model").config, V)
    assert {name: shape for name, shape in shapes.items() if name.startswith("encoder.")} == names


def test_a_shape_is_said_in_words_in_the_same_way_everywhere(tmp_path, capsys):
    make_kind(tmp_path / "model", MODELS["seq2seq, both, three layers"])
    model = LoadedModel.open(tmp_path / "model")
    words = "2 x 16 LSTM in both directions read, 3 x 16 write, general attention"
    assert words in blocks.describe(model.config)
    assert words in (tmp_path / "model" / "README.md").read_text()
    info.main([str(tmp_path / "model")])
    assert words in capsys.readouterr().out


def lies(folder, **facts):
    path = folder / "config.json"
    known = json.loads(path.read_text())
    known["model"] |= facts
    path.write_text(json.dumps(known))


@pytest.mark.parametrize(
    ("name", "facts", "says"),
    [
        ("tagger", {"kind": "lm"}, "model.projection is not|model.bidirectional"),
        ("tagger", {"kind": "seq2seq"}, "model.labels is read by model.kind = tagger, classifier and ctc, not by seq2seq"),
        ("tagger", {"kind": "robot"}, "model.kind = robot"),
        ("tagger", {"kind": ["tagger"]}, "model.kind = "),
        ("tagger", {"labels": 0}, "model.labels = 0 for a model of kind tagger, and its tokenizer names 3"),
        ("tagger", {"labels": 4}, "model.labels = 4 .* its tokenizer names 3"),
        ("tagger", {"labels": 2**31 - 1}, "its tokenizer names 3"),
        ("tagger", {"labels": True}, "model.labels = True"),
        ("tagger", {"bidirectional": False}, "by its config.json"),
        ("tagger", {"bidirectional": 1}, "model.bidirectional = 1"),
        ("tagger", {"projection": 2**31 - 1}, "the weights of its config.json take"),
        ("tagger", {"features": 5}, "features = 5 .* frames of its tokenizer have 0"),
        ("tagger", {"hidden": 17}, "model.hidden = 17"),
        ("classifier, max", {"pool": "sum"}, "model.pool = sum"),
        ("classifier, max", {"copy": True}, "model.copy is read by model.kind = seq2seq"),
        ("ctc", {"features": 0}, "model.features = 0 .* have 6"),
        ("ctc", {"features": -1}, "model.features = -1"),
        ("seq2seq", {"attention": "dot"}, "keys.weight.* not by its config.json"),
        ("seq2seq", {"encoder_layers": 10**9}, "model.encoder_layers = 1000000000"),
        ("seq2seq", {"features": 5}, "model.features is read by"),
        ("seq2seq", {"copy": True}, "gate.weight|the weights of its config.json"),
        ("bilm", {"labels": 3}, "model.labels is read by .*, not by bilm"),
        ("bilm", {"kind": "tagger", "labels": 3}, "its tokenizer names 0"),
    ],
)
def test_lies_about_a_kind_are_refused_in_one_line(name, facts, says, tmp_path):
    make_kind(tmp_path / "model", MODELS[name])
    lies(tmp_path / "model", **facts)
    with pytest.raises(UserError, match=says) as caught:
        LoadedModel.open(tmp_path / "model")
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize(
    "labels",
    ["ABC", ["A", "B"], ["A", "B", 3], ["A", "B", ""], ["A", "B", "\x1b[2J"], ["A", "B", "B"], ["A"] * 99999, {"A": 1}],
)
def test_labels_that_are_none_are_refused(labels, tmp_path):
    make_kind(tmp_path / "model", MODELS["tagger"])
    path = tmp_path / "model" / "dllm_tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"labels": labels}))
    with pytest.raises(UserError, match="label"):
        LoadedModel.open(tmp_path / "model")


def test_a_seq2seq_without_pairs_is_refused(tmp_path):
    make_kind(tmp_path / "model", MODELS["seq2seq"])
    path = tmp_path / "model" / "dllm_tokenizer.json"
    path.write_text(path.read_text().replace("true", "false"))
    with pytest.raises(UserError, match="has a tokenizer of pairs"):
        LoadedModel.open(tmp_path / "model")


def test_a_folder_of_text_says_no_more_than_it_did_and_older_ones_are_read(tmp_path):
    make_kind(tmp_path / "model", {"kind": "lm"})
    known = json.loads((tmp_path / "model" / "config.json").read_text())["model"]
    assert set(known) == set(model_folder.OF_TEXT)
    assert LoadedModel.open(tmp_path / "model").config.kind == "lm"
    shape = model_folder.shape(ModelConfig(kind="tagger"))
    assert shape.keys() == Config().model.__dataclass_fields__.keys() & set(model_folder.SHAPE)


@pytest.mark.parametrize("others", [["A", "B", "D"], ["B", "A", "C"], ["A", "B"]])
def test_a_corpus_of_other_labels_is_refused(others):
    corpus = object.__new__(Corpus)
    corpus.folder, corpus.labels = "DIR", ["A", "B", "C"]
    corpus.check_labels(("A", "B", "C"), "RUN")
    with pytest.raises(UserError, match=r"the labels of DIR are not the . that RUN was trained with"):
        corpus.check_labels(others, "RUN")
