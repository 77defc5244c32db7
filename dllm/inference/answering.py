"""Conditional tasks: the targets that a model gives to sources, in batches, by all ranks together, and how good they are.

Every pair is alone, from zero states, and what comes out does not depend on the batch or on the number of ranks, to the bit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

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
from ..model.batch import Batch
from ..model.decoder import Decoder
from ..model.language_model import LanguageModel
from . import scores
from .decoded_losses import DecodedLosses
from .evaluation import perplexity
from .generation import beam_search, greedy, source_prompt

if TYPE_CHECKING:
    from mpi4py import MPI

Pair: TypeAlias = tuple[Array, Array, str]  # tokens (n,) of the source, tokens (n,) of the target, the target's text


def read_files(source: str, target: str, tokenizer: Tokenizer) -> list[Pair]:
    """Every pair of two files. Raises UserError."""
    files, pairs = PairFiles(source, target), list[Pair]()
    for number in range(len(files)):
        files.check(number)
        source_tokens, target_tokens = files.apply(lambda side: tokenizer.encode(side, False), number)
        pairs.append((source_tokens, target_tokens, files[number][1].decode(errors="replace")))
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
        pairs.append((part[:sep], part[sep + 1 : -1], as_text(tokenizer, part[sep + 1 : -1])))
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


def answers(
    decoder: Decoder, tokenizer: Tokenizer, sources: Sequence[Array], tokens: int, beam: Beam = Beam()
) -> list[list[Found]]:
    """The best targets that the model gives to each source, at most `tokens` tokens each, the best first."""
    return search(DecoderStreams(decoder, tokenizer), sources, tokens, beam, tokenizer.end, banned(tokenizer))


def pair_losses(model: LanguageModel | DecodedLosses, tokenizer: Tokenizer, pairs: Sequence[Pair]) -> Array:
    """The loss (B,) of each target with its <end>, in nats, float64; at most as many pairs as the model has lanes."""
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
    return np.array([math.fsum(lane) for lane in losses.T])  # exact, so that the padding of a batch changes nothing


def solve(
    comm: MPI.Comm,
    model: LanguageModel,
    tokenizer: Tokenizer,
    pairs: Sequence[Pair],
    lanes: int,
    limit: int,
    precision: str = "fp32",
) -> tuple[list[str], Array]:
    """For every pair the text that the model gives, and the loss of its target (n,) in nats. Collective.

    lanes : at most the model's, pairs of a batch
    limit : tokens of a text at most
    precision : of the Decoder; but for "fp32" of what makes the losses, too
    """
    order = sorted(range(len(pairs)), key=lambda number: (-len(pairs[number][0]), number))
    batches = [order[start : start + lanes] for start in range(0, len(order), lanes)]
    numbers, texts, losses = list[int](), list[str](), list[float]()
    with together(comm):
        decoder = Decoder(model, lanes, precision)
        scorer = model if precision == "fp32" else DecodedLosses(model, lanes, precision)
        for batch in batches[comm.rank :: comm.size]:
            part = [pairs[number] for number in batch]
            found = answers(decoder, tokenizer, [pair[0] for pair in part], limit)
            numbers += batch
            texts += [" ".join(as_text(tokenizer, tokens).split()) for tokens in found]
            losses += pair_losses(scorer, tokenizer, part).tolist()
    everyone = allgather(comm, (numbers, texts, np.array(losses)), tuple[list[int], list[str], np.ndarray])
    answered = sorted(one for part in everyone for one in zip(*part, strict=True))
    return [text for _, text, _ in answered], np.array([loss for _, _, loss in answered])


def measure(pairs: Sequence[Pair], texts: Sequence[str], losses: Array, tokenize: str = "13a") -> dict[str, Any]:
    """{"pairs", "exact_match", "bleu", ..., "loss", "perplexity"}: scores.measure, and the loss in nats a token.

    tokenize : what cuts words for BLEU, one of scores.BLEU_TOKENIZERS
    """
    loss = float(losses.sum()) / sum(len(pair[1]) + 1 for pair in pairs)
    measured = scores.measure([pair[2] for pair in pairs], texts, tokenize)
    return {"pairs": len(pairs), **measured, "loss": loss, "perplexity": perplexity(loss)}
