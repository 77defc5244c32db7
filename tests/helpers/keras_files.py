"""Files as Keras writes them, made by json, zipfile and h5py alone, and what dllm reads of them."""

import io
import json
import zipfile

import h5py
import numpy as np

from dllm.data.tokenizers import CharTokenizer
from dllm.exchange import imports

V, E, H = 12, 8, 16
CHARS = list("abcdefghijkl")
FLOAT = {"module": "keras", "class_name": "DTypePolicy", "config": {"name": "float32"}, "registered_name": None}


def layer(kind, name, **config):
    """A layer as config.json has it."""
    known = {"name": name, "trainable": True, "dtype": FLOAT, **config}
    return {"module": "keras.layers", "class_name": kind, "config": known, "registered_name": None}


def lstm(name, sequences, backwards=False, units=H, **config):
    known = {
        "units": units,
        "activation": "tanh",
        "recurrent_activation": "sigmoid",
        "use_bias": True,
        "recurrent_dropout": 0.0,
    }
    return layer("LSTM", name, return_sequences=sequences, go_backwards=backwards, **known, **config)


def both(name, sequences, units=H):
    inner = lstm(f"forward_{name}", sequences, units=units), lstm(f"backward_{name}", sequences, True, units=units)
    return layer("Bidirectional", name, merge_mode="concat", layer=inner[0], backward_layer=inner[1])


def imdb():
    """The layers of Keras's example "Bidirectional LSTM on IMDB"."""
    return [
        layer("InputLayer", "input_layer", batch_shape=[None, None]),
        layer("Embedding", "embedding", input_dim=V, output_dim=E, mask_zero=False),
        both("bidirectional", True),
        both("bidirectional_1", False),
        layer("Dense", "dense", units=1, activation="sigmoid", use_bias=True),
    ]


def imdb_arrays(units=H):
    """Path -> array of their weights."""
    rng, cells = np.random.default_rng(4), {}
    for number, inputs in enumerate((E, 2 * units)):
        for way in ("forward", "backward"):
            for place, shape in enumerate([(inputs, 4 * units), (units, 4 * units), (4 * units,)]):
                group = "layers/bidirectional" + f"_{number}" * (number > 0)
                cells[f"{group}/{way}_layer/cell/vars/{place}"] = rng.uniform(-1, 1, shape).astype("f4")
    dense = {"layers/dense/vars/0": rng.uniform(-1, 1, (2 * units, 1)).astype("f4"), "layers/dense/vars/1": np.ones(1, "f4")}
    return {"layers/embedding/vars/0": rng.uniform(-1, 1, (V, E)).astype("f4"), **cells, **dense}


def hdf5(arrays, change=None, **options):
    """The bytes of an HDF5 file; change(h5py.File): what is done to it."""
    packed = io.BytesIO()
    with h5py.File(packed, "w", **options) as file:
        file.create_group("vars").attrs["name"] = "sequential"
        for name, array in arrays.items():
            file[name] = array
        if change is not None:
            change(file)
    return packed.getvalue()


def sequential(layers):
    """config.json of a Sequential model."""
    config = {"name": "sequential", "trainable": True, "dtype": FLOAT, "layers": layers, "build_input_shape": [None, None]}
    return {"module": "keras", "class_name": "Sequential", "config": config, "registered_name": None, "compile_config": None}


def archive(described, weights):
    """The bytes of a .keras: what config.json says, and model.weights.h5."""
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as members:
        members.writestr("metadata.json", json.dumps({"keras_version": "3.15.1", "date_saved": "2026-01-01@00:00:00"}))
        members.writestr("config.json", described if isinstance(described, bytes) else json.dumps(described))
        members.writestr("model.weights.h5", weights)
    return packed.getvalue()


def read(path, labels=("neg", "pos"), units=CHARS):
    """What dllm reads of a file: an Imported. Raises UserError."""
    return imports.read(imports.Asked(str(path), CharTokenizer(list(units)), tuple(labels)))
