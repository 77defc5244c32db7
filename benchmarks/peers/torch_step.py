"""The peer of a training step: nn.LSTM under DistributedDataParallel with gloo, random tokens, SGD with clipping.

    torchrun --nproc-per-node 2 benchmarks/peers/torch_step.py SIZE STEPS {fp32,bf16}

Rank 0 prints one JSON line: {"seconds": of the median step, "peak_rss_bytes"}. One thread a rank. bf16: autocast.
"""

import json
import pathlib
import resource
import statistics
import sys
import time

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))
from sizes import NETWORK, SIZES


class Model(nn.Module):
    def __init__(self, size):
        super().__init__()
        self.embedding = nn.Embedding(size.vocabulary, size.hidden)
        self.lstm = nn.LSTM(size.hidden, size.hidden, size.layers)
        self.output = nn.Linear(size.hidden, size.vocabulary)

    def forward(self, tokens, state):
        hidden, state = self.lstm(self.embedding(tokens), state)
        return self.output(hidden), state


def main():
    size, steps, bf16 = {**SIZES, "network": NETWORK}[sys.argv[1]], int(sys.argv[2]), sys.argv[3] == "bf16"
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    model = DistributedDataParallel(Model(size))
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    shape = (size.window, size.lanes)
    state = tuple(torch.zeros(size.layers, size.lanes, size.hidden) for _ in range(2))
    seconds = []
    for _ in range(steps):
        tokens, targets = torch.randint(size.vocabulary, shape), torch.randint(size.vocabulary, shape)
        begin = time.perf_counter()
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
            logits, state = model(tokens, state)
        F.cross_entropy(logits.float().view(-1, size.vocabulary), targets.view(-1)).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        optimizer.step()
        state = tuple(part.detach().float() for part in state)
        seconds.append(time.perf_counter() - begin)
    if dist.get_rank() == 0:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        seconds = seconds[2:]
        found = {"seconds": statistics.median(seconds), "mean": statistics.mean(seconds), "peak_rss_bytes": peak}
        print(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
