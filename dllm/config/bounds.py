"""What one setting says of itself: its default, its effect, and which values it may have."""

import operator
from dataclasses import field
from typing import Any, TypeVar

LARGEST = 2**31 - 1  # of any number
RULES = {  # a bound's name: how its words begin, and what holds between a value and it
    "at_least": ("at least", operator.ge),
    "above": ("above", operator.gt),
    "at_most": ("at most", operator.le),
    "below": ("below", operator.lt),
}
KINDS: dict[Any, str] = {int: "a whole number", float: "a number", bool: "true or false", str: "a word"}
T = TypeVar("T")


def setting(default: T, doc: str, *, choices: tuple[T, ...] = (), also: T | None = None, **bounds: float) -> T:
    """A field of a section: its default, its effect in a line, and what its value may be.

    choices : where it is one of a few
    also : a value beyond the bounds that has a meaning of its own
    bounds : of RULES; a number is not negative where they say nothing of how small it may be
    """
    is_number = isinstance(default, int | float) and not isinstance(default, bool)
    if is_number and not choices and not {"at_least", "above"} & bounds.keys():
        bounds = {"at_least": 0} | bounds
    metadata = {"doc": doc, "choices": choices, "also": also, "bounds": bounds}
    return field(default=default, metadata=metadata)  # type: ignore[return-value, no-any-return, unused-ignore]


def in_words(rule: str, limit: float) -> str:
    """A bound, such as "at least 1"."""
    return "not negative" if (rule, limit) == ("at_least", 0) else f"{RULES[rule][0]} {limit:g}"


def demand(rule: str, limit: float) -> str:
    """What a bound asks of a value, such as "must be at least 1"."""
    words = in_words(rule, limit)
    return f"must {words.replace('not ', 'not be ')}" if words.startswith("not ") else f"must be {words}"


def choices_in_words(choices: tuple[Any, ...]) -> str:
    """Those that are not empty, such as "one of sgd, adam"."""
    return f"one of {', '.join(str(choice) for choice in choices if choice != '')}"
