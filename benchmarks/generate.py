"""Generation by dllm a token at a time, greedy, one stream; the counterpart of peers/torch_generate.py.

    python -m benchmarks.generate SIZE TOKENS PRECISION

Prints one JSON line: {"tokens_per_second"}.
"""

import json
import sys
import time

import numpy as np

from dllm.config import ModelConfig
from dllm.inference.generation import Sampling, sample
from dllm.model.decoder import Decoder
from dllm.model.language_model import LanguageModel
from dllm.model.layout import Layout

from .sizes import SIZES


def main():
    size, count = SIZES[sys.argv[1]], int(sys.argv[2])
    config = ModelConfig(embedding=size.hidden, hidden=size.hidden, layers=size.layers)
    model = LanguageModel(Layout(config, size.vocabulary, np.float32), 1, 1, training=False)
    model.bind(np.zeros(model.layout.size, np.float32))
    model.initialise(1)
    decoder = Decoder(model, 1, sys.argv[3])  # with factors that are made once
    for _ in range(2):  # the first is for warming up
        begin = time.perf_counter()
        for _ in sample(decoder, np.zeros(1, np.int64), count, Sampling(temperature=0)):
            pass
        seconds = time.perf_counter() - begin
    print(json.dumps({"tokens_per_second": count / seconds}))


if __name__ == "__main__":
    main()
