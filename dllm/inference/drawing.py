"""How tokens may be drawn: the bounds of what a user chooses, and the options of the Python API, by name."""

from __future__ import annotations

import math
import numbers
from collections.abc import Mapping
from typing import Any, TypedDict

from ..data.tokenizers import UNKNOWN, Tokenizer
from ..errors import UserError
from .generation import Sampling

MOST_TEXTS = 64  # of best_of
MOST_PENALTY = 2.0  # OpenAI's
LEAST_REPETITION, MOST_REPETITION = 0.01, 10.0
MOST_BIAS = 100.0  # OpenAI's
WHOLE = {"top_k": (0, math.inf), "best_of": (1, MOST_TEXTS), "seed": (0, (1 << 63) - 1)}  # name -> the least and the most
REAL = {
    "temperature": (0, math.inf), "top_p": (0, 1), "min_p": (0, 1), "presence_penalty": (-MOST_PENALTY, MOST_PENALTY),
    "frequency_penalty": (-MOST_PENALTY, MOST_PENALTY), "repetition_penalty": (LEAST_REPETITION, MOST_REPETITION),
}  # fmt: skip


class Drawing(TypedDict, total=False):
    """How tokens are drawn; what is left out is as `dllm generate` has it."""

    temperature: float
    top_k: int
    top_p: float
    min_p: float
    presence_penalty: float
    frequency_penalty: float
    repetition_penalty: float
    logit_bias: Mapping[int | str, float]
    best_of: int
    seed: int


def sampling_from(drawing: Drawing, tokenizer: Tokenizer) -> Sampling:
    """What the options say. Raises UserError where one is out of its range, TypeError where there is no such option."""
    given: dict[str, Any] = {name: _number(name, value) for name, value in drawing.items() if name != "logit_bias"}
    bias = drawing.get("logit_bias", {})
    if not isinstance(bias, Mapping):
        raise UserError("logit_bias maps tokens, their numbers or texts, to what is added to their logits")
    return Sampling(logit_bias=tuple({_token(one, tokenizer): _bias(one, bias[one]) for one in bias}.items()), **given)


def token_of(text: str, tokenizer: Tokenizer) -> int | None:
    """The number of the token that a text is; None: it is none, or several."""
    if text == UNKNOWN and tokenizer.unknown is not None:
        return tokenizer.unknown
    found = [] if tokenizer.rate else tokenizer.encode(text.encode(errors="replace"), end=False).tolist()
    return found[0] if len(found) == 1 and found[0] != tokenizer.unknown else None


def _number(name: str, value: Any) -> float:
    """The value of an option, checked."""
    if name not in WHOLE | REAL:
        raise TypeError(f"there is no option {name!r} of drawing; there are {', '.join([*Drawing.__annotations__])}")
    (least, most), found = (WHOLE | REAL)[name], _plain(value)
    if found is None or (name in WHOLE and not isinstance(found, int)):
        what = f"it must be a {'whole ' * (name in WHOLE)}number"
    elif least <= found <= most and found != math.inf:
        return found
    elif name in ("top_p", "min_p"):
        what = "it is a probability, from 0 to 1"
    else:
        what = f"it must be at least {least:g}" + (f" and at most {most:g}" if most < (1 << 63) - 1 else "")
    raise UserError(f"{name} is {value!r:.40}: {what}")


def _plain(value: Any) -> float | None:
    """A number of Python or NumPy as an int or a float; None: it is none."""
    if isinstance(value, numbers.Integral):
        return int(value)
    return float(value) if isinstance(value, numbers.Real) else None


def _token(one: Any, tokenizer: Tokenizer) -> int:
    found = token_of(one, tokenizer) if isinstance(one, str) else _plain(one)
    if found is None and isinstance(one, str):
        raise UserError(f"logit_bias: {one!r:.60} is not one token: give the number of a token")
    if not isinstance(found, int) or not 0 <= found < tokenizer.size:
        raise UserError(f"logit_bias: there is no token {one!r:.60}; they are numbers from 0 to {tokenizer.size - 1}, or texts")
    return found


def _bias(one: Any, value: Any) -> float:
    found = _plain(value)
    if found is None or not -MOST_BIAS <= found <= MOST_BIAS:
        raise UserError(f"logit_bias of {one!r:.60} is {value!r:.40}: it is a number from {-MOST_BIAS:g} to {MOST_BIAS:g}")
    return found
