"""OpenAI's protocol: what a request may say, checked, and the bodies of answers.

The form is that of https://platform.openai.com/docs/api-reference/completions; `top_k`, `cache_salt` (of
vLLM) and `seed` in answers are additions.
"""

from __future__ import annotations

import json
import math
import secrets
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

from .errors import Refused
from .requests import MAX_LOGPROBS, Token

if TYPE_CHECKING:
    from .streamed_text import PlacedToken

Json: TypeAlias = dict[str, Any]  # an object
Default = TypeVar("Default")

encode = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode
SEEDS = 1 << 63  # seeds are 0 to SEEDS - 1; the next choice has the next seed
CHOICES = 64  # streams that one request may ask for
STOPS, STOP_LENGTH = 4, 256
SALT_LENGTH = 256
NEUTRAL: dict[str, tuple[Any, ...]] = {  # what we do not do, and the values of it that ask for nothing
    "suffix": (None, ""), "logit_bias": (None, {}), "presence_penalty": (None, 0), "frequency_penalty": (None, 0),
}  # fmt: skip
IGNORED = {"user", "metadata"}  # say something about the client and nothing about the answer


def read_json(data: bytes) -> Json:
    """The object of a request's body. Raises Refused."""

    def constant(text: str) -> None:
        raise ValueError(f"{text} is no number of JSON")

    try:
        value = json.loads(data.decode(), parse_constant=constant)
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
            raise Refused(f"there is no model {wanted[:100]!r}; there is {model!r}", "model", 404, "model_not_found")
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
        if not isinstance(value, str) or len(value) > SALT_LENGTH or not _is_unicode(value):
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
                raise Refused(f"{name}: token numbers are from 0 to {vocabulary - 1}", name)
            if isinstance(one, str) and not _is_unicode(one):
                raise Refused(f"{name} holds half of a surrogate pair, which is no character", name)
        return value

    def refuse_unread(self) -> None:
        """Refuse what nobody has read, unless it asks for nothing."""
        for name, neutral in NEUTRAL.items():
            if name in self.unread and not any(self.body[name] == value for value in neutral):
                raise Refused(f"{name} is not supported", name, code="unsupported_parameter")
        unknown = sorted(self.unread - set(NEUTRAL))
        if unknown:
            raise Refused(f"unknown parameter {unknown[0][:100]!r}", unknown[0][:100], code="unknown_parameter")


def _are_tokens(value: Any) -> bool:
    return isinstance(value, list) and value != [] and all(type(one) is int for one in value)


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


@dataclass(frozen=True, kw_only=True)
class Completion:
    """What a request to /v1/completions asks for."""

    prompts: list[str | list[int]]  # texts, or token numbers
    max_tokens: int
    temperature: float
    top_p: float
    top_k: int  # 0: among all tokens
    seed: int  # of the first choice
    stop: tuple[str, ...]
    logprobs: int | None  # alternatives to each token
    echo: bool
    n: int  # choices for each prompt
    best_of: int  # texts among which they are the best
    stream: bool
    include_usage: bool
    cache_salt: str  # "": none

    @classmethod
    def read(cls, body: Json, model: str, vocabulary: int, max_tokens: int, searched: bool = False) -> Completion:
        """What a body asks for. Raises Refused.

        Parameters
        ----------
        body : dict
        model : str
            The one there is.
        vocabulary : int
            Its tokens.
        max_tokens : int
            That a choice may have.
        searched : bool
            Whether texts are searched for, `best_of` of them at a time, or drawn.
        """
        fields = Fields(body, model)
        n = fields.integer("n", 1, 1, CHOICES)
        wanted = cls(
            prompts=fields.texts("prompt", vocabulary),
            max_tokens=fields.integer("max_tokens", 16, 0, max_tokens),
            temperature=fields.real("temperature", 1.0, 0, 2),
            top_p=fields.real("top_p", 1.0, 0, 1) or 1e-9,
            top_k=fields.integer("top_k", 0, 0, vocabulary),
            seed=fields.integer("seed", secrets.randbelow(1 << 53), 0, SEEDS - 1),  # JavaScript's numbers end at 2^53
            stop=_stops(fields.get("stop", [])),
            logprobs=fields.integer("logprobs", None, 0, MAX_LOGPROBS),
            echo=fields.flag("echo"),
            n=n,
            best_of=fields.integer("best_of", n, n, CHOICES),
            stream=fields.flag("stream"),
            include_usage=_include_usage(fields.get("stream_options"), body.get("stream")),
            cache_salt=fields.cache_salt,
        )
        fields.refuse_unread()
        if len(wanted.prompts) * n > CHOICES:
            raise Refused(f"{len(wanted.prompts)} prompts with n = {n} are more than {CHOICES} choices", "n")
        wanted._check(searched)
        return wanted

    def _check(self, searched: bool) -> None:
        """Raise Refused where a field asks for what only the other kind of model does."""
        if not searched and self.best_of != self.n:
            raise Refused("best_of other than n is not supported", "best_of", code="unsupported_parameter")
        drawn = {"temperature": self.temperature not in (0, 1), "top_p": self.top_p < 1, "top_k": self.top_k > 0}
        wide = {"stream": self.stream, "logprobs": self.logprobs is not None}
        for name in (name for name, asked in drawn.items() if asked and searched):
            raise Refused(f"{name}: targets are searched for, none is drawn", name, code="unsupported_parameter")
        if searched and self.echo:
            raise Refused("echo: a source is no part of its target", "echo", code="unsupported_parameter")
        for name in (name for name, asked in wide.items() if asked and searched and self.best_of > 1):
            raise Refused(f"{name} goes with n = best_of = 1: of more a search tells at its end", name)


def _stops(value: Any) -> tuple[str, ...]:
    stops = [value] if isinstance(value, str) else value
    if not isinstance(stops, list) or len(stops) > STOPS or not all(isinstance(one, str) and one for one in stops):
        raise Refused(f"stop must be a string or a list of up to {STOPS}, none of them empty", "stop")
    if any(len(one) > STOP_LENGTH for one in stops):
        raise Refused(f"a stop string may have {STOP_LENGTH} characters", "stop")
    return tuple(stops)


def _include_usage(options: Any, stream: Any) -> bool:
    if options is None:
        return False
    if not stream or not isinstance(options, dict) or not set(options) <= {"include_usage", "include_obfuscation"}:
        raise Refused('stream_options must be {"include_usage": true or false}, with stream', "stream_options")
    if not all(value is None or isinstance(value, bool) for value in options.values()):
        raise Refused("include_usage must be true or false", "stream_options")
    return bool(options.get("include_usage"))


def usage(prompt: int, completion: int) -> Json:
    """How many tokens an answer has read and generated."""
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


class Answer:
    """The bodies of one answer of /v1/completions: whole, or in chunks."""

    def __init__(self, model: str, seed: int) -> None:
        self.head = {
            "id": f"cmpl-{secrets.token_hex(12)}", "object": "text_completion", "created": int(time.time()), "model": model,
            "seed": seed,
        }  # fmt: skip

    def body(self, choices: list[Json], counts: tuple[int, int] | None = None) -> Json:
        """counts : (prompt tokens, completion tokens), or None: not said."""
        return self.head | {"choices": choices} | ({"usage": usage(*counts)} if counts else {})


def choice_body(index: int, text: str, logprobs: Json | None, reason: str | None) -> Json:
    """A choice of an answer, or what is new of it. reason : "stop" or "length"; None: it goes on."""
    return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": reason}


def logprobs_body(placed: Iterable[PlacedToken], name: Callable[[int], str]) -> Json:
    """OpenAI's four lists of some tokens. name : token number -> str."""
    placed = list(placed)
    return {
        "tokens": [name(one.token.number) for one in placed],
        "token_logprobs": [json_number(one.token.logprob) for one in placed],
        "top_logprobs": [_top_logprobs(one.token, name) for one in placed],
        "text_offset": [one.start for one in placed],
    }


def _top_logprobs(token: Token, name: Callable[[int], str]) -> dict[str, float | None] | None:
    """Text -> log-probability of a token's alternatives; of two with the same text the likelier."""
    if token.logprob is None:
        return None
    found: dict[str, float | None] = {}
    for number, value in token.alternatives or ():
        found.setdefault(name(number), json_number(value))
    return found


def json_number(value: float | None) -> float | None:
    """JSON has no infinity: the log-probability of what cannot be."""
    return value if value is None or math.isfinite(value) else -1e9


def models_body(model: str, created: int) -> Json:
    """The list of the only model. created : seconds since 1970."""
    entry = {"id": model, "object": "model", "created": created, "owned_by": "dllm"}
    return {"object": "list", "data": [entry]}
