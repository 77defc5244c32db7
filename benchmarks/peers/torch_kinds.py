"""The peer of presets seq2seq, tagger and classifier: the same of packed nn.LSTM, under DistributedDataParallel with gloo.

    torchrun --nproc-per-node 2 benchmarks/peers/torch_kinds.py PRESET CORPUS [--steps N | --epochs N] [--beam 5]

It learns from the very batches that dllm learns from, which are sorted by length, with Adam, clipping and the preset's rates.
What makes a batch is not counted. Rank 0 prints one JSON line: {"tokens_per_second": of each 20 steps, "seconds": of training,
"parameters"}. --steps 0 is all epochs of the preset. --beam N: and the scores of the test split's translations by a beam
search of N. One thread a rank.
"""

import argparse
import itertools
import json
import time

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from dllm import config
from dllm.data.corpus import Corpus
from dllm.data.lane_kinds import read_lanes
from dllm.data.lanes import deal
from dllm.inference import answering, scores
from dllm.training.optim import learning_rate

EVERY = 20  # steps between what is told
TOGETHER = 64  # sources that are translated at a time
NEVER = -1e9


class Encoder(nn.Module):
    """Tokens (S,B) of some lengths to what nn.LSTM makes of them, (S,B,M), and its last states (B,M)."""

    def __init__(self, model, layers):
        super().__init__()
        dropout = model.dropout if layers > 1 else 0.0
        self.lstm = nn.LSTM(model.embedding, model.hidden, layers, dropout=dropout, bidirectional=model.bidirectional)
        self.columns = model.hidden * (1 + model.bidirectional)

    def forward(self, x, lengths):
        packed, (ends, _) = self.lstm(pack_padded_sequence(x, lengths, enforce_sorted=False))
        m, _ = pad_packed_sequence(packed, total_length=len(x))
        return m, torch.cat(list(ends[-self.columns // self.lstm.hidden_size :]), 1)


class Labelling(nn.Module):
    """The tagger, and the classifier, which pools."""

    def __init__(self, model, vocabulary, labels):
        super().__init__()
        self.model, self.embedding = model, nn.Embedding(vocabulary, model.embedding)
        self.encoder, self.drop = Encoder(model, model.layers), nn.Dropout(model.dropout)
        top = model.projection or self.encoder.columns
        self.projection = nn.Linear(self.encoder.columns, top, bias=False) if model.projection else None
        self.output = nn.Linear(top, labels)

    def forward(self, inputs, lengths, before):
        m, ends = self.encoder(self.drop(self.embedding(inputs)), lengths)
        if self.model.kind == "classifier":
            outside = (torch.arange(len(m))[:, None] >= lengths)[..., None]
            if self.model.pool == "max":
                m = m.masked_fill(outside, NEVER).amax(0)
            elif self.model.pool == "mean":
                m = m.sum(0) / lengths[:, None]
            else:
                m = ends
        m = self.drop(m)
        if self.projection is not None:
            m = self.drop(torch.tanh(self.projection(m)))
        return self.output(m)


class Translating(nn.Module):
    """Attention between two decoders (Luong et al. 2015), without feeding it back, so that none has a loop over time."""

    def __init__(self, model, vocabulary, labels):
        super().__init__()
        self.embedding, self.encoder = nn.Embedding(vocabulary, model.embedding), Encoder(model, model.encoder_layers)
        H, M = model.hidden, self.encoder.columns
        self.bridge, self.keys = nn.Linear(M, H, bias=False), nn.Linear(M, H, bias=False)
        self.below, self.drop = nn.LSTM(model.embedding, H), nn.Dropout(model.dropout)
        self.above = nn.LSTM(H + M, H, model.layers - 1, dropout=model.dropout if model.layers > 2 else 0.0)
        self.combine = nn.Linear(H + M, model.embedding, bias=False)
        self.output = nn.Linear(model.embedding, vocabulary)
        self.output.weight = self.embedding.weight

    def forward(self, inputs, lengths, before):
        return self.decode(before, *self.encode(inputs, lengths))[0]

    def encode(self, inputs, lengths):
        """What a decoder needs: the memory (B,S,M), its keys (B,S,H), what lies outside (B,1,S), and its first states."""
        m, ends = self.encoder(self.drop(self.embedding(inputs)), lengths)
        m = self.drop(m).transpose(0, 1)
        first = torch.tanh(self.bridge(ends))[None]
        outside = (torch.arange(len(inputs)) >= lengths[:, None])[:, None]
        state = first, torch.zeros_like(first)
        above = tuple(part.expand(self.above.num_layers, -1, -1).contiguous() for part in state)
        return m, self.keys(m), outside, (state, above)

    def decode(self, before, m, k, outside, states):
        h, below = self.below(self.drop(self.embedding(before)), states[0])
        attended = torch.bmm(h.transpose(0, 1), k.transpose(1, 2)).masked_fill(outside, NEVER).softmax(2)
        c = torch.bmm(attended, m).transpose(0, 1)
        h, above = self.above(self.drop(torch.cat([h, c], 2)), states[1])
        return self.output(self.drop(torch.tanh(self.combine(torch.cat([h, c], 2))))), (below, above)


def begin(module, model):
    """The same beginning as dllm's: uniform, and the forget gate's bias."""
    for name, parameter in module.named_parameters():
        extent = model.init_output if name.startswith(("embedding", "output")) else model.hidden**-0.5
        nn.init.uniform_(parameter, -extent, extent)
        if ".bias_" in name:
            nn.init.zeros_(parameter)
            if ".bias_ih" in name:
                parameter.data[model.hidden : 2 * model.hidden] = model.forget_bias
        if name == "output.bias":
            nn.init.zeros_(parameter)


def batches(corpus, settings, ranks, rank):
    """This rank's, epoch by epoch, without the last window, which not every lane has."""
    train = settings.train
    lanes = read_lanes(corpus, "train", deal(train.lanes, ranks, rank), train.lanes, train.window, kind=settings.model.kind)
    for epoch in range(train.epochs):
        lanes.arrange(train.seed, epoch)
        for place in range(lanes.most(corpus, "train") // train.lanes):
            yield [None if part is None else torch.from_numpy(part) for part in lanes.window(place, train.window)]


def train(module, corpus, settings, steps):
    """Tokens a second of each EVERY steps of all ranks, and the seconds of all."""
    ranks, rank, train = dist.get_world_size(), dist.get_rank(), settings.train
    parallel, optimizer = DistributedDataParallel(module), torch.optim.Adam(module.parameters(), lr=train.lr)
    criterion = nn.CrossEntropyLoss(ignore_index=-1, label_smoothing=train.smoothing)
    total = (
        steps or corpus.split("train")["pairs" if settings.model.kind == "seq2seq" else "records"] // train.lanes * train.epochs
    )
    rates, seconds, all_seconds = [], 0.0, 0.0
    tokens = torch.zeros(1)
    for step, (inputs, targets, lengths, before) in enumerate(itertools.islice(batches(corpus, settings, ranks, rank), total)):
        dist.barrier()
        start = time.perf_counter()
        optimizer.param_groups[0]["lr"] = learning_rate(train, step, 0, 1.0, total)
        optimizer.zero_grad()
        criterion(parallel(inputs, lengths, before).flatten(0, -2), targets.flatten()).backward()
        nn.utils.clip_grad_norm_(module.parameters(), train.clip)
        optimizer.step()
        seconds += time.perf_counter() - start
        tokens += lengths.sum() + (0 if before is None else (targets >= 0).sum())  # those that are read, as dllm counts them
        if (step + 1) % EVERY == 0:
            dist.all_reduce(tokens)
            rates.append(tokens.item() / seconds)
            all_seconds += seconds
            tokens, seconds = torch.zeros(1), 0.0
    return rates, all_seconds + seconds


@torch.inference_mode()
def translate(module, sources, tokenizer, width):
    """The best ended text of each source, by log P / ((5 + n) / 6)."""
    lengths = torch.tensor([len(source) for source in sources])
    inputs = nn.utils.rnn.pad_sequence([torch.from_numpy(np.asarray(source, np.int64)) for source in sources])
    B, limit = len(sources), 2 * int(lengths.max()) + 20
    m, k, outside, states = module.encode(inputs, lengths)
    m, k, outside = (part.repeat_interleave(width, 0) for part in (m, k, outside))
    states = [tuple(part.repeat_interleave(width, 1) for part in state) for state in states]
    last, alive = torch.full((1, B * width), tokenizer.sep), torch.full((B, width), NEVER)
    alive[:, 0] = 0
    texts, found = torch.zeros(B, width, 0, dtype=torch.int64), [(NEVER, []) for _ in sources]
    for length in range(1, limit + 1):
        logits, states = module.decode(last, m, k, outside, states)
        logp = alive[:, :, None] + logits[0].log_softmax(1).view(B, width, -1)
        ended, divisor = logp[:, :, tokenizer.end].clone(), (5 + length) / 6
        logp[:, :, [tokenizer.end, tokenizer.sep]] = NEVER
        V = logp.shape[2]
        alive, places = logp.flatten(1).topk(width)
        for number in range(B):
            best, text = (ended[number] / divisor).max(0)
            if best > found[number][0]:
                found[number] = best.item(), texts[number, text].tolist()
        rows = places // V
        texts = torch.cat([texts.gather(1, rows[..., None].expand_as(texts)), (places % V)[..., None]], 2)
        order = (rows + width * torch.arange(B)[:, None]).flatten()
        states = [tuple(part[:, order] for part in state) for state in states]
        last = (places % V).view(1, -1)
        bound = alive[:, 0] / ((5 + limit) / 6)  # log P only falls
        if all(bound[number] <= found[number][0] for number in range(B)):
            break
    return [text for _, text in found]


def score(module, corpus, width):
    """What scores.measure says of the test split."""
    pairs, tokenizer, texts = answering.read_split(corpus, "test"), corpus.tokenizer, {}
    module.eval()
    order = sorted(range(len(pairs)), key=lambda number: len(pairs[number].source))
    for start in range(0, len(order), TOGETHER):
        some = order[start : start + TOGETHER]
        found = translate(module, [pairs[number].source for number in some], tokenizer, width)
        texts |= {n: answering.as_text(tokenizer, np.array(text, np.int64)) for n, text in zip(some, found, strict=True)}
    return scores.measure([pair.text for pair in pairs], [texts[number] for number in range(len(pairs))])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("preset")
    parser.add_argument("corpus")
    parser.add_argument("--steps", type=int, default=0)
    parser.add_argument("--epochs", type=int, default=0)
    parser.add_argument("--beam", type=int, default=0)
    options = parser.parse_args()
    epochs = [f"train.epochs={options.epochs}"] if options.epochs else []
    settings, corpus = config.resolve(options.preset, settings=epochs), Corpus(options.corpus)
    torch.set_num_threads(1)
    torch.manual_seed(settings.train.seed)
    dist.init_process_group("gloo")
    torch.manual_seed(settings.train.seed + dist.get_rank())
    module = (Translating if settings.model.kind == "seq2seq" else Labelling)(
        settings.model, corpus.vocabulary, len(corpus.labels)
    )
    begin(module, settings.model)
    rates, seconds = train(module, corpus, settings, options.steps)
    if dist.get_rank() == 0:
        found = {"tokens_per_second": rates, "seconds": seconds, "parameters": sum(p.numel() for p in module.parameters())}
        print(json.dumps(found | (score(module, corpus, options.beam) if options.beam else {})))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
