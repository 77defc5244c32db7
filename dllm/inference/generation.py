"""Texts that a trained model continues: sampling, and the streams of a search. What a text becomes does not depend on what else
is continued at the same time, to the bit.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from ..data.tokenizers import Tokenizer
from ..errors import UserError
from ..kernels.sample import Choice
from ..kernels.types import Array
from ..model.base import Model
from ..model.decoder import Decoder, check_finite
from ..model.kinds import language_model
from ..model.seq2seq import Seq2Seq
from ..model.source_decoder import SourceDecoder
from .loaded_model import LoadedModel
from .search import GREEDY, Beam, Streams, search

WINDOW = 64  # tokens of a prompt that are read at a time


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How tokens are drawn (kernels/sample.py, kernels/penalties.py)."""

    temperature: float = 0.8  # 0: always the most likely token
    top_k: int = 0  # among the k most likely; 0: among all
    top_p: float = 1.0  # among the most likely that together have this probability (Holtzman et al. 2020)
    min_p: float = 0.0  # among those at least so probable, times the probability of the most likely (Nguyen et al. 2024)
    seed: int = 1
    logit_bias: tuple[tuple[int, float], ...] = ()  # (token, what is added to its logit)
    banned: tuple[int, ...] = ()  # tokens that are never drawn
    repetition_penalty: float = 1.0  # more than 1: less of what was said or is in the prompt (Keskar et al. 2019)
    presence_penalty: float = 0.0  # taken from the logits of what was said
    frequency_penalty: float = 0.0  # the same, each time that it was said
    best_of: int = 1  # texts that are drawn; that with the best mean log-probability is taken


def start_tokens(tokenizer: Tokenizer, prompt: str) -> Array:
    """Token numbers (n,) of a prompt; of an empty one a line's end, or token 0 where the vocabulary has none."""
    tokens = tokenizer.encode(prompt.encode(), end=False)
    if len(tokens) == 0:
        try:
            tokens = tokenizer.encode(b"\n", end=False)
        except UserError:
            tokens = np.zeros(1, np.int64)
    return tokens


def source_tokens(tokenizer: Tokenizer, source: str) -> Array:
    """Token numbers (n,) of a source. Raises UserError where there are none."""
    tokens = tokenizer.encode(source.encode(), end=False)
    if len(tokens) == 0:
        raise UserError("the source is empty: it takes a word at least")
    return tokens


def source_prompt(tokenizer: Tokenizer, source: str | Array) -> Array:
    """Token numbers (n,) that ask a language model of pairs for the target of a source, a text or its tokens."""
    tokens = tokenizer.encode(source.encode(), end=False) if isinstance(source, str) else source
    return np.concatenate([[tokenizer.end], tokens, [tokenizer.sep]]).astype(np.int64)


def continuation(
    model: LoadedModel, text: Array, tokens: int, sampling: Sampling, beam: Beam | None = None, precision: str = "fp32"
) -> Iterator[int]:
    """Yield at most `tokens` tokens that continue a text (n,), or answer a source: drawn, or the best that a search finds.

    precision : "fp32", "bf16" or "int8", of products
    """
    tokenizer, window = model.tokenizer, WINDOW
    if model.config.kind == "seq2seq":
        if sampling.temperature and beam is None:
            raise UserError(f"{model.name} searches for targets, and draws none: leave out --temperature, or give --beam")
        beam, window = beam or GREEDY, len(text)
    if beam is None:
        prompt = source_prompt(tokenizer, text) if tokenizer.pairs else text
        sampling = replace(sampling, banned=never_drawn(tokenizer, sampling.logit_bias))
        decoder = Decoder(model.model(window), sampling.best_of, precision)
        if sampling.best_of > 1:
            return iter(draw_best(decoder, prompt, tokens, sampling, tokenizer.end))
        return sample(decoder, prompt, tokens, sampling)
    streams = streams_of(model.network(window, 1), tokenizer, beam.width, precision)
    ((found, *_),) = search(streams, [text], tokens, beam, tokenizer.end, banned(tokenizer))
    return iter(found.tokens)


def banned(tokenizer: Tokenizer) -> list[int]:
    """What a search never says: <unk>, and what stands between a source and its target."""
    return [token for token in (tokenizer.unknown, tokenizer.sep) if token is not None]


def never_drawn(tokenizer: Tokenizer, bias: Sequence[tuple[int, float]] = ()) -> tuple[int, ...]:
    """The same where tokens are drawn, but for those that a user names by a bias, and unless there are no others."""
    named = {token for token, _ in bias}
    found = tuple(token for token in banned(tokenizer) if token not in named)
    return found if len(found) < tokenizer.size else ()


def decode(tokenizer: Tokenizer, tokens: Iterable[int], behind: bool = False) -> Iterator[tuple[int | None, str]]:
    """Yield each token before <end> with the text that it completes, then None with the rest: characters may take several.

    behind : a word stands before it, see Tokenizer.spell
    """
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    for token in tokens:
        if token == tokenizer.end:
            break
        data, behind = tokenizer.spell(token, behind)
        yield token, decoder.decode(data)
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
    _check(decoder, sampling)
    choice.begin(0, sampling, prompt)
    _begin(decoder, [prompt], slot)
    for position in range(tokens):
        choice.position[:] = position
        choose(decoder, choice, slot)
        token = int(choice.token[0])
        choice.changes.note(0, token)
        yield token
        decoder.read(choice.token[None], slot)


def draw_best(decoder: Decoder, prompt: Array, tokens: int, sampling: Sampling, end: int | None) -> list[int]:
    """Of some texts the tokens of the one with the best mean log-probability, of equal ones the first.

    Parameters
    ----------
    decoder : Decoder
        With `sampling.best_of` slots.
    prompt : (n,) int64, n at least 1
    tokens : int
        That a text has at most.
    sampling : Sampling
        Its seed is that of the first text, the next one has the next.
    end : int or None
        The token that ends a text; None: all have `tokens` tokens.

    Raises
    ------
    UserError
        Where the model's numbers are not finite.
    """
    count = sampling.best_of
    choice, going = Choice(count), np.arange(count)
    _check(decoder, sampling)
    for row in range(count):
        choice.begin(row, replace(sampling, seed=sampling.seed + row), prompt)
    _begin(decoder, [prompt] * count, going)
    texts: list[list[int]] = [[] for _ in range(count)]
    totals = np.zeros(count)
    for position in range(tokens):
        choice.position[:] = position
        choose(decoder, choice, going)
        totals[going] += choice.logprob[going]
        for row, token in zip(going.tolist(), choice.token[going].tolist(), strict=True):
            texts[row].append(token)
            choice.changes.note(row, token)
        going = going[choice.token[going] != (-1 if end is None else end)]
        if not len(going):
            break
        decoder.read(choice.token[going][None], going)
    return max(zip(totals, texts, strict=True), key=lambda one: one[0] / max(1, len(one[1])))[1]


def _check(decoder: Decoder, sampling: Sampling) -> None:
    """Raise UserError where a token that is changed is none of the model."""
    for token in (*(token for token, _ in sampling.logit_bias), *sampling.banned):
        if not 0 <= token < decoder.vocabulary:
            raise UserError(f"there is no token {token}: they are numbers from 0 to {decoder.vocabulary - 1}")


class DecoderStreams:
    """The texts of a search on a Decoder; the first slots are the rows.

    Parameters
    ----------
    decoder : Decoder
    tokenizer : Tokenizer
        Of pairs: the texts are targets of sources. Else they continue what they are given.
    """

    def __init__(self, decoder: Decoder, tokenizer: Tokenizer) -> None:
        self.vocabulary, self._decoder, self._tokenizer = decoder.vocabulary, decoder, tokenizer
        self._choice, self._rows = Choice(len(decoder.states)), np.empty(0, np.int64)

    def begin(self, sources: Sequence[Array]) -> None:
        """Read the sources, or prompts of at least one token."""
        if self._tokenizer.pairs:
            sources = [source_prompt(self._tokenizer, source) for source in sources]
        self._rows = np.arange(len(sources))
        _begin(self._decoder, sources, self._rows)

    def choose(self, most: int) -> tuple[Array, Array]:
        """The most likely next tokens (N,most) of each row, and their log-probabilities. Raises UserError."""
        if self._choice.tokens.shape[1] != most:
            self._choice = Choice(len(self._decoder.states), most)
            self._choice.temperature[:], self._choice.wanted[:] = 0, most
        choose(self._decoder, self._choice, self._rows)
        return self._choice.tokens[self._rows], self._choice.logprobs[self._rows]

    def attention(self) -> Array:
        """There is none."""
        raise NotImplementedError

    def advance(self, parents: Array, tokens: Array) -> None:
        """Row i is what row parents[i] was, one token (N,) further."""
        self._rows = np.arange(len(parents))
        self._decoder.states[self._rows] = self._decoder.states[parents]
        self._decoder.read(tokens[None], self._rows)


def streams_of(model: Model, tokenizer: Tokenizer, rows: int, precision: str = "fp32") -> Streams:
    """The texts of a search, at most so many rows: by a language model, or targets of sources by a Seq2Seq."""
    if isinstance(model, Seq2Seq):
        assert tokenizer.sep is not None
        return SourceDecoder(model, rows, tokenizer.sep, precision)
    return DecoderStreams(Decoder(language_model(model), rows, precision), tokenizer)


def choose(decoder: Decoder, choice: Choice, wants: Array, rows: Array | None = None) -> None:
    """`Decoder.choose`, but a UserError where a stream has no distribution."""
    decoder.choose(choice, wants, rows)
    check_finite(choice, wants)


def _begin(decoder: Decoder, prompts: Sequence[Array], slots: Array) -> None:
    """Let each stream begin with its prompt; the last tokens are read at the same time, so that `choose` says what follows."""
    decoder.states[slots] = 0
    decoder.read_texts([prompt[:-1] for prompt in prompts], slots)
    decoder.read(np.array([[prompt[-1] for prompt in prompts]], np.int64), slots)
