"""A trained model at work: the loss over a split, by all ranks together, sampling and beam search."""

import functools
import math

import numpy as np

from ..comm.runtime import allgather, together
from ..data.lanes import Schedule, deal
from ..data.pair_lanes import read_lanes
from ..errors import UserError
from ..kernels.sample import BAD, Choice
from ..model.decoder import Decoder
from ..model.language_model import LanguageModel

NOT_FINITE = "the model's numbers are not finite: nothing can be drawn from it; train again with a lower train.lr"


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
        self.fresh = corpus.tokenizer.pairs or config.train.carry == "window"
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
    decoder, choice, slot = Decoder(model, 1), Choice(1), np.zeros(1, np.int64)
    choice.temperature[:], choice.top_k[:], choice.top_p[:], choice.seed[:] = temperature, top_k, top_p, seed % 2**64
    _read(decoder, prompt, model.window)
    for position in range(tokens):
        choice.position[:] = position
        decoder.choose(choice, slot)
        if choice.token[0] == BAD:
            raise UserError(NOT_FINITE)
        yield int(choice.token[0])
        decoder.read(choice.token[None], slot)


def beam_search(model, prompt, tokens, beams, length_penalty=0.0, end=None):
    """The most likely continuation that a search of some width finds (Graves 2012): the tokens and their log-probability.

    Parameters
    ----------
    model, prompt
        As in `sample`.
    tokens : int
        How many at most.
    beams : int
        Continuations that are kept at each step: the most likely of all that go on from those of the step before.
    length_penalty : float
        alpha of Wu et al. 2016: log-probabilities of n tokens are compared after division by ((5 + n) / 6)^alpha.
    end : int, optional
        The token that ends a continuation, and is its last; none: all have `tokens` tokens.
    """
    most = min(beams, model.vocabulary)
    decoder, choice = Decoder(model, beams), Choice(beams, most)
    choice.temperature[:], choice.wanted[:] = 0, most
    worth = lambda total, length: total / ((5 + length) / 6) ** length_penalty
    _read(decoder, prompt, model.window)
    kept, ended = [([], 0.0)], []  # (tokens, log-probability), lane by lane, the most likely first
    for _ in range(tokens):
        slots = np.arange(len(kept))
        decoder.choose(choice, slots)
        if (choice.token[slots] == BAD).any():
            raise UserError(NOT_FINITE)
        further = [
            (total + float(choice.logprobs[lane, i]), lane, int(choice.tokens[lane, i]))
            for lane, (_, total) in enumerate(kept)
            for i in range(most)
        ]
        further.sort(key=lambda one: -one[0])
        further = [(total, lane, [*kept[lane][0], token]) for total, lane, token in further[:beams]]
        ended += [(text, total) for total, _, text in further if text[-1] == end]
        further = [one for one in further if one[2][-1] != end]
        best = max((worth(total, len(text)) for text, total in ended), default=-math.inf)
        if not further or (length_penalty == 0 and best >= further[0][0]):
            break  # what goes on only becomes less likely
        kept = [(text, total) for total, _, text in further]
        decoder.states[: len(kept)] = decoder.states[[lane for _, lane, _ in further]]
        decoder.read(np.array([[text[-1] for text, _ in kept]]), np.arange(len(kept)))
    else:
        ended += kept
    return max(ended, key=lambda one: worth(one[1], len(one[0])))


def _read(decoder, prompt, window):
    """Let stream 0 read a prompt, in windows."""
    for start in range(0, len(prompt), window):
        decoder.read(np.ascontiguousarray(prompt[start : start + window], np.int64)[:, None], np.zeros(1, np.int64))
