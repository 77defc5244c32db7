"""Texts that a trained model continues: sampling and beam search. All of it runs on a Decoder, so that what a text becomes
does not depend on what else is continued at the same time, to the bit.
"""

from __future__ import annotations

import codecs
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..data.tokenizers import Tokenizer
from ..errors import UserError
from ..kernels.sample import BAD, Choice
from ..kernels.types import Array
from ..model.decoder import Decoder
from .loaded_model import LoadedModel

NOT_FINITE = "the model's numbers are not finite: nothing can be drawn from it; train again with a lower train.lr"
WINDOW = 64  # tokens of a prompt that are read at a time


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How tokens are drawn (kernels/sample.py)."""

    temperature: float = 0.8  # 0: always the most likely token
    top_k: int = 0  # among the k most likely; 0: among all
    top_p: float = 1.0  # among the most likely that together have this probability (Holtzman et al. 2020)
    seed: int = 1


def start_tokens(tokenizer: Tokenizer, prompt: str) -> Array:
    """Token numbers (n,) of a prompt; of an empty one a line's end, or token 0 where the vocabulary has none."""
    tokens = tokenizer.encode(prompt.encode(), end=False)
    if len(tokens) == 0:
        try:
            tokens = tokenizer.encode(b"\n", end=False)
        except UserError:
            tokens = np.zeros(1, np.int64)
    return tokens


def source_prompt(tokenizer: Tokenizer, source: str | Array) -> Array:
    """Token numbers (n,) that ask a model of pairs for the target of a source, a text or its tokens."""
    tokens = tokenizer.encode(source.encode(), end=False) if isinstance(source, str) else source
    return np.concatenate([[tokenizer.end], tokens, [tokenizer.sep]]).astype(np.int64)


def continuation(
    model: LoadedModel, prompt: Array, tokens: int, sampling: Sampling, beams: int | None = None, precision: str = "fp32"
) -> Iterator[int]:
    """Yield at most `tokens` tokens that continue a prompt (n,): drawn, or found by a search that keeps `beams` texts.

    precision : "fp32", "bf16" or "int8", of products
    """
    decoder = Decoder(model.model(WINDOW), beams or 1, precision)
    if beams:
        ((found, _),) = beam_search(decoder, [prompt], tokens, beams, end=model.tokenizer.end)
        return iter(found)
    return sample(decoder, prompt, tokens, sampling)


def decode(tokenizer: Tokenizer, tokens: Iterable[int]) -> Iterator[tuple[int | None, str]]:
    """Yield each token before <end> with the text that it completes, then None with the rest: characters may take several."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    for token in tokens:
        if token == tokenizer.end:
            break
        yield token, decoder.decode(tokenizer.decode([token]))
    yield None, decoder.decode(b"", final=True)


def sample(decoder: Decoder, prompt: Array, tokens: int, sampling: Sampling) -> Iterator[int]:
    """Yield token numbers that continue a prompt.

    Parameters
    ----------
    decoder : Decoder
        Its first slot is used.
    prompt : (n,) int64, n at least 1
    tokens : int
        How many to yield.
    sampling : Sampling

    Raises
    ------
    UserError
        Where the model's numbers are not finite.
    """
    choice, slot = Choice(1), np.zeros(1, np.int64)
    choice.temperature[:], choice.seed[:] = sampling.temperature, sampling.seed % 2**64
    choice.top_k[:], choice.top_p[:] = sampling.top_k, sampling.top_p
    _begin(decoder, [prompt], slot)
    for position in range(tokens):
        choice.position[:] = position
        choose(decoder, choice, slot)
        yield int(choice.token[0])
        decoder.read(choice.token[None], slot)


def greedy(decoder: Decoder, prompts: Sequence[Array], tokens: int, end: int | None = None) -> list[list[int]]:
    """The most likely tokens that follow each prompt, one by one, until `end`, which is left out, or `tokens` of them.

    Parameters
    ----------
    decoder : Decoder
        Its first slots are used, one a prompt.
    prompts : sequence of (n,) int64, n at least 1

    Raises
    ------
    UserError
        Where the model's numbers are not finite.
    """
    slots, choice = np.arange(len(prompts)), Choice(len(prompts))
    choice.temperature[:] = 0
    _begin(decoder, prompts, slots)
    found: list[list[int]] = [[] for _ in prompts]
    for position in range(tokens):
        choose(decoder, choice, slots)
        slots = slots[choice.token[slots] != end]
        for slot in slots:
            found[slot].append(int(choice.token[slot]))
        if not len(slots) or position == tokens - 1:
            break
        decoder.read(choice.token[slots][None], slots)
    return found


@dataclass
class _Search:
    """A beam search for one prompt: texts with their log-probabilities, those that go on the most likely first."""

    slots: Array  # (beams,) of the decoder; kept text i is the stream in slots[i]
    kept: list[tuple[list[int], float]] = field(default_factory=lambda: [([], 0.0)])
    ended: list[tuple[list[int], float]] = field(default_factory=list)
    done: bool = False

    def step(self, choice: Choice, end: int | None, length_penalty: float) -> list[Any]:
        """Take every kept text a token further, by what `choice` has for its slot. Returns the slots they come from."""
        further = [
            (total + float(choice.logprobs[slot, i]), slot, text, int(choice.tokens[slot, i]))
            for slot, (text, total) in zip(self.slots, self.kept, strict=False)
            for i in range(choice.tokens.shape[1])
        ]
        further.sort(key=lambda one: -one[0])
        further = further[: len(self.slots)]
        self.ended += [([*text, token], total) for total, _, text, token in further if token == end]
        further = [one for one in further if one[3] != end]
        best = max((penalised(text, total, length_penalty) for text, total in self.ended), default=-math.inf)
        if not further or (length_penalty == 0 and best >= further[0][0]):  # what goes on only becomes less likely
            self.kept, self.done = [], True
        else:
            self.kept = [([*text, token], total) for total, _, text, token in further]
        return [slot for _, slot, _, _ in further] if self.kept else []


def penalised(text: Sequence[int], logprob: float, length_penalty: float) -> float:
    """What a beam search compares: a log-probability over ((5 + n) / 6)^length_penalty of n tokens (Wu et al. 2016)."""
    return float(logprob / ((5 + len(text)) / 6) ** length_penalty)


def beam_search(
    decoder: Decoder,
    prompts: Sequence[Array],
    tokens: int,
    beams: int,
    length_penalty: float = 0.0,
    end: int | None = None,
) -> list[tuple[list[int], float]]:
    """The most likely continuation of each prompt that a search of some width finds (Graves 2012).

    Parameters
    ----------
    decoder : Decoder
        Its first slots are used, `beams` a prompt.
    prompts : sequence of (n,) int64, n at least 1
    tokens : int
        How many at most.
    beams : int
        Continuations that are kept at each step: the most likely of all that go on from those of the step before.
    length_penalty : float
        alpha of Wu et al. 2016: log-probabilities of n tokens are compared after division by ((5 + n) / 6)^alpha.
    end : int, optional
        The token that ends a continuation, and is its last; none: all have `tokens` tokens.

    Returns
    -------
    For each prompt its tokens and their log-probability, in nats.

    Raises
    ------
    UserError
        Where the model's numbers are not finite.
    """
    most = min(beams, decoder.vocabulary)
    searches = [_Search(np.arange(number * beams, (number + 1) * beams)) for number in range(len(prompts))]
    choice = Choice(len(prompts) * beams, most)
    choice.temperature[:], choice.wanted[:] = 0, most
    _begin(decoder, prompts, np.arange(len(prompts)) * beams)
    for position in range(tokens):
        choose(decoder, choice, np.concatenate([search.slots[: len(search.kept)] for search in searches]))
        sources: list[Any] = []
        for search in searches:
            if not search.done:
                sources += search.step(choice, end, length_penalty)
        if not sources or position == tokens - 1:
            break
        slots = np.concatenate([search.slots[: len(search.kept)] for search in searches])
        decoder.states[slots] = decoder.states[sources]
        decoder.read(np.array([[text[-1] for search in searches for text, _ in search.kept]]), slots)
    every = [search.ended + search.kept for search in searches]
    return [max(texts, key=lambda one: penalised(one[0], one[1], length_penalty)) for texts in every]


def choose(decoder: Decoder, choice: Choice, wants: Array, rows: Array | None = None) -> None:
    """`Decoder.choose`, but a UserError where a stream has no distribution."""
    decoder.choose(choice, wants, rows)
    if (choice.token[wants] == BAD).any():
        raise UserError(NOT_FINITE)


def _begin(decoder: Decoder, prompts: Sequence[Array], slots: Array) -> None:
    """Let each stream begin with its prompt; the last tokens are read at the same time, so that `choose` says what follows."""
    decoder.states[slots] = 0
    decoder.read_texts([prompt[:-1] for prompt in prompts], slots)
    decoder.read(np.array([[prompt[-1] for prompt in prompts]], np.int64), slots)
