"""What ranks say to each other of a stream: the request, then news of it. Whatever comes is checked before it is believed."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from ..comm.messages import pack, unpack
from ..kernels.types import Array
from .limits import Limits
from .requests import AnyRequest, Event, Finished, Request, SourceRequest, Token

IMPOSSIBLE = -1e9  # nats: JSON has no infinity, and clients are told this in its place
REASONS = {"length", "error", "full"}  # of what ends: nobody here has asked for "cancelled"


class Question(NamedTuple):
    """A Request as it goes to another rank."""

    prompt: np.ndarray  # type: ignore[type-arg]  # (n,) int64; a type that can be looked for
    max_tokens: int
    temperature: float
    top_p: float
    top_k: int
    min_p: float
    logit_bias: tuple[tuple[int, float], ...]
    banned: tuple[int, ...]
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    seed: int
    logprobs: int | None
    echo: bool
    score_only: bool
    want_state: bool
    salt: str  # hexadecimal


class SourceQuestion(NamedTuple):
    """A SourceRequest as it goes to another rank."""

    source: np.ndarray  # type: ignore[type-arg]
    target: np.ndarray | None  # type: ignore[type-arg]
    max_tokens: int
    beams: int
    best: int
    logprobs: int | None


class End(NamedTuple):
    """A Finished as it goes to another rank."""

    reason: str
    message: str = ""
    state: np.ndarray | None = None  # type: ignore[type-arg]  # (H,)
    found: tuple[np.ndarray, ...] = ()  # type: ignore[type-arg]


class News(NamedTuple):
    """What has happened since the last: nothing, where a rank only says that it is there."""

    tokens: list[Token]
    end: End | None = None


def write_question(request: AnyRequest) -> bytes:
    """The message that asks for a stream."""
    if isinstance(request, SourceRequest):
        return pack(SourceQuestion(**vars(request)))
    fields = vars(request) | {"salt": request.salt.hex()}
    return pack(Question(**fields))


def read_question(message: bytes, limits: Limits) -> Request:
    """The Request of a message. Raises ValueError where it is none, or wants more than clients may."""
    asked: Question = unpack(message, Question)
    if asked.prompt.dtype != np.int64 or asked.prompt.size > limits.prompt or asked.max_tokens > limits.tokens:
        raise ValueError("a request that no client may make")
    if asked.top_k >= 2**31 or abs(asked.seed) >= 2**64:
        raise ValueError("a request with numbers that none has")
    scored = asked.prompt.size if asked.echo or asked.score_only else 0
    if (asked.max_tokens + scored) * (1 + (asked.logprobs or 0)) > max(limits.numbers, limits.prompt):  # which /v1/score may
        raise ValueError("a request for more than a client may hold")
    return Request(**asked._asdict() | {"salt": bytes.fromhex(asked.salt)})


def read_source_question(message: bytes, limits: Limits) -> SourceRequest:
    """The same of a SourceRequest."""
    asked: SourceQuestion = unpack(message, SourceQuestion)
    target = 0 if asked.target is None else asked.target.size
    if len(asked.source) > limits.source or max(asked.max_tokens, target) > limits.tokens:
        raise ValueError("a request that no client may make")
    numbers = asked.beams * asked.max_tokens * (1 + (asked.logprobs or 0))
    if numbers > limits.numbers or asked.beams * len(asked.source) > limits.attention:
        raise ValueError("a search that is larger than that of a client")
    return SourceRequest(**asked._asdict())


def write_news(events: Sequence[Event]) -> bytes:
    """The message that says what has happened: tokens, and an end at most, which is the last."""
    tokens = [event if _is_finite(event) else _finite(event) for event in events if isinstance(event, Token)]
    last = events[-1] if events else None
    return pack(News(tokens, End(*last) if isinstance(last, Finished) else None))


def _is_finite(token: Token) -> bool:
    return math.isfinite(token.logprob or 0.0) and all(math.isfinite(value) for _, value in token.alternatives)


def _finite(token: Token) -> Token:
    logprob = None if token.logprob is None else _possible(token.logprob)
    return token._replace(logprob=logprob, alternatives=[(number, _possible(value)) for number, value in token.alternatives])


def _possible(value: float) -> float:
    return value if math.isfinite(value) else IMPOSSIBLE


class Answer:
    """What another rank says of a request, checked against what can be said of it.

    Parameters
    ----------
    request : Request
    vocabulary : int
        Tokens there are.
    hidden : int
        Length of a state.
    """

    def __init__(self, request: Request, vocabulary: int, hidden: int) -> None:
        self.request, self.vocabulary, self.hidden = request, vocabulary, hidden
        self._prompt = len(request.prompt) if request.scores_prompt else 0  # tokens that have to come
        self._generated = request.to_generate

    def read(self, message: bytes) -> list[Event]:
        """The events of a message. Raises ValueError where it is none, or says what cannot be."""
        news: News = unpack(message, News)
        for token in news.tokens:
            self._check(token)
        events: list[Event] = [*news.tokens]
        if news.end is not None:
            events.append(self._finished(news.end))
        return events

    def _check(self, token: Token) -> None:
        self._prompt -= token.prompt
        self._generated -= not token.prompt
        if min(self._prompt, self._generated) < 0 or (self._prompt and not token.prompt):
            raise ValueError("a token that was not asked for")
        if token.prompt and token.number != self.request.prompt[-self._prompt - 1]:
            raise ValueError("a prompt that was not asked for")
        alternatives = token.alternatives
        if len(alternatives) > (self.request.logprobs or 0):
            raise ValueError("alternatives that were not asked for")
        if not all(0 <= number < self.vocabulary for number in (token.number, *[number for number, _ in alternatives])):
            raise ValueError("a token that the model does not have")
        if not _is_finite(token) or (token.logprob is None and not token.prompt):
            raise ValueError("a log-probability that is no number")

    def _finished(self, end: End) -> Finished:
        state = end.state
        if end.reason not in REASONS or end.found:
            raise ValueError("an end that is none")
        if end.reason == "length":
            if self._prompt or self._generated or (state is None) == self.request.want_state:
                raise ValueError("an end before the end")
            if state is not None and (state.shape != (self.hidden,) or state.dtype.kind != "f" or not np.isfinite(state).all()):
                raise ValueError("a state that is none")
        return Finished(end.reason, end.message[:500], state)


class SourceAnswer:
    """The same of a source.

    Parameters
    ----------
    request : SourceRequest
    vocabulary : int
        Tokens there are.
    end : int or None
        The token that ends a target.
    fits : callable
        Whether arrays can be the `found` of this request.
    """

    def __init__(
        self, request: SourceRequest, vocabulary: int, end: int | None, fits: Callable[[Sequence[Array]], bool]
    ) -> None:
        self.request, self.vocabulary, self.end, self.fits = request, vocabulary, end, fits
        self._told = end is not None and request.target is None and request.beams == 1  # whether tokens come
        self._left, self._ended = request.max_tokens if self._told else 0, not self._told

    def read(self, message: bytes) -> list[Event]:
        """The events of a message. Raises ValueError where it is none, or says what cannot be."""
        news: News = unpack(message, News)
        for token in news.tokens:
            self._left -= 1
            numbers = [token.number, *[number for number, _ in token.alternatives]]
            if self._left < 0 or self._ended or token.prompt or len(numbers) > 1 + (self.request.logprobs or 0):
                raise ValueError("a token that was not asked for")
            if not all(0 <= number < self.vocabulary for number in numbers) or token.logprob is None or not _is_finite(token):
                raise ValueError("a token that the model does not have")
            self._ended = token.number == self.end
        return [*news.tokens, *([] if news.end is None else [self._finished(news.end)])]

    def _finished(self, end: End) -> Finished:
        if end.reason not in REASONS or end.state is not None:
            raise ValueError("an end that is none")
        if end.reason == "length" and not ((self._ended or not self._left) and self.fits(end.found)):
            raise ValueError("an end before the end, or of what was not asked for")
        return Finished(end.reason, end.message[:500], None, end.found if end.reason == "length" else ())
