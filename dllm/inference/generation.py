"""Texts that a trained model continues: sampling and beam search."""

import math

import numpy as np

from ..errors import UserError
from ..kernels.sample import BAD, Choice
from ..model.decoder import Decoder

NOT_FINITE = "the model's numbers are not finite: nothing can be drawn from it; train again with a lower train.lr"


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
