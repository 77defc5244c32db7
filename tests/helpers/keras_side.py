"""What Keras does in its own environment: opens models of dllm and goes on with them, makes models for dllm.

python keras_side.py FOLDER [TORCH]. Of FOLDER/ours/*/model.keras and x.npz it writes said.npz, and again.keras after a fit; of
its own FOLDER/theirs/NAME.keras, NAME.weights.h5 and NAME.npz. TORCH: where torch is, which serves in the place of TensorFlow.
"""

import importlib.util
import os
import pathlib
import sys

os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
if importlib.util.find_spec("tensorflow") is None:
    sys.path.append(sys.argv[2])
    os.environ["KERAS_BACKEND"] = "torch"

import keras
import numpy as np
from keras import Input, Model, Sequential, layers

V, FRAME, LABELS, TEXTS, STEPS = 12, 7, 3, 4, 6


def say(model, x):
    return keras.ops.convert_to_numpy(model(x))


def use(folder):
    """What a model of dllm's says of texts that are padded behind and before, and after it was trained on."""
    given, path = np.load(folder / "x.npz"), folder / "model.keras"
    model = keras.saving.load_model(path)
    said = {side: say(model, given[side]) for side in ("behind", "before")}
    if "targets" in given:
        lm = model.layers[-1].name == "output"
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=lm)
        model.compile(keras.optimizers.Adam(0.01), loss, run_eagerly=True)  # to compile it would take longer
        said["losses"] = model.fit(given["whole"], given["targets"], epochs=5, verbose=0).history["loss"]
        model.save(folder / "again.keras")
        said["again"] = say(model, given["whole"])
    np.savez(folder / "said.npz", **said)


def chained(x, *some):
    y = x
    for one in some:
        y = one(y)
    return Model(x, y)


def models():
    """Name -> a model as users of Keras build them."""
    both, lstm, embedding = layers.Bidirectional, layers.LSTM, layers.Embedding
    return {
        "imdb": Sequential([Input((None,), dtype="int32"), embedding(V, 16), both(lstm(64, return_sequences=True)),
                            both(lstm(64)), layers.Dense(1, activation="sigmoid")]),
        "lm": Sequential([Input((None,)), embedding(V, 8), lstm(10, return_sequences=True), layers.Dropout(0.1),
                          lstm(10, return_sequences=True), layers.Dense(V)]),
        "lm-end": Sequential([Input((20,)), embedding(V, 8), lstm(10), layers.Dense(V, activation="softmax")]),
        "lm-one-hot": Sequential([Input((None, V)), lstm(10, return_sequences=True), layers.Dense(V), layers.Softmax()]),
        "mean-mask-zero": chained(Input((None,)), embedding(V, 8, mask_zero=True), layers.Dropout(0.2),
                             both(lstm(16, return_sequences=True)), layers.GlobalAveragePooling1D(),
                             layers.Dense(LABELS, activation="softmax")),
        "max": chained(Input((None,)), embedding(V, 8), layers.Masking(), both(lstm(20, return_sequences=True)),
                       both(lstm(20, return_sequences=True)), layers.GlobalMaxPooling1D(),
                       layers.Dense(7, "tanh", use_bias=False), layers.Dense(LABELS)),
        "tagger-mask-zero": Sequential([Input((None,)), embedding(V, 8, mask_zero=True), layers.SpatialDropout1D(0.1),
                              both(lstm(16, return_sequences=True, use_bias=False)), layers.Dense(LABELS),
                              layers.Activation("softmax")]),
        "frames": Sequential([Input((None, FRAME)), layers.Masking(-1.0), lstm(9, return_sequences=True, dropout=0.2),
                              layers.Dense(LABELS, "softmax", use_bias=False)]),
        "lambda": Sequential([Input((None,)), embedding(V, 8), layers.Lambda(lambda x: 2 * x), lstm(10), layers.Dense(V)]),
    }  # fmt: skip


def make(folder):
    rng = np.random.default_rng(3)
    for name, model in models().items():
        for weight in model.trainable_weights:
            weight.assign(rng.uniform(-0.6, 0.6, weight.shape).astype("f4"))
        x = rng.integers(1, V, (TEXTS, STEPS))
        x = rng.standard_normal((TEXTS, STEPS, FRAME)).astype("f4") if name == "frames" else x
        said = say(model, np.eye(V, dtype="f4")[x] if name == "lm-one-hot" else x)
        model.save(folder / f"{name}.keras")
        model.save_weights(folder / f"{name}.weights.h5")
        np.savez(folder / f"{name}.npz", x=x, said=said)


if __name__ == "__main__":
    root = pathlib.Path(sys.argv[1])
    for path in sorted((root / "ours").iterdir()):
        use(path)
    (root / "theirs").mkdir()
    make(root / "theirs")
    print(keras.__version__, keras.backend.backend())
