"""The body of a request, field by field: what it may say, checked."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, TypeAlias, TypeVar

from ..engines.errors import Refused
from ..engines.requests import MAX_BIAS, MAX_BIASED

Json: TypeAlias = dict[str, Any]  # an object
Default = TypeVar("Default")

CHOICES = 64  # streams that one request may ask for
SALT_LENGTH = 256
EXACT = 1 << 53  # below it a float is one integer
NEUTRAL: dict[str, tuple[Any, ...]] = {  # what we do not do, and the values of it that ask for nothing
    "suffix": (None, ""),
    # of vLLM, Text Generation Inference and llama.cpp
    "use_beam_search": (None, False), "length_penalty": (None, 1), "early_stopping": (None, False), "min_tokens": (None, 0),
    "ignore_eos": (None, False), "stop_token_ids": (None, []), "include_stop_str_in_output": (None, False),
    "skip_special_tokens": (None, True), "spaces_between_special_tokens": (None, True), "add_special_tokens": (None, True),
    "truncate_prompt_tokens": (None,), "allowed_token_ids": (None,), "bad_words": (None, []), "prompt_logprobs": (None,),
    "response_format": (None, {"type": "text"}), "priority": (None, 0), "typical_p": (None, 1), "tfs_z": (None, 1),
    "repeat_penalty": (None, 1), "mirostat": (None, 0), "store": (None, False),
}  # fmt: skip
IGNORED = {"user", "metadata"}  # say something about the client and nothing about the answer


def read_json(data: bytes) -> Json:
    """The object of a request's body; a number without a fraction is an int, as JSON Schema has it. Raises Refused."""

    def constant(text: str) -> None:
        raise ValueError(f"{text} is no number of JSON")

    try:
        value = json.loads(data.decode(), parse_constant=constant, parse_float=_number)
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError is a ValueError
        raise Refused(f"the body is no JSON in UTF-8: {str(error) or 'it is nested too deeply'}"[:300]) from None
    if not isinstance(value, dict):
        raise Refused("the body must be a JSON object")
    return value


class Fields:
    """A request's body, field by field; what nobody has asked for is refused. All methods raise Refused.

    Parameters
    ----------
    body : dict
    model : str
        The one there is.

    Attributes
    ----------
    cache_salt : str
        What was kept for requests with another is not used for this one; where nothing is kept it says nothing.
    """

    def __init__(self, body: Json, model: str) -> None:
        self.body, self.unread = body, set(body) - IGNORED
        wanted = self.get("model")
        if wanted is not None and not isinstance(wanted, str):
            raise Refused("model must be a string", "model")
        if wanted not in (None, model):
            raise no_such_model(wanted, model, param="model")
        self.cache_salt = self._cache_salt()

    def get(self, name: str, default: Any = None) -> Any:
        """A field, whatever it holds; null is the same as none."""
        self.unread.discard(name)
        value = self.body.get(name)
        return default if value is None else value

    def integer(self, name: str, default: Default, least: int, most: int) -> int | Default:
        """A field that holds an integer from `least` to `most`."""
        value = self.get(name)
        if value is None:
            return default
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
            raise Refused(f"{name} must be an integer from {least} to {most}", name)
        return value

    def real(self, name: str, default: float, least: float, most: float) -> float:
        """A field that holds a number from `least` to `most`."""
        value = self.get(name, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value <= most:
            raise Refused(f"{name} must be a number from {least} to {most}", name)
        return float(value)

    def flag(self, name: str, default: bool = False) -> bool:
        """A field that holds true or false."""
        value = self.get(name, default)
        if not isinstance(value, bool):
            raise Refused(f"{name} must be true or false", name)
        return value

    def _cache_salt(self) -> str:
        value = self.get("cache_salt", "")
        if not isinstance(value, str) or len(value) > SALT_LENGTH or not is_unicode(value):
            raise Refused(f"cache_salt must be a string of at most {SALT_LENGTH} characters", "cache_salt")
        return value

    def texts(self, name: str, vocabulary: int, most: int = CHOICES) -> list[str | list[int]]:
        """Texts and lists of token numbers below `vocabulary`, at most `most`, from a field with one of them or several."""
        value = self.get(name)
        if isinstance(value, str) or _are_tokens(value):
            value = [value]
        if not isinstance(value, list) or not value or not all(isinstance(one, str) or _are_tokens(one) for one in value):
            raise Refused(f"{name} must be a string, a list of strings, a list of token numbers or a list of such lists", name)
        if len(value) > most:
            raise Refused(f"{name} has {len(value)} parts; {most} are allowed", name)
        for one in value:
            if not isinstance(one, str) and not all(0 <= number < vocabulary for number in one):
                what = f"{name}: token numbers are from 0 to {vocabulary - 1}, of this model's own tokenizer; texts need none"
                raise Refused(what, name)
            if isinstance(one, str) and not is_unicode(one):
                raise Refused(f"{name} holds half of a surrogate pair, which is no character", name)
        return value

    def bias(self, name: str, vocabulary: int) -> tuple[tuple[int, float], ...]:
        """(token, number) of a field that maps token numbers, as strings, to numbers."""
        value = self.get(name, {})
        if not isinstance(value, dict) or len(value) > MAX_BIASED:
            raise Refused(f"{name} must be an object of up to {MAX_BIASED} tokens", name)
        found: dict[int, float] = {}
        for token, number in value.items():
            known = token.isascii() and token.isdigit() and len(token) < 10 and int(token) < vocabulary
            if not known or isinstance(number, bool) or not isinstance(number, int | float) or abs(number) > MAX_BIAS:
                most = f"{MAX_BIAS:g}"
                what = f"{name} maps token numbers from 0 to {vocabulary - 1}, as strings, to numbers from -{most} to {most}"
                raise Refused(what, name)
            found[int(token)] = float(number)
        return tuple(found.items())

    def refuse_unread(self, neutral: bool = False) -> None:
        """Refuse what nobody has read. neutral : but for what asks for nothing, which requests for texts may say"""
        for name, values in NEUTRAL.items() if neutral else ():
            if name in self.unread and not any(same(self.body[name], value) for value in values):
                shown = next(json.dumps(value) for value in values if value is not None) if len(values) > 1 else "null"
                raise Refused(f"{name} is not supported: leave it, or give {shown}", name, code="unsupported_parameter")
        unknown = sorted(self.unread - set(NEUTRAL if neutral else ()))
        if unknown:
            raise Refused(f"unknown parameter {unknown[0][:100]!r}", unknown[0][:100], code="unknown_parameter")


def _number(text: str) -> float:
    """5.0 is 5: some languages have no other numbers, and write them so."""
    value = float(text)
    return int(value) if abs(value) < EXACT and value.is_integer() else value


def same(value: Any, other: Any) -> bool:
    """Whether two values of JSON are one: 1 is 1.0, but not true."""
    return bool(value == other) and isinstance(value, bool) == isinstance(other, bool)


def no_such_model(wanted: str, *there: str, param: str | None = None) -> Refused:
    """The error of a request for a model that is not there."""
    return Refused(f"there is no model {wanted[:100]!r}; there {listed(there)}", param, 404, "model_not_found")


def listed(names: Sequence[str]) -> str:
    """ "is 'a'", or "are 'a' and 'b'"."""
    *most, last = map(repr, names)
    return f"are {', '.join(most)} and {last}" if most else f"is {last}"


def is_unicode(text: str) -> bool:
    """Whether a text has no halves of surrogate pairs."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _are_tokens(value: Any) -> bool:
    return isinstance(value, list) and value != [] and all(type(one) is int for one in value)
