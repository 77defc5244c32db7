"""Vocabularies and labels out of files, checked before anybody believes them."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from .pretokens import letters

MOST_TOKENS = 1 << 20  # of a vocabulary; the largest published ones of words have 800,000
LONGEST_TOKEN = 4096  # characters; longer words are <unk>

MOST_LABELS = 1 << 15
LONGEST_LABEL = 200  # characters
LONGEST_LIST = 500  # characters of labels that are shown


def problem_of_label(label: str) -> str:
    """What is wrong with a label, in words; "" where nothing is."""
    if not label.strip():
        return "is empty"
    if len(label) > LONGEST_LABEL:
        return f"has more than {LONGEST_LABEL} characters"
    return "" if label.isprintable() else "has characters that cannot be shown"


def problem_of_letter(letter: str) -> str:
    """What is wrong with a label of a transcript, in words; "" where nothing is: it is a letter, or a space."""
    return "" if len(letter) == 1 and letter.isprintable() else "is no letter"


def checked_labels(labels: Any) -> tuple[str, ...]:
    """Labels as `prepare` orders them. Raises ValueError where these are none."""
    if not (isinstance(labels, list) and 2 <= len(labels) <= MOST_LABELS and all(isinstance(label, str) for label in labels)):
        raise ValueError("its labels are no list of names")
    if any(problem_of_label(label) and problem_of_letter(label) for label in labels) or labels != sorted(set(labels)):
        raise ValueError("its labels are not in order, or one is none")
    return tuple(labels)


def check_tokens(tokens: Collection[Any]) -> None:
    """Raise ValueError where these are no vocabulary's: too many, too long, empty, twice the same, or no text."""
    if len(tokens) > MOST_TOKENS:
        raise ValueError(f"it has {len(tokens):,} tokens, at most {MOST_TOKENS:,} are read")
    if not all(isinstance(token, str) and 0 < len(token) <= LONGEST_TOKEN for token in tokens):
        raise ValueError(f"a token has no characters, or more than {LONGEST_TOKEN:,}")
    if len(set(tokens)) < len(tokens):
        raise ValueError("a token is there twice")
    "".join(tokens).encode()


def checked_merges(vocabulary: Any, merges: Any) -> list[tuple[Any, ...]]:
    """The merges of a BPE, checked with its vocabulary. Raises ValueError, TypeError.

    The library's Rust side may end the process for what it does not expect, so nothing goes there that was not checked.
    """
    if not isinstance(vocabulary, dict) or not isinstance(merges, list):
        raise TypeError("it has no vocabulary, or no merges")
    check_tokens(vocabulary)
    if any(type(number) is not int for number in vocabulary.values()) or set(vocabulary.values()) != {*range(len(vocabulary))}:
        raise ValueError("its tokens are not numbered from 0 without gaps")
    if not set().union(*vocabulary) <= letters().keys():
        raise ValueError("a token is not of bytes")
    pairs: list[tuple[Any, ...]] = [tuple(merge.split(" ")) if isinstance(merge, str) else tuple(merge) for merge in merges]
    for pair in pairs:
        if len(pair) != 2 or not all(isinstance(part, str) and part in vocabulary for part in (*pair, "".join(pair))):
            raise ValueError("a merge is not of its tokens")
    if len(set(pairs)) < len(pairs):
        raise ValueError("a merge is there twice")
    return pairs
