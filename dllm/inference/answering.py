"""Conditional tasks: the targets that a model gives to sources, in batches, by all ranks together, and how good they are.

Every pair is alone, from zero states, and what comes out does not depend on the batch or on the number of ranks, to the bit.
"""

from __future__ import annotations

import importlib.util
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
    decoder: Decoder, tokenizer: Tokenizer, sources: Sequence[Array], tokens: int, beams: int | None = None
) -> list[list[int]]:
    """The target (n,) that the model gives to each source, at most `tokens` tokens, without its <end>.

    beams : continuations that a search keeps for each source; None: the most likely token each time
    """
    prompts = [source_prompt(tokenizer, source) for source in sources]
    if beams is None:
        return greedy(decoder, prompts, tokens, tokenizer.end)
    found = [text for text, _ in beam_search(decoder, prompts, tokens, beams, end=tokenizer.end)]
    return [text[:-1] if text[-1:] == [tokenizer.end] else text for text in found]


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


def check_scorers() -> None:
    """Raise UserError where what measures texts is not installed."""
    missing = [name for name in ("sacrebleu", "rouge_score") if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"BLEU and ROUGE need {' and '.join(missing)}: pip install 'dllm[tasks]'")


def measure(pairs: Sequence[Pair], texts: Sequence[str], losses: Array) -> dict[str, Any]:
    """{"pairs", "exact_match", "bleu", "rougeL", "loss", "perplexity"}: the first three in per cent, loss in nats a token.

    Texts match exactly where they differ in white space at most; BLEU is sacrebleu's (Post 2018) of the whole; rougeL the mean
    of rouge-score's F (Lin 2004), which knows words of a to z and digits.
    """
    import sacrebleu
    from rouge_score.rouge_scorer import RougeScorer

    wanted = [" ".join(pair[2].split()) for pair in pairs]
    scorer = RougeScorer(["rougeL"])
    loss = float(losses.sum()) / sum(len(pair[1]) + 1 for pair in pairs)
    return {
        "pairs": len(pairs),
        "exact_match": 100 * float(np.mean([text == right for text, right in zip(texts, wanted, strict=True)])),
        "bleu": sacrebleu.corpus_bleu(texts, [wanted]).score,
        "rougeL": 100 * float(np.mean([scorer.score(*both)["rougeL"].fmeasure for both in zip(wanted, texts, strict=True)])),
        "loss": loss,
        "perplexity": perplexity(loss),
    }
