"""The peer of serving: the core of a server with nn.LSTM that batches as ours does, without prompts, queues or events.

    python benchmarks/peers/torch_serve.py SIZE STREAMS SECONDS THREADS

One step of all streams at a time: embedding, nn.LSTM over T = 1, logits, softmax, torch.multinomial over all rows; under
inference_mode, each stream's state in a slot of one tensor. Prints one JSON line: {"tokens_per_second", "gaps"}, seconds
between a stream's tokens, one for each step.
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
    size, streams, seconds = SIZES[sys.argv[1]], int(sys.argv[2]), float(sys.argv[3])
    torch.set_num_threads(int(sys.argv[4]))
    torch.manual_seed(1)
    embedding = nn.Embedding(size.vocabulary, size.hidden)
    lstm = nn.LSTM(size.hidden, size.hidden, size.layers)
    output = nn.Linear(size.hidden, size.vocabulary)
    tokens = torch.zeros(1, streams, dtype=torch.int64)
    state = tuple(torch.zeros(size.layers, streams, size.hidden) for _ in range(2))
    gaps = []
    with torch.inference_mode():
        for limit in (min(1, seconds), seconds):  # the first is for warming up
            gaps.clear()
            begin = last = time.perf_counter()
            while last < begin + limit:
                hidden, state = lstm(embedding(tokens), state)
                p = output(hidden[0]).softmax(-1)
                tokens = torch.multinomial(p, 1).view(1, streams)
                p.gather(1, tokens.view(streams, 1)).log().tolist()  # a server tells tokens and log-probabilities
                tokens.tolist()
                now = time.perf_counter()
                gaps.append(now - last)
                last = now
    print(json.dumps({"tokens_per_second": streams * len(gaps) / (last - begin), "gaps": gaps}))


if __name__ == "__main__":
    main()
