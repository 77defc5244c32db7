"""The peer of a training step: nn.LSTM under DistributedDataParallel with gloo, random tokens, SGD with clipping.

    torchrun --nproc-per-node 2 benchmarks/torch_step.py SIZE STEPS

Rank 0 prints the median seconds of a step. One thread a rank.
"""

import statistics
import sys
import time

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from sizes import SIZES
from torch.nn.parallel import DistributedDataParallel


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
    size, steps = SIZES[sys.argv[1]], int(sys.argv[2])
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
        logits, state = model(tokens, state)
        F.cross_entropy(logits.view(-1, size.vocabulary), targets.view(-1)).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        optimizer.step()
        state = tuple(part.detach() for part in state)
        seconds.append(time.perf_counter() - begin)
    if dist.get_rank() == 0:
        print(statistics.median(seconds[2:]))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
