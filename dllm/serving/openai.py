"""OpenAI's protocol: what a request may say, checked, and the bodies of answers.

The form is that of https://platform.openai.com/docs/api-reference/completions; `top_k`, `min_p`,
`repetition_penalty` and `cache_salt` (of vLLM) and `seed` in answers are additions. fields.py reads bodies.
"""

from __future__ import annotations

import json
import math
import secrets
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..engines.errors import Refused
from ..engines.requests import LARGEST_REPETITION, LEAST_REPETITION, MAX_LOGPROBS, MAX_PENALTY
from .fields import CHOICES, Fields, Json, no_such_model

if TYPE_CHECKING:
    from .streamed_text import PlacedToken

encode = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode
SEEDS = 1 << 63  # seeds are 0 to SEEDS - 1; the next choice has the next seed
LARGEST_K = (1 << 31) - 1
STOPS, STOP_LENGTH = 16, 256


@dataclass(frozen=True, kw_only=True)
class Completion:
    """What a request to /v1/completions asks for."""

    prompts: list[str | list[int]]  # texts, or token numbers
    max_tokens: int
    temperature: float
    top_p: float
    top_k: int  # 0: among all tokens
    min_p: float
    logit_bias: tuple[tuple[int, float], ...]
    presence_penalty: float
    frequency_penalty: float
    repetition_penalty: float
    seed: int  # of the first choice
    stop: tuple[str, ...]
    logprobs: int | None  # alternatives to each token
    echo: bool
    n: int  # choices for each prompt
    best_of: int  # texts among which they are the best: those with the best mean log-probability, or those of a search
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
            top_k=min(max(0, fields.integer("top_k", 0, -1, LARGEST_K)), vocabulary),
            min_p=fields.real("min_p", 0, 0, 1),
            logit_bias=fields.bias("logit_bias", vocabulary),
            presence_penalty=fields.real("presence_penalty", 0, -MAX_PENALTY, MAX_PENALTY),
            frequency_penalty=fields.real("frequency_penalty", 0, -MAX_PENALTY, MAX_PENALTY),
            repetition_penalty=fields.real("repetition_penalty", 1, LEAST_REPETITION, LARGEST_REPETITION),
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
        fields.refuse_unread(neutral=True)
        texts = n if searched else wanted.best_of
        if len(wanted.prompts) * texts > CHOICES:
            name = "n" if texts == n else "best_of"
            raise Refused(f"{len(wanted.prompts)} prompts with {name} = {texts} are more than {CHOICES} choices", name)
        wanted._check(searched)
        return wanted

    def _check(self, searched: bool) -> None:
        """Raise Refused where a field asks for what only the other kind of model does."""
        drawn = {
            "temperature": self.temperature not in (0, 1), "top_p": self.top_p < 1, "top_k": self.top_k > 0,
            "min_p": self.min_p > 0, "logit_bias": self.logit_bias != (), "presence_penalty": self.presence_penalty != 0,
            "frequency_penalty": self.frequency_penalty != 0, "repetition_penalty": self.repetition_penalty != 1,
        }  # fmt: skip
        wide = {"stream": self.stream, "logprobs": self.logprobs is not None}
        for name in (name for name, asked in drawn.items() if asked and searched):
            raise Refused(f"{name}: targets are searched for, none is drawn", name, code="unsupported_parameter")
        if searched and self.echo:
            raise Refused("echo: a source is no part of its target", "echo", code="unsupported_parameter")
        for name in (name for name, asked in wide.items() if asked and searched and self.best_of > 1):
            raise Refused(f"{name} goes with n = best_of = 1: of more a search tells at its end", name)
        if not searched and self.stream and self.best_of > self.n:
            raise Refused("stream goes with best_of = n: which texts are the best is known at their end", "stream")


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

    def events(self, more: Json) -> Callable[[Json], str]:
        """What makes an event of a choice: as `encode` of its body and `more`, most of which is encoded once for all."""
        name = '"choices":['
        before, _, after = encode(self.body([]) | more).rpartition(f"{name}]")
        before, after = f'data: {before}{name}{{"index":', f"}}]{after}\n\n"

        def event(choice: Json) -> str:
            index, text, logprobs, reason = choice.values()
            noted = encode(logprobs) if logprobs else "null"
            said = f'"{reason}"' if reason else "null"
            return f'{before}{index},"text":{encode(text)},"logprobs":{noted},"finish_reason":{said}{after}'

        return event


def choice_body(index: int, text: str, logprobs: Json | None, reason: str | None) -> Json:
    """A choice of an answer, or what is new of it. reason : "stop" or "length"; None: it goes on."""
    return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": reason}


def logprobs_body(placed: Iterable[PlacedToken], name: Callable[[int, bool], str]) -> Json:
    """OpenAI's four lists of some tokens. name : token number, whether it is behind a word -> str."""
    placed = list(placed)
    return {
        "tokens": [name(one.token.number, one.behind) for one in placed],
        "token_logprobs": [json_number(one.token.logprob) for one in placed],
        "top_logprobs": [_top_logprobs(one, name) for one in placed],
        "text_offset": [one.start for one in placed],
    }


def _top_logprobs(placed: PlacedToken, name: Callable[[int, bool], str]) -> dict[str, float | None] | None:
    """Text -> log-probability of the most likely tokens and of the one that is there; of two with one text the likelier."""
    token = placed.token
    if token.logprob is None:
        return None
    found: dict[str, float | None] = {}
    for number, value in (*token.alternatives, (token.number, token.logprob)):
        found.setdefault(name(number, placed.behind), json_number(value))
    return found


def json_number(value: float | None) -> float | None:
    """JSON has no infinity: the log-probability of what cannot be."""
    return value if value is None or math.isfinite(value) else -1e9


def models_body(models: Sequence[str], created: int) -> Json:
    """The list of all models. created : seconds since 1970."""
    return {"object": "list", "data": [model_body(one, models, created) for one in models]}


def model_body(wanted: str, models: Sequence[str], created: int) -> Json:
    """What there is to say of the model `wanted`. Raises Refused where it is none of `models`."""
    if wanted not in models:
        raise no_such_model(wanted, *models)
    return {"id": wanted, "object": "model", "created": created, "owned_by": "dllm"}
