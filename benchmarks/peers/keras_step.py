"""A peer of a training step: Keras on TensorFlow, one process, random tokens, SGD with clipping.

    python benchmarks/peers/keras_step.py SIZE STEPS THREADS

Prints one JSON line: {"seconds": of the median step}, of model.fit or of train_on_batch, whichever is faster.
"""

import json
import os
import pathlib
import statistics
import sys
import time

os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
import numpy as np
import tensorflow as tf

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))
from sizes import SIZES


def main():
    size, steps, threads = SIZES[sys.argv[1]], int(sys.argv[2]), int(sys.argv[3])
    tf.config.threading.set_intra_op_parallelism_threads(threads)
    tf.config.threading.set_inter_op_parallelism_threads(1)
    layers = tf.keras.layers
    model = tf.keras.Sequential(
        [layers.Embedding(size.vocabulary, size.hidden)]
        + [layers.LSTM(size.hidden, return_sequences=True) for _ in range(size.layers)]
        + [layers.Dense(size.vocabulary)]
    )
    loss = tf.keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer=tf.keras.optimizers.SGD(1.0, global_clipnorm=5.0), loss=loss)
    tokens, targets = np.random.default_rng(1).integers(0, size.vocabulary, (2, steps * size.lanes, size.window))
    seconds = []
    for step in range(steps):
        part = slice(step * size.lanes, (step + 1) * size.lanes)
        begin = time.perf_counter()
        model.train_on_batch(tokens[part], targets[part])
        seconds.append(time.perf_counter() - begin)
    begin = time.perf_counter()
    model.fit(tokens, targets, batch_size=size.lanes, shuffle=False, verbose=0)
    fit = (time.perf_counter() - begin) / steps
    print(json.dumps({"seconds": min(fit, statistics.median(seconds[2:]))}))


if __name__ == "__main__":
    main()
