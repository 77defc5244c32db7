"""A trained model at work: the loss over a split, by all ranks together, and sampling."""

import functools
import math

import numpy as np

from .comm.runtime import allgather, together
from .data.lanes import Schedule, deal
from .data.pair_lanes import read_lanes
from .errors import UserError
from .model import LanguageModel


class Evaluation:
    """The loss of a split, its lanes dealt over the ranks; planned once, run as often as wanted. Collective.

    Parameters
    ----------
    comm : MPI.Comm
    corpus : Corpus
    split : str
    config : Config
    dtype : numpy dtype
    team : kernels.team.Team, optional
        Threads that share the work.
    private : bool
        Every rank has a corpus of its own; their lanes add up.
    """

    def __init__(self, comm, corpus, split, config, dtype, private=False, team=None):
        self.comm, self.split = comm, split
        entry = corpus.split(split)
        ranks, rank = (1, 0) if private else (comm.size, comm.rank)
        wanted = config.train.eval_lanes or config.train.lanes
        most = entry["pairs"] if corpus.tokenizer.pairs else entry["tokens"] // 2
        count = max(1, min(wanted // comm.size if private else wanted, most))
        window = max(config.train.window, *allgather(comm, entry.get("longest", 0)))
        with together(comm):
            self.lanes = read_lanes(corpus, split, deal(count, ranks, rank), count, window)
        self.schedule = Schedule(self.lanes, gather=functools.partial(allgather, comm))
        self.fresh = config.train.carry == "window"
        sizes = comm.allgather((entry["tokens"], entry["bytes"])) if private else [(entry["tokens"], entry["bytes"])]
        self.bytes_per_token = sum(size for _, size in sizes) / sum(tokens for tokens, _ in sizes)
        width = len(self.lanes.starts)
        shape = config.model, corpus.vocabulary, dtype, window, width
        self.model = LanguageModel(*shape, training=False, team=team)

    def run(self, theta, beat=lambda: None):
        """{"split", "tokens", "loss", "perplexity", "window_perplexity", "bits_per_token", "bits_per_byte"} of theta (P,).

        loss in nats a token; perplexity is its exponential, window_perplexity the mean of exp(loss of a window), as some
        papers have it. beat() is called after each window.
        """
        B, config = len(self.lanes.starts), self.model.config
        self.model.bind(theta)
        h = np.zeros((config.layers, B, config.hidden), self.model.dtype)
        c = np.zeros_like(h)
        totals = np.zeros(self.schedule.windows)
        with together(self.comm):
            for number in range(self.schedule.windows if B else 0):
                tokens, targets = self.lanes.window(number, self.schedule.width(number))
                if self.fresh:
                    h[:], c[:] = 0, 0
                totals[number] = self.model.forward(tokens, targets, h, c).sum(dtype=np.float64)
                beat()
        tokens = self.schedule.per_epoch
        totals = sum(allgather(self.comm, totals))
        loss = float(totals.sum()) / tokens
        losses = totals / [self.schedule.tokens(number) for number in range(self.schedule.windows)]
        return {
            "split": self.split, "tokens": tokens, "loss": loss, "perplexity": math.exp(min(loss, 700)),
            "window_perplexity": float(np.exp(np.minimum(losses, 700)).mean()),
            "bits_per_token": loss / math.log(2), "bits_per_byte": loss / math.log(2) / self.bytes_per_token,
        }  # fmt: skip


def start_tokens(tokenizer, prompt):
    """Token numbers (n,) of a prompt; of an empty one a line's end, or token 0 where the vocabulary has none."""
    tokens = tokenizer.encode(prompt.encode(), end=False)
    if len(tokens) == 0:
        try:
            tokens = tokenizer.encode(b"\n", end=False)
        except UserError:
            tokens = np.zeros(1, np.int64)
    return tokens


def sample(model, prompt, tokens, seed=1, temperature=1.0, top_k=0, top_p=1.0):
    """Yield token numbers that continue a prompt.

    Parameters
    ----------
    model : LanguageModel
        For one lane; the prompt is read in its windows.
    prompt : (n,) int64, n at least 1
    tokens : int
        How many to yield.
    seed : int
    temperature : float
        0: always the most likely token.
    top_k : int
        Choose among the k most likely; 0: among all.
    top_p : float
        Choose among the most likely that together have this probability (Holtzman et al. 2020).
    """
    generator = np.random.default_rng(seed)
    config = model.config
    h = np.zeros((config.layers, 1, config.hidden), model.dtype)
    c = np.zeros_like(h)
    for start in range(0, len(prompt), model.window):
        logits = model.logits(np.asarray(prompt[start : start + model.window])[:, None], h, c)
    for _ in range(tokens):
        token = _choose(logits[0].astype(np.float64), generator, temperature, top_k, top_p)
        yield token
        logits = model.logits(np.array([[token]]), h, c)


def _choose(logits, generator, temperature, top_k, top_p):
    """A token number drawn from softmax(logits / temperature), logits (V,), cut to top_k and top_p."""
    if temperature == 0:
        return int(logits.argmax())
    order = np.argsort(-logits, kind="stable")
    order = order[: top_k or None]
    p = np.exp((logits[order] - logits[order[0]]) / temperature)
    p /= p.sum()
    inside = np.cumsum(p) - p < top_p
    p = np.where(inside, p, 0)
    return int(order[generator.choice(len(p), p=p / p.sum())])
