"""What is asked of the engine, and what comes back."""

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

MOST = 20  # alternatives of a token


class Full(Exception):
    """The queue is full: try again later."""


class Stopped(Full):
    """The engine takes nothing any more."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Request:
    """One text to continue, or to score. Raises ValueError for what no engine can do."""

    prompt: np.ndarray  # (n,) int64, n at least 1
    max_tokens: int = 16
    temperature: float = 1.0  # 0: always the most likely token
    top_p: float = 1.0  # of the top_k, those that together hold this probability
    top_k: int = 0  # among the k most likely; 0: among all
    seed: int = 0  # modulo 2^64
    logprobs: int | None = None  # so many of the most likely tokens are told beside each token
    echo: bool = False  # the prompt's tokens are told too, with their log-probabilities
    score_only: bool = False  # nothing but these, whatever max_tokens says
    want_state: bool = (
        False  # Finished holds the top layer's last output; that behind the whole prompt where nothing is generated
    )

    def __post_init__(self):
        prompt = np.ascontiguousarray(self.prompt, np.int64)
        object.__setattr__(self, "prompt", prompt)
        if prompt.ndim != 1 or len(prompt) == 0:
            raise ValueError("a prompt has at least one token")
        if self.max_tokens < 0 or self.top_k < 0:
            raise ValueError("max_tokens and top_k are not negative")
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise ValueError("temperature is a number of at least 0")
        if not 0 <= self.top_p <= 1:
            raise ValueError("top_p is a probability")
        if not 0 <= (self.logprobs or 0) <= MOST:
            raise ValueError(f"logprobs is at most {MOST}")

    @property
    def tells_prompt(self):
        return self.echo or self.score_only

    @property
    def to_generate(self):
        return 0 if self.score_only else self.max_tokens

    @property
    def to_read(self):
        """Tokens of the prompt that are read before the first step: the last goes into the step, where there is one."""
        return len(self.prompt) - (self.to_generate > 0 or not self.want_state)


class Token(NamedTuple):
    number: int
    logprob: float | None  # nats, of the model's own distribution, whatever temperature and cuts are; None: nothing was before
    alternatives: list  # of (number, logprob), the most likely first
    prompt: bool = False


class Finished(NamedTuple):
    reason: str  # "length", "cancelled" or "error"; of other ranks' streams also "full": nobody has room
    message: str = ""
    state: np.ndarray | None = None  # (H,)


class Stream:
    """A request under way. What is not public belongs to the engine's thread."""

    def __init__(self, request, deliver, engine):
        self.request, self.deliver = request, deliver
        self._engine, self._slot, self._ended = engine, None, False
        self._read = 0  # tokens of the prompt that the state has seen
        self._made = []  # tokens that were generated

    def cancel(self):
        """Give it up; Finished("cancelled") comes unless it has ended by then. From any thread."""
        self._engine._cancel(self)

    def _seen(self):
        """The tokens that its state has seen."""
        prompt = self.request.prompt
        if not self._made:
            return prompt[: self._read]
        return np.concatenate([prompt, np.array(self._made[:-1], np.int64)])
