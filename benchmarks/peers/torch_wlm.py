"""The peer of preset wlm-200: PyTorch's word_language_model recipe (2 x 200 LSTM, tied, dropout 0.2, SGD at 20, divided by
4 when validation stalls, clip 0.25, window 35, batch 20, evaluation batch 10) on a folder of train.txt and valid.txt.

    python benchmarks/peers/torch_wlm.py FOLDER [--epochs 1] [--threads 2] [--seed 1]

Prints a line an epoch and ends with one JSON line: {"seed", "threads", "valid_perplexity", "train_seconds", "seconds"}.
"""

import argparse
import collections
import json
import math
import pathlib
import time

import torch
import torch.nn as nn
import torch.nn.functional as F


class Model(nn.Module):
    def __init__(self, vocabulary, width, layers, dropout):
        super().__init__()
        self.drop = nn.Dropout(dropout)
        self.embedding = nn.Embedding(vocabulary, width)
        self.lstm = nn.LSTM(width, width, layers, dropout=dropout)
        self.output = nn.Linear(width, vocabulary)
        nn.init.uniform_(self.embedding.weight, -0.1, 0.1)
        nn.init.zeros_(self.output.bias)
        self.output.weight = self.embedding.weight

    def forward(self, tokens, state):
        hidden, state = self.lstm(self.drop(self.embedding(tokens)), state)
        return self.output(self.drop(hidden)), state


def read(path, ids):
    """All words of a file with one <eos> a line; `ids` grows in order of first appearance."""
    with open(path, encoding="utf-8") as file:
        return torch.tensor([ids[word] for line in file for word in [*line.split(), "<eos>"]])


def lanes(tokens, batch):
    length = len(tokens) // batch
    return tokens[: length * batch].view(batch, length).t().contiguous()


def windows(data, window):
    for start in range(0, len(data) - 1, window):
        stop = min(start + window, len(data) - 1)
        yield data[start:stop], data[start + 1 : stop + 1].reshape(-1)


def evaluate(model, data, window):
    model.eval()
    total, state = 0.0, None
    with torch.no_grad():
        for tokens, targets in windows(data, window):
            logits, state = model(tokens, state)
            total += len(tokens) * F.cross_entropy(logits.flatten(0, 1), targets).item()
    return total / (len(data) - 1)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=pathlib.Path)
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(arguments.seed)

    ids = collections.defaultdict(lambda: len(ids))
    train = lanes(read(arguments.folder / "train.txt", ids), 20)
    valid = lanes(read(arguments.folder / "valid.txt", ids), 10)
    window, lr, best, train_seconds, begin = 35, 20.0, math.inf, 0.0, time.perf_counter()
    model = Model(len(ids), 200, 2, 0.2)
    for epoch in range(1, arguments.epochs + 1):
        model.train()
        state, start, total = None, time.perf_counter(), 0.0
        for step, (tokens, targets) in enumerate(windows(train, window), 1):
            state = state and tuple(part.detach() for part in state)
            model.zero_grad()
            logits, state = model(tokens, state)
            loss = F.cross_entropy(logits.flatten(0, 1), targets)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 0.25)
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.add_(parameter.grad, alpha=-lr)
            total += loss.item()
            if step % 200 == 0:
                print(f"epoch {epoch} step {step} loss {total / 200:.4f} {time.perf_counter() - start:.0f} s", flush=True)
                total = 0.0
        train_seconds += time.perf_counter() - start
        loss = evaluate(model, valid, window)
        best, lr = (loss, lr) if loss < best else (best, lr / 4)
        print(f"epoch {epoch} valid loss {loss:.4f} perplexity {math.exp(loss):.2f}", flush=True)
    print(
        json.dumps(
            {
                "seed": arguments.seed,
                "threads": arguments.threads,
                "valid_perplexity": math.exp(best),
                "train_seconds": train_seconds,
                "seconds": time.perf_counter() - begin,
            }
        )
    )


if __name__ == "__main__":
    main()
