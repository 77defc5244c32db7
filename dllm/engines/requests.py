"""What is asked of the engine, and what comes back."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, NamedTuple, TypeAlias, TypeVar

import numpy as np

from ..kernels.types import Array

MAX_LOGPROBS = 20  # most likely tokens that can be had beside each token
MAX_BIASED, MAX_BANNED = 300, 8  # tokens whose logits a request may change: OpenAI's number, and those that are never drawn
MAX_BIAS, MAX_PENALTY = 100.0, 2.0  # OpenAI's
LEAST_REPETITION, LARGEST_REPETITION = 0.01, 10.0
Asked = TypeVar("Asked", bound="Request | SourceRequest")
MAX_SALT = 64  # bytes: of a key of BLAKE2b


class Full(Exception):
    """The queue is full: try again later."""


class Stopped(Full):
    """The engine takes nothing any more."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Request:
    """One text to continue, or to score. Raises ValueError for what no engine can do."""

    prompt: Array  # (n,) int64, n at least 1
    max_tokens: int = 16
    temperature: float = 1.0  # 0: always the most likely token
    top_p: float = 1.0  # of the top_k, those that together hold this probability
    top_k: int = 0  # among the k most likely; 0: among all
    min_p: float = 0.0  # among those at least so probable, times the probability of the most likely
    logit_bias: Sequence[tuple[int, float]] = ()  # (token, what is added to its logit)
    banned: Sequence[int] = ()  # tokens that are never drawn
    repetition_penalty: float = 1.0  # of what was generated or is in the prompt, see kernels/penalties.py
    presence_penalty: float = 0.0  # of what was generated
    frequency_penalty: float = 0.0  # the same, each time
    seed: int = 0  # modulo 2^64
    logprobs: int | None = None  # how many of the most likely tokens come with each token
    echo: bool = False  # the prompt's tokens come too, with their log-probabilities
    score_only: bool = False  # nothing but these, whatever max_tokens says
    want_state: bool = False  # Finished holds the top layer's last output; behind the whole prompt where nothing is generated
    salt: bytes = b""  # what was kept of requests with the same salt is used, and of no others; at most 64 bytes

    def __post_init__(self) -> None:
        prompt = np.ascontiguousarray(self.prompt, np.int64)
        object.__setattr__(self, "prompt", prompt)
        if prompt.ndim != 1 or len(prompt) == 0:
            raise ValueError("a prompt has at least one token")
        if self.max_tokens < 0 or self.top_k < 0:
            raise ValueError("max_tokens and top_k are not negative")
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise ValueError("temperature is a number of at least 0")
        if not (0 <= self.top_p <= 1 and 0 <= self.min_p <= 1):
            raise ValueError("top_p and min_p are probabilities")
        self._check_changes()
        if not 0 <= (self.logprobs or 0) <= MAX_LOGPROBS:
            raise ValueError(f"logprobs is at most {MAX_LOGPROBS}")
        if len(self.salt) > MAX_SALT:
            raise ValueError(f"a salt has at most {MAX_SALT} bytes")

    def _check_changes(self) -> None:
        if len(self.logit_bias) > MAX_BIASED or len(self.banned) > MAX_BANNED:
            raise ValueError("too many tokens are to be changed")
        if not all(abs(value) <= MAX_BIAS for _, value in self.logit_bias):
            raise ValueError(f"a bias is a number from -{MAX_BIAS:g} to {MAX_BIAS:g}")
        if not all(abs(value) <= MAX_PENALTY for value in (self.presence_penalty, self.frequency_penalty)):
            raise ValueError(f"penalties are numbers from -{MAX_PENALTY:g} to {MAX_PENALTY:g}")
        if not LEAST_REPETITION <= self.repetition_penalty <= LARGEST_REPETITION:
            raise ValueError(f"a repetition penalty is a number from {LEAST_REPETITION} to {LARGEST_REPETITION:g}")

    @property
    def changed(self) -> list[int]:
        """Tokens whose logits are changed before anything is generated."""
        return [*(token for token, _ in self.logit_bias), *self.banned]

    @property
    def scores_prompt(self) -> bool:
        """Whether the log-probabilities of the prompt's tokens are wanted."""
        return self.echo or self.score_only

    @property
    def to_generate(self) -> int:
        """Tokens that are generated at most."""
        return 0 if self.score_only else self.max_tokens

    @property
    def to_read(self) -> int:
        """Tokens of the prompt that are read before the first step: the last goes into the step, where there is one."""
        return len(self.prompt) - (self.to_generate > 0 or not self.want_state)


@dataclass(frozen=True, kw_only=True, eq=False)
class SourceRequest:
    """A source that is read as a whole, and what is to be said of it. Raises ValueError for what no engine can do."""

    source: Array  # (n,) int64 tokens or (n,F) float32 frames, n at least 1
    target: Array | None = None  # (n,) int64: how probable it is, is all that is asked
    max_tokens: int = 16  # of a target, with its end
    beams: int = 1  # texts that a search keeps; 1: the most likely token each time, told as it comes
    best: int = 1  # texts that are wanted of a search
    logprobs: int | None = None  # how many of the most likely tokens come with each token that is told as it comes

    def __post_init__(self) -> None:
        if self.source.ndim not in (1, 2) or not len(self.source):
            raise ValueError("a source has at least one token")
        if not 1 <= self.best <= self.beams or self.max_tokens < 1:
            raise ValueError("a search keeps as many texts as are wanted, of a token at least")
        if not 0 <= (self.logprobs or 0) <= MAX_LOGPROBS:
            raise ValueError(f"logprobs is at most {MAX_LOGPROBS}")


class Token(NamedTuple):
    """A token of a stream, generated or of its prompt."""

    number: int
    logprob: float | None  # nats, of the model's own distribution, whatever temperature and cuts are; None: nothing was before
    alternatives: list[tuple[int, float]]  # (number, logprob), the most likely first
    prompt: bool = False


class Finished(NamedTuple):
    """The last event of every stream."""

    reason: str  # "length", "cancelled" or "error"; of other ranks' streams also "full": nobody has room
    message: str = ""
    state: Array | None = None  # (H,)
    found: tuple[Array, ...] = ()  # of a source: what was asked for, as the kind of model has it (workers.py)


class Stream(Generic[Asked]):
    """A request under way. `request` and `cancel` are for everybody; the other attributes belong to the engine's thread.

    Attributes
    ----------
    slot : int or None
        Where its state is; None: it waits, or has ended.
    tokens_read : int
        Tokens of the prompt that the state has seen.
    generated : list of int
    ended : bool
        Whether its Finished is on the way.
    """

    def __init__(self, request: Asked, deliver: Deliver[Asked], cancel: Callable[[Stream[Asked]], None]) -> None:
        self.request, self.deliver, self._cancel = request, deliver, cancel
        self.slot: int | None = None
        self.tokens_read = 0
        self.generated: list[int] = []
        self.ended = False

    def cancel(self) -> None:
        """Give it up; Finished("cancelled") comes unless it has ended by then. From any thread."""
        self._cancel(self)

    def seen(self: Stream[Request]) -> Array:
        """The tokens (n,) int64 that its state has seen."""
        prompt = self.request.prompt
        if not self.generated:
            return prompt[: self.tokens_read]
        return np.concatenate([prompt, np.array(self.generated[:-1], np.int64)])


AnyRequest: TypeAlias = Request | SourceRequest
Event: TypeAlias = Token | Finished
Deliver: TypeAlias = Callable[[list[tuple[Stream[Asked], Event]]], None]
