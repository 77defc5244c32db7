"""Models as Keras has them, out and in without Keras: weights come back, what cannot be the same is refused by its layer."""

import json
import re
import zipfile

import numpy as np
import pytest
from helpers import keras_files
from helpers.keras_files import archive, both, hdf5, imdb, imdb_arrays, layer, lstm, sequential
from helpers.model_folders import make, make_kind

from dllm import import_
from dllm.errors import UserError
from dllm.exchange import formats
from dllm.files import safetensors
from dllm.inference.loaded_model import LoadedModel
from dllm.model import torch_weights

SHAPES = {
    "tagger": {"kind": "tagger"},
    "tagger, both, three layers": {"kind": "tagger", "bidirectional": True, "layers": 3, "projection": 5},
    "tagger of frames": {"kind": "tagger", "bidirectional": True, "features": 6},
    "classifier, max": {"kind": "classifier", "bidirectional": True, "layers": 2},
    "classifier, max, onward": {"kind": "classifier", "projection": 7, "biases": 2},
    "classifier, mean": {"kind": "classifier", "pool": "mean"},
    "classifier, last": {"kind": "classifier", "pool": "last", "bidirectional": True, "layers": 2, "biases": 2},
    "classifier of frames": {"kind": "classifier", "bidirectional": True, "features": 6},
}


def exported(folder, stored):
    """The bytes of model.keras, and the tensors of what a model folder stores."""
    model = LoadedModel.open(folder)
    tensors = torch_weights.decode(safetensors.read(folder / "model.safetensors"))
    arrays = torch_weights.encode(model.tensors(), stored)
    return formats.pack(["keras"], formats.Stored(model.settings, model.tokenizer, arrays, stored))["model.keras"], tensors


def and_back(folder, stored, tmp_path):
    """(tensors, settings) as they were, and as they are of the model.keras of a folder."""
    data, tensors = exported(folder, stored)
    (tmp_path / "model.keras").write_bytes(data)
    code = import_.main([str(tmp_path / "model.keras"), "--tokenizer", str(folder), "--out", str(tmp_path / "back")])
    assert code == 0
    found = safetensors.read(tmp_path / "back" / "model.safetensors")
    settings = [json.loads((path / "config.json").read_text())["model"] for path in (folder, tmp_path / "back")]
    return (tensors, settings[0]), ({name: array for name, (_, array) in found.items()}, settings[1])


def same(before, after):
    """What comes back is what went out, with both biases in one."""
    (tensors, settings), (found, told) = before, after
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        other = name.replace("bias_ih", "bias_hh")
        wanted = tensor + tensors[other] if other != name else np.zeros_like(tensor) if "bias_hh" in name else tensor
        np.testing.assert_array_equal(found[name], wanted, name)
    unread = {"biases", *({"embedding"} if settings.get("features") else {})}
    assert {key: value for key, value in told.items() if key not in unread} == {
        key: value for key, value in settings.items() if key not in unread
    }


@pytest.mark.parametrize("shape", SHAPES)
def test_taggers_and_classifiers_come_back(shape, tmp_path):
    make_kind(tmp_path / "model", SHAPES[shape])
    same(*and_back(tmp_path / "model", "fp32", tmp_path))


@pytest.mark.parametrize("stored", torch_weights.KINDS)
@pytest.mark.parametrize("kind", ["one-hot", "tied", "untied"])
@pytest.mark.parametrize("layers", [1, 3])
def test_language_models_come_back_as_they_are_stored(kind, layers, stored, tmp_path):
    make(tmp_path / "model", kind, stored, layers=layers)
    same(*and_back(tmp_path / "model", stored, tmp_path))


def test_a_model_makes_the_same_bytes_each_time(tmp_path):
    make_kind(tmp_path / "model", SHAPES["classifier, max"])
    first, _ = exported(tmp_path / "model", "fp32")
    assert exported(tmp_path / "model", "fp32")[0] == first


def test_no_token_of_a_table_with_a_row_of_zeros_is_padding(tmp_path):
    make_kind(tmp_path / "model", SHAPES["tagger"])
    model = LoadedModel.open(tmp_path / "model")
    tensors = model.tensors()
    tensors["embedding.weight"][3] = 0
    data = formats.pack(["keras"], formats.Stored(model.settings, model.tokenizer, tensors, "fp32"))["model.keras"]
    (tmp_path / "model.keras").write_bytes(data)
    with zipfile.ZipFile(tmp_path / "model.keras") as members:
        layers = json.loads(members.read("config.json"))["config"]["layers"]
    (value,) = [one["config"]["mask_value"] for one in layers if one["class_name"] == "Masking"]
    assert value not in tensors["embedding.weight"]
    found = keras_files.read(tmp_path / "model.keras", labels="ABC", units="abcdefghijk")
    np.testing.assert_array_equal(found.tensors["embedding.weight"], tensors["embedding.weight"])


@pytest.mark.parametrize("kind", ["seq2seq", "bilm", "ctc"])
def test_other_kinds_are_refused_in_one_line(kind, tmp_path):
    make_kind(tmp_path / "model", {"kind": kind, **({"features": 6} if kind == "ctc" else {})})
    with pytest.raises(UserError, match=f"Keras has no layers for a model of kind {kind}"):
        exported(tmp_path / "model", "fp32")


def test_one_hot_inputs_of_many_tokens_are_refused(tmp_path):
    model = make(tmp_path / "model", "one-hot")
    tokens = type("Tokenizer", (), {"size": 50_000})()
    settings = LoadedModel.open(tmp_path / "model").settings
    tensors = torch_weights.read_vector(model.layout, model.theta)
    with pytest.raises(UserError, match="a matrix of 50,000 x 50,000"):
        formats.pack(["keras"], formats.Stored(settings, tokens, tensors, "fp32"))


def written(path, layers=None, arrays=None, **options):
    """A .keras at a path of layers and weights, those of Keras's example where none are given."""
    path.write_bytes(archive(sequential(layers or imdb()), hdf5(arrays or imdb_arrays(), **options)))
    return path


def test_keras_s_example_is_a_classifier_of_two_classes(tmp_path):
    arrays = imdb_arrays()
    found = keras_files.read(written(tmp_path / "imdb.keras", arrays=arrays), labels=("pos", "neg"))  # 0 is pos
    model = found.settings.model
    assert (model.kind, model.pool, model.bidirectional, model.layers, found.labels) == (
        "classifier", "last", True, 2, ("neg", "pos"),
    )  # fmt: skip
    w, b = arrays["layers/dense/vars/0"][:, 0], arrays["layers/dense/vars/1"][0]
    np.testing.assert_array_equal(found.tensors["output.weight"], [w, np.zeros_like(w)])
    np.testing.assert_array_equal(found.tensors["output.bias"], [b, 0])
    backward = arrays["layers/bidirectional_1/backward_layer/cell/vars/1"]
    np.testing.assert_array_equal(found.tensors["encoder.weight_hh_l1_reverse"], backward.T)


def test_its_weights_alone_say_the_same(tmp_path):
    (tmp_path / "imdb.weights.h5").write_bytes(hdf5(imdb_arrays()))
    alone, whole = keras_files.read(tmp_path / "imdb.weights.h5"), keras_files.read(written(tmp_path / "imdb.keras"))
    assert alone.settings == whole.settings
    for name, tensor in whole.tensors.items():
        np.testing.assert_array_equal(alone.tensors[name], tensor)


def test_units_that_no_layer_here_has_are_filled_up_with_zeros(tmp_path):
    layers = imdb()
    layers[2:4] = [both("bidirectional", True, 20), both("bidirectional_1", False, 20)]
    found = keras_files.read(written(tmp_path / "imdb.keras", layers, imdb_arrays(20)))
    assert found.settings.model.hidden == 32
    assert "20 units" in found.notes[0]
    for name, tensor in found.tensors.items():
        if "weight_hh" in name:
            gates = tensor.reshape(4, 32, 32)
            assert gates[:, :20, :20].all()
            assert not gates[:, 20:].any()
            assert not gates[:, :, 20:].any()


def test_mask_zero_takes_a_tokenizer_without_the_padding(tmp_path):
    layers, arrays = imdb(), imdb_arrays()
    layers[1]["config"]["mask_zero"] = True
    path = written(tmp_path / "imdb.keras", layers, arrays)
    fewer = keras_files.read(path, units=keras_files.CHARS[1:])
    np.testing.assert_array_equal(fewer.tensors["embedding.weight"], arrays["layers/embedding/vars/0"][1:])
    assert not fewer.notes
    assert "token 0" in keras_files.read(path).notes[0]


def test_the_input_of_a_length_is_the_window(tmp_path):
    layers = imdb()
    layers[0]["config"]["batch_shape"] = [None, 200]
    assert keras_files.read(written(tmp_path / "imdb.keras", layers)).settings.train.window == 200


def changed(place, **config):
    """Keras's example with other settings of a layer."""

    def change(layers):
        layers[place]["config"] |= config

    return change


def inner(**config):
    def change(layers):
        layers[2]["config"]["layer"]["config"] |= config

    return change


def inserted(place, *some):
    return lambda layers: layers.__setitem__(slice(place, place), some)


def told(place, **entries):
    return lambda layers: layers[place].update(entries)


LAMBDA = layer("Lambda", "evil", function={"class_name": "__lambda__", "config": {"code": "4wAAAA=="}})
REFUSED = {
    "lambda": (inserted(2, LAMBDA), r"layer 'evil' \(Lambda\) is none of"),
    "a user's class": (told(2, registered_name="my_package>Bidirectional"), "'bidirectional' .* is a class of its user's"),
    "a user's module": (told(4, module="os"), "'dense' .* is a class of its user's"),
    "no module": (told(4, module=None), "'dense' .* is a class of its user's"),
    "GRU": (inserted(3, layer("GRU", "gru", units=3)), r"layer 'gru' \(GRU\) is none of"),
    "convolution": (inserted(2, layer("Conv1D", "conv1d", filters=3)), r"'conv1d' \(Conv1D\) is none of"),
    "a model as a layer": (inserted(2, {**sequential([]), "name": "x"}), r"'sequential' \(Sequential\) is none of"),
    "relu": (inner(activation="relu"), "'bidirectional' .* has activation = 'relu'"),
    "hard sigmoid": (inner(recurrent_activation="hard_sigmoid"), "'bidirectional' .*'hard_sigmoid'"),
    "an activation with code": (inner(activation={"class_name": "function"}), "'bidirectional' .* has activation = {"),
    "recurrent dropout": (inner(recurrent_dropout=0.2), "'bidirectional' .* recurrent_dropout = 0.2"),
    "both backwards": (inner(go_backwards=True), "'bidirectional' .* go_backwards = True"),
    "return_state": (inner(return_state=True), "'bidirectional' .* return_state = True"),
    "stateful": (inner(stateful=True), "'bidirectional' .* stateful = True"),
    "a setting of tomorrow": (changed(4, peephole=True), "'dense' .* peephole = True"),
    "quantised": (changed(4, quantization_config={"bits": 4}), "'dense' .* quantization_config = "),
    "other type": (changed(1, dtype={"class_name": "QuantizedDTypePolicy"}), "'embedding' .* dtype = "),
    "sum": (changed(2, merge_mode="sum"), "'bidirectional' .* merge_mode = 'sum'"),
    "of GRU": (changed(2, layer=layer("GRU", "g")), "'bidirectional' .* is of 'GRU'"),
    "of nothing": (changed(2, layer=None), "'bidirectional' .* is of no layer"),
    "forward twice": (changed(2, backward_layer=lstm("x", True)), "'bidirectional' .* go"),
    "other units": (inner(units=8), "'bidirectional' .* another units in each direction"),
    "units that are not those": (lambda layers: layers.__setitem__(2, both("bidirectional", True, 8)), "units = 8, .* have 16"),
    "two ends": (lambda layers: layers.__setitem__(2, both("bidirectional", False)), "a layer behind it reads steps"),
    "one way behind both": (inserted(3, lstm("lstm", True)), r"'lstm' \(LSTM\) comes behind Bidirectional"),
    "a pool of one": (inserted(4, layer("GlobalMaxPooling1D", "pool")), "gives its end alone"),
    "softmax of one": (changed(4, activation="softmax"), "'dense' .* activation = softmax"),
    "relu before the last": (inserted(4, layer("Dense", "d", units=1, activation="relu")), "'d' .* activation = 'relu'"),
    "sigmoid twice": (inserted(5, layer("Activation", "a", activation="sigmoid")), "'a' .* activation = sigmoid"),
    "no dense": (lambda layers: layers.pop(), "has no LSTM, or no Dense"),
    "no layers": (lambda layers: layers.clear(), "has no LSTM, or no Dense"),
    "twice the name": (changed(3, name="bidirectional"), "two layers named 'bidirectional'"),
    "no name": (changed(3, name=7), "a layer is called 7"),
    "a long name": (inserted(2, layer("Lambda", "x\n" * 999)), "is none of"),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_the_same_is_refused_by_the_name_of_its_layer(what, tmp_path, capsys):
    change, says = REFUSED[what]
    layers = imdb()
    change(layers)
    path = tmp_path / "model.keras"
    path.write_bytes(archive(sequential(layers), hdf5(imdb_arrays())))
    (tmp_path / "labels").write_text("neg\npos\n")
    (tmp_path / "tokenizer.json").write_text(json.dumps({"kind": "char", "units": keras_files.CHARS}))
    words = ["--tokenizer", tmp_path / "tokenizer.json", "--labels", tmp_path / "labels", "--out", tmp_path / "out"]
    assert import_.main([str(path), *map(str, words)]) == 2
    assert re.fullmatch(f"dllm: .*{says}.*\n", capsys.readouterr().err)
    assert not (tmp_path / "out").exists()


def dense_of(classes):
    """Keras's example with another number of classes."""
    layers, arrays, rng = imdb(), imdb_arrays(), np.random.default_rng(5)
    layers[4]["config"] |= {"units": classes, "activation": "softmax"}
    arrays |= {"layers/dense/vars/0": rng.random((32, classes), "f4"), "layers/dense/vars/1": rng.random(classes, "f4")}
    return layers, arrays


@pytest.mark.parametrize("labels", [(), ("A", "B"), ("A", "B", "C", "D")])
def test_labels_must_be_as_many_as_there_are_classes(labels, tmp_path):
    path = written(tmp_path / "model.keras", *dense_of(3))
    with pytest.raises(UserError, match=f"has 3 classes, and {len(labels)} labels are named: --labels A,B"):
        keras_files.read(path, labels)


def test_classes_are_put_into_the_order_of_their_labels(tmp_path):
    layers, arrays = dense_of(3)
    found = keras_files.read(written(tmp_path / "model.keras", layers, arrays), ("z", "a", "m"))
    assert found.labels == ("a", "m", "z")
    np.testing.assert_array_equal(found.tensors["output.weight"], arrays["layers/dense/vars/0"].T[[1, 2, 0]])


@pytest.mark.parametrize("words", ["A", "A,A", "A,", ",", "A,\x1b[2J"])
def test_labels_that_are_none_are_refused(words, tmp_path, capsys):
    (tmp_path / "tokenizer.json").write_text(json.dumps({"kind": "byte"}))
    path = str(written(tmp_path / "model.keras"))
    code = import_.main([path, "--tokenizer", str(tmp_path / "tokenizer.json"), "--out", "out", "--labels", words])
    assert code == 2
    assert re.fullmatch("dllm: .*label.*\n", capsys.readouterr().err)
