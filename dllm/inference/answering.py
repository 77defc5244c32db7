"""Conditional tasks: the targets that a model gives to sources, in batches, by all ranks together, and how good they are.

Every pair is alone, from zero states, and what comes out does not depend on the batch or on the number of ranks.
"""

import importlib.util

import numpy as np

from ..comm.runtime import allgather, together
from ..data.pairs import PairFiles
from ..errors import UserError
from ..kernels.softmax import IGNORE
from .evaluation import perplexity


def prompt(tokenizer, source):
    """Token numbers (n,) that ask for the target of `source`, tokens of text."""
    return np.concatenate([[tokenizer.end], source, [tokenizer.sep]]).astype(np.int64)


def read_files(source, target, tokenizer):
    """(source tokens, target tokens, target as a str) of every pair of two files. Raises UserError."""
    files, pairs = PairFiles(source, target), []
    for number in range(len(files)):
        files.check(number)
        both = files.apply(lambda side: tokenizer.encode(side, False), number)
        pairs.append((*both, files[number][1].decode(errors="replace")))
    if not pairs:
        raise UserError(f"{source} is empty")
    return pairs


def read_split(corpus, split, most=0):
    """The same of every pair of a corpus's split, or of at most the first `most`."""
    entry, tokenizer = corpus.split(split), corpus.tokenizer
    stop = min(entry["tokens"], most * entry["longest"] + 1) if most else entry["tokens"]
    corpus.verify(split, 0, stop)
    tokens, pairs = corpus.read(split, 0, stop), []
    for part in np.split(tokens, np.flatnonzero(tokens == tokenizer.end) + 1)[1:-1]:
        if np.count_nonzero(part == tokenizer.sep) != 1:
            raise UserError(f"split '{split}' of {corpus.folder} is not made of pairs: prepare the data anew")
        sep = int(np.flatnonzero(part == tokenizer.sep)[0])
        pairs.append((part[:sep], part[sep + 1 : -1], as_text(tokenizer, part[sep + 1 : -1])))
    return pairs[: most or None]


def as_text(tokenizer, tokens):
    return tokenizer.decode(tokens).decode(errors="replace")


def read_prompts(model, prompts):
    """States h, c (L,B,H) behind prompts, arrays (n,) of their own lengths, from zero; the longest come first."""
    config, lengths = model.config, [len(tokens) for tokens in prompts]
    h = np.zeros((config.layers, len(prompts), config.hidden), model.dtype)
    c, begin = np.zeros_like(h), 0
    while begin < lengths[0]:
        active = sum(length > begin for length in lengths)
        end = min(lengths[active - 1], begin + model.window)  # none of them ends before
        window = np.stack([tokens[begin:end] for tokens in prompts[:active]], axis=1)
        states = [np.ascontiguousarray(part[:, :active]) for part in (h, c)]
        model.logits(window, *states)
        h[:, :active], c[:, :active] = states
        begin = end
    return h, c


def greedy(model, end, prompts, limit):
    """The likeliest tokens that follow each prompt, one by one, until `end`, which is left out, or `limit` of them.

    prompts : arrays (n,), at most as many as the model's lanes, the longest first
    """
    h, c = read_prompts(model, [tokens[:-1] for tokens in prompts])
    found, active, last = [[] for _ in prompts], np.arange(len(prompts)), np.array([tokens[-1] for tokens in prompts])
    for _ in range(limit):
        last = model.logits(last[None], h, c).argmax(axis=1)
        going = last != end
        if not going.all():
            active, last, h, c = active[going], last[going], h[:, going], c[:, going]
        if not len(active):
            break
        for number, token in zip(active, last, strict=True):
            found[number].append(int(token))
    return found


def pair_losses(model, tokenizer, pairs):
    """The loss (B,) of each target with its <end>, in nats; pairs: (source tokens, target tokens, ...)."""
    rows = [np.concatenate([prompt(tokenizer, pair[0]), pair[1], [tokenizer.end]]) for pair in pairs]
    width, config = max(map(len, rows)) - 1, model.config
    tokens = np.full((width, len(rows)), tokenizer.end, np.int64)
    targets = np.full_like(tokens, IGNORE)
    for lane, (row, pair) in enumerate(zip(rows, pairs, strict=True)):
        tokens[: len(row) - 1, lane] = row[:-1]
        targets[len(pair[0]) + 1 : len(row) - 1, lane] = row[len(pair[0]) + 2 :]
    h = np.zeros((config.layers, len(rows), config.hidden), model.dtype)
    c, losses = np.zeros_like(h), np.zeros(len(rows))
    for start in range(0, width, model.window):
        part = slice(start, start + model.window)
        losses += model.forward(tokens[part], targets[part], h, c).sum(axis=0, dtype=np.float64)
    return losses


def solve(comm, model, tokenizer, pairs, lanes, limit):
    """For every pair the text that the model gives, and the loss of its target (n,) in nats. Collective.

    lanes : at most the model's, pairs of a batch
    """
    order = sorted(range(len(pairs)), key=lambda number: (-len(pairs[number][0]), number))
    batches = [order[start : start + lanes] for start in range(0, len(order), lanes)]
    mine = []
    with together(comm):
        for batch in batches[comm.rank :: comm.size]:
            part = [pairs[number] for number in batch]
            found = greedy(model, tokenizer.end, [prompt(tokenizer, pair[0]) for pair in part], limit)
            texts = [" ".join(as_text(tokenizer, tokens).split()) for tokens in found]
            mine += zip(batch, texts, pair_losses(model, tokenizer, part), strict=True)
    together_again = sorted(one for part in allgather(comm, mine) for one in part)
    return [text for _, text, _ in together_again], np.array([loss for _, _, loss in together_again])


def check_scorers():
    """Raise UserError where what measures texts is not installed."""
    missing = [name for name in ("sacrebleu", "rouge_score") if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"BLEU and ROUGE need {' and '.join(missing)}: pip install 'dllm[tasks]'")


def measure(pairs, texts, losses):
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
