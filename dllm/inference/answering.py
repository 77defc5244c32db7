"""Conditional tasks: the targets that a model gives to sources, in batches, by all ranks together, and how good they are.

Every pair is alone, from zero states, and what comes out does not depend on the batch or on the number of ranks, to the bit.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import numpy as np

from ..comm.messages import allgather
from ..comm.runtime import together
from ..data import pair_order
from ..data.corpus import Corpus
from ..data.pairs import PairFiles
from ..data.tokenizers import Tokenizer
from ..errors import UserError
from ..kernels.softmax import IGNORE
from ..kernels.types import Array
from ..model.base import Model
from ..model.batch import Batch
from ..model.kinds import language_model
from ..model.seq2seq import Seq2Seq
from ..model.source_decoder import SourceDecoder
from . import scores
from .decoded_losses import DecodedLosses
from .evaluation import perplexity
from .generation import banned, source_prompt, streams_of
from .loaded_model import LoadedModel
from .search import GREEDY, Beam, Found, Streams, search

if TYPE_CHECKING:
    from mpi4py import MPI

Answer: TypeAlias = tuple[list[str], list[float]]  # texts for a source, and numbers of them


class Pair(NamedTuple):
    """A source and its target."""

    source: Array  # (n,) tokens
    target: Array  # (n,) tokens
    text: str  # of the target
    asked: str = ""  # the source's text, where its tokens do not say all of it


def read_files(source: str, target: str, tokenizer: Tokenizer) -> list[Pair]:
    """Every pair of two files. Raises UserError."""
    files, pairs = PairFiles(source, target), list[Pair]()
    for number in range(len(files)):
        files.check(number)
        source_tokens, target_tokens = files.apply(lambda side: tokenizer.encode(side, False), number)
        asked, text = (side.decode(errors="replace") for side in files[number])
        pairs.append(Pair(source_tokens, target_tokens, text, asked))
    if not pairs:
        raise UserError(f"{source} is empty")
    return pairs


def read_split(corpus: Corpus, split: str, most: int = 0) -> list[Pair]:
    """Every pair of a corpus's split, or at most the first `most`. Raises UserError."""
    entry, tokenizer = corpus.split(split), corpus.tokenizer
    stop = min(entry["tokens"], most * entry["longest"] + 1) if most else entry["tokens"]
    corpus.verify(split, 0, stop)
    tokens, pairs = corpus.read(split, 0, stop), list[Pair]()
    for part in np.split(tokens, np.flatnonzero(tokens == tokenizer.end) + 1)[1:-1]:
        if np.count_nonzero(part == tokenizer.sep) != 1:
            raise UserError(f"split '{split}' of {corpus.folder} is not made of pairs: prepare the data anew")
        sep = int(np.flatnonzero(part == tokenizer.sep)[0])
        pairs.append(Pair(part[:sep], part[sep + 1 : -1], as_text(tokenizer, part[sep + 1 : -1])))
    return pairs[: most or None]


def order_of_files(corpus: Corpus, split: str) -> Callable[[Sequence[str]], list[str]] | None:
    """What puts texts, one for each pair of `read_split`, in the order of the files that `prepare` read. Raises UserError.

    Where the split is all of its files, each line has its text, an empty one where the pair was left out. None where the corpus
    does not say.
    """
    entry = corpus.split(split)
    lines = pair_order.lines_of(entry, f"split '{split}' of {corpus.folder}")
    if lines is None:
        return None
    order = entry["order"]
    whole = order["stop"] - order["start"] + len(order["empty"]) == order["lines"]
    return lambda texts: pair_order.in_order_of_lines(texts, lines, whole, order["lines"])


def as_text(tokenizer: Tokenizer, tokens: Sequence[int] | Array) -> str:
    """What tokens say; bytes that are not UTF-8 become U+FFFD."""
    return tokenizer.decode(tokens).decode(errors="replace")


@dataclass(frozen=True, kw_only=True)
class Answering:
    """How sources get their targets."""

    tokenizer: Tokenizer
    lanes: int  # sources of a batch, at most as many as the model's lanes
    limit: int  # tokens of a target at most
    beam: Beam = GREEDY
    precision: str = "fp32"  # of products; the losses of targets have it, too
    replace: bool = False  # <unk> is said, and replaced by the word of the source that it attended to most

    def search(self, streams: Streams, sources: Sequence[Array]) -> list[list[Found]]:
        """The best targets of each source, the best first."""
        tokenizer = self.tokenizer
        never = [token for token in banned(tokenizer) if not (self.replace and token == tokenizer.unknown)]
        return search(streams, sources, self.limit, self.beam, tokenizer.end, never)

    def units(self, source: str) -> list[str]:
        """What each token of a source's text stands for, where some of them may be <unk>."""
        return source.split() if self.tokenizer.kind == "word" else list(source)

    def text(self, found: Found, units: Sequence[str] = ()) -> str:
        """A target in one line. units : of the source, a token each, where words are to be replaced"""
        tokenizer, words = self.tokenizer, list[str]()
        if not (self.replace and tokenizer.unknown in found.tokens):
            return " ".join(as_text(tokenizer, found.tokens).split())
        for token, place in zip(found.tokens, found.places, strict=True):
            known = as_text(tokenizer, [token])
            words.append(known if token != tokenizer.unknown else units[place] + " " * (tokenizer.kind == "word"))
        return " ".join("".join(words).split())


def pair_losses(model: Model | DecodedLosses, tokenizer: Tokenizer, pairs: Sequence[Pair]) -> Array:
    """The loss (B,) of each target with its <end>, in nats, float64; at most as many pairs as the model has lanes."""
    if isinstance(model, Seq2Seq):
        losses = model.forward(_as_batch(tokenizer, pairs), *np.zeros((2, 0, len(pairs), model.config.hidden), model.dtype))
        return _sums(losses)
    rows = [np.concatenate([source_prompt(tokenizer, pair[0]), pair[1], [tokenizer.end]]) for pair in pairs]
    width, config = max(map(len, rows)) - 1, model.config
    tokens = np.full((width, len(rows)), tokenizer.end, np.int64)
    targets = np.full_like(tokens, IGNORE)
    for lane, (row, pair) in enumerate(zip(rows, pairs, strict=True)):
        tokens[: len(row) - 1, lane] = row[:-1]
        targets[len(pair[0]) + 1 : len(row) - 1, lane] = row[len(pair[0]) + 2 :]
    h = np.zeros((config.layers, len(rows), config.hidden), model.dtype)
    c, losses = np.zeros_like(h), np.zeros((width, len(rows)))
    for start in range(0, width, model.window):
        part = slice(start, start + model.window)
        losses[part] = model.forward(Batch(tokens[part], targets[part]), h, c)
    return _sums(losses)


def _as_batch(tokenizer: Tokenizer, pairs: Sequence[Pair]) -> Batch:
    """Pairs side by side, as an encoder and a decoder read them."""
    begin, end = [tokenizer.sep], [tokenizer.end]
    return Batch.of_pairs([(source, np.concatenate([begin, target, end]).astype(np.int64)) for source, target, *_ in pairs])


def _sums(losses: Array) -> Array:
    """Of each lane of losses (T,B), exact, so that the padding of a batch changes nothing."""
    return np.array([math.fsum(lane) for lane in losses.T])


def solve(comm: MPI.Comm, model: Model, how: Answering, pairs: Sequence[Pair]) -> tuple[list[str], Array]:
    """For every pair the best text that the model gives, and the loss of its target (n,) in nats. Collective."""
    with together(comm):
        streams = streams_of(model, how.tokenizer, how.lanes * how.beam.width, how.precision)
        scorer = _scorer(model, streams, how)

    def work(numbers: Sequence[int]) -> list[Answer]:
        part = [pairs[number] for number in numbers]
        found, losses = how.search(streams, [pair[0] for pair in part]), scorer(part)
        said = [how.units(pair.asked) or [as_text(how.tokenizer, [token]) for token in pair.source] for pair in part]
        texts = [how.text(best, units) for (best, *_), units in zip(found, said, strict=True)]
        return [([text], [loss]) for text, loss in zip(texts, losses.tolist(), strict=True)]

    answered = in_batches(comm, [len(pair[0]) for pair in pairs], how.lanes, work)
    return [text for (text,), _ in answered], np.array([loss for _, (loss,) in answered])


def _scorer(model: Model, streams: Streams, how: Answering) -> Callable[[Sequence[Pair]], Array]:
    """What gives the losses (B,) of targets, in the precision of the answers."""
    if how.precision == "fp32":
        return lambda pairs: pair_losses(model, how.tokenizer, pairs)
    if isinstance(streams, SourceDecoder):
        return lambda pairs: decoded_pair_losses(streams, how.tokenizer, pairs)
    scorer = DecodedLosses(language_model(model), how.lanes, how.precision)
    return lambda pairs: pair_losses(scorer, how.tokenizer, pairs)


def decoded_pair_losses(decoder: SourceDecoder, tokenizer: Tokenizer, pairs: Sequence[Pair]) -> Array:
    """`pair_losses` by a SourceDecoder, in its precision."""
    batch = _as_batch(tokenizer, pairs)
    losses, rows = np.zeros(batch.targets.shape), np.arange(len(pairs))
    decoder.begin([pair[0] for pair in pairs])
    for step, targets in enumerate(batch.targets):
        given = np.maximum(targets, 0)
        losses[step] = np.where(targets == IGNORE, 0, -decoder.logprobs(given))
        decoder.advance(rows, given)
    return _sums(losses)


def warm_up(model: LoadedModel, how: Answering) -> None:
    """Answer a source of one token, so that what a search needs is compiled, or loaded from the cache."""
    small = dataclasses.replace(how, lanes=1, limit=2)
    small.search(streams_of(model.network(1, 1), how.tokenizer, how.beam.width, how.precision), [np.zeros(1, np.int64)])


def alignment(model: Model, tokenizer: Tokenizer, source: Array, target: Sequence[int]) -> Array:
    """How much each token of a source (S,) counted for each of a target and its end: (T+1,S)."""
    streams, rows = streams_of(model, tokenizer, 1), list[Array]()
    streams.begin([source])
    for token in [*target, tokenizer.end]:
        rows.append(streams.attention()[0].copy())
        streams.advance(np.zeros(1, np.int64), np.array([token]))
    return np.array(rows)


def in_batches(
    comm: MPI.Comm,
    lengths: Sequence[int],
    lanes: int,
    work: Callable[[Sequence[int]], list[Answer]],
    progress: Callable[[int], None] = lambda done: None,
) -> list[Answer]:
    """What `work` gives for the numbers of a batch, of all numbers, by all ranks together, in order. Collective.

    Sources of like lengths share a batch, the longest first, and batches are dealt to ranks in turn.

    progress : told on every rank about how many are done by all
    """
    order = sorted(range(len(lengths)), key=lambda number: (-lengths[number], number))
    batches = [order[start : start + lanes] for start in range(0, len(order), lanes)]
    numbers, mine = list[int](), list[Answer]()
    with together(comm):
        for turn, batch in enumerate(batches[comm.rank :: comm.size], 1):
            numbers += batch
            mine += work(batch)
            progress(min(turn * comm.size * lanes, len(order)))
    counts = [len(values) for _, values in mine]
    told = numbers, [texts for texts, _ in mine], counts, np.array([value for _, values in mine for value in values])
    answered = dict[int, Answer]()
    for some, texts, counts, flat in allgather(comm, told, tuple[list[int], list[list[str]], list[int], np.ndarray]):
        values = iter(flat.tolist())
        for number, found, count in zip(some, texts, counts, strict=True):
            answered[number] = found, [*itertools.islice(values, count)]
    return [answered[number] for number in range(len(lengths))]


def measure(pairs: Sequence[Pair], texts: Sequence[str], losses: Array, tokenize: str = "13a") -> dict[str, Any]:
    """{"pairs", "exact_match", "bleu", ..., "loss", "perplexity"}: scores.measure, and the loss in nats a token.

    tokenize : what cuts words for BLEU, one of scores.BLEU_TOKENIZERS
    """
    loss = float(losses.sum()) / sum(len(pair[1]) + 1 for pair in pairs)
    measured = scores.measure([pair[2] for pair in pairs], texts, tokenize)
    return {"pairs": len(pairs), **measured, "loss": loss, "perplexity": perplexity(loss)}
