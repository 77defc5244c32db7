"""The peer of generation: nn.LSTM a token at a time under no_grad, greedy, one stream.

    python benchmarks/peers/torch_generate.py SIZE TOKENS

Prints one JSON line: {"tokens_per_second"}. One thread.
"""

import json
import pathlib
import sys
import time

import torch
import torch.nn as nn

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))
from sizes import SIZES


def main():
    size, count = SIZES[sys.argv[1]], int(sys.argv[2])
    torch.set_num_threads(1)
    embedding = nn.Embedding(size.vocabulary, size.hidden)
    lstm = nn.LSTM(size.hidden, size.hidden, size.layers)
    output = nn.Linear(size.hidden, size.vocabulary)
    token, state = torch.zeros(1, 1, dtype=torch.int64), None
    with torch.no_grad():
        for _turn in range(2):  # the first is for warming up
            begin = time.perf_counter()
            for _ in range(count):
                hidden, state = lstm(embedding(token), state)
                token = output(hidden).argmax(-1)
            seconds = time.perf_counter() - begin
    print(json.dumps({"tokens_per_second": count / seconds}))


if __name__ == "__main__":
    main()
