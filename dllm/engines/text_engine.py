"""Continuous batching: all texts a token further at a time; any may join or leave at any token.

    submit -> waiting -> reading the prompt -> running          -> ended
              (queue)    (windows)             (a token a step)

A turn lets streams in where slots are free, reads at most one window of the prompts that are not read yet, so that those that
run do not stall, and takes one step (scheduler.py says who does what). A stream's tokens depend on the model and its request
alone, to the bit (decoder.py, kernels/sample.py).
"""

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from ..kernels.sample import BAD, Choice
from ..kernels.team import Team
from ..kernels.types import Array
from ..model.decoder import Decoder
from ..model.language_model import LanguageModel
from .engine import Engine
from .prefix_cache import PrefixCache
from .requests import MAX_LOGPROBS, Request, Stream, Token
from .scheduler import WINDOW, Scheduler
from .wire import Answer, read_question

SCORED = 64  # tokens of prompts whose log-probabilities are computed at a time


class Servable(Protocol):
    """What makes the model that an engine works with: a LoadedModel of inference/loaded_model.py, or whatever else can."""

    def model(self, window: int, lanes: int, team: Team) -> LanguageModel:
        """A LanguageModel with parameters."""


class TextEngine(Engine[Request]):
    """Continues texts with one model.

    Parameters
    ----------
    source : Servable
        Makes the model.
    slots : int
        Streams at a time.
    threads : int
    cache_bytes : int
        Of states that are kept behind prefixes.
    queue : int
        Streams that may wait.
    precision : "fp32", "bf16" or "int8"
        Of products, as Decoder has it.
    window : int
        Tokens of a prompt that are read at a time at most.
    """

    read_question = staticmethod(read_question)

    def __init__(
        self, source: Servable, slots: int = 64, threads: int = 1, cache_bytes: int = 64 << 20, queue: int = 256,
        precision: str = "fp32", window: int = WINDOW,
    ) -> None:  # fmt: skip
        super().__init__(slots, queue)
        model = source.model(1, 1, Team(threads))
        self.decoder = Decoder(model, slots, precision)
        self.cache = PrefixCache(cache_bytes)
        self.scheduler = Scheduler(slots, window)
        self._choice, self._scored = Choice(slots, MAX_LOGPROBS), Choice(SCORED, MAX_LOGPROBS)
        self._next = np.zeros(slots, np.int64)  # the token that each stream's state has not seen

    def warm_up(self) -> None:
        self.decoder.warm_up()

    def check(self, request: Request) -> None:
        prompt = request.prompt
        numbers = [int(prompt.min()), int(prompt.max()), *request.changed]
        if min(numbers) < 0 or max(numbers) >= self.decoder.vocabulary:
            raise ValueError(f"tokens are numbers from 0 to {self.decoder.vocabulary - 1}")

    @property
    def active(self) -> int:
        return self.slots - self.scheduler.free

    def expected(self, request: Request) -> Answer:
        return Answer(request, self.decoder.vocabulary, self.decoder.config.hidden)

    def counts(self) -> dict[str, float]:
        return {"cache_bytes": self.cache.bytes, "cache_hits": self.cache.hits}

    def choose(self, waiting: Sequence[Stream[Request]]) -> Sequence[Stream[Request]]:
        return waiting[: self.scheduler.free]

    def compute(self) -> None:
        if self.scheduler.window_is_due():
            self._read_window()
        if self.scheduler.running:
            self._step()

    def admit(self, stream: Stream[Request]) -> None:
        request, slot = stream.request, self.scheduler.admit(stream)
        if request.scores_prompt:
            self.tell(stream, Token(int(request.prompt[0]), None, [], True))
        self.decoder.states[slot] = 0
        self._choice.begin(slot, request, request.prompt)
        self._choice.wanted[slot] = request.logprobs or 0
        self._next[slot] = request.prompt[-1]
        if request.to_read == 0:
            self._end_prompt(stream)
        else:
            self._look_up(stream)

    def _read_window(self) -> None:
        """A window of the prompts that have waited longest."""
        streams, lengths = self.scheduler.next_window(self._look_up, self.cache.limit > 0)
        if not streams:
            return
        tokens = np.zeros((lengths[0], len(streams)), np.int64)
        for n, (stream, length) in enumerate(zip(streams, lengths, strict=True)):
            tokens[:length, n] = stream.request.prompt[stream.tokens_read : stream.tokens_read + length]
        self.decoder.read(tokens, np.array([stream.slot for stream in streams]), np.array(lengths))
        self._score_prompts(streams, lengths)
        for stream, length in zip(streams, lengths, strict=True):
            if stream.ended:
                continue
            stream.tokens_read += length
            done = stream.tokens_read == stream.request.to_read
            if done or stream.tokens_read % self.scheduler.window == 0:
                self.cache.put(stream.request.salt, stream.seen(), self.decoder.states[stream.slot])
            if done:
                self._end_prompt(stream)
            else:
                self.scheduler.requeue(stream)

    def _look_up(self, stream: Stream[Request]) -> bool:
        """Take over what is known by now of the state behind a prompt. Returns whether that is all of it."""
        request = stream.request
        if request.scores_prompt:  # every token's log-probability is wanted, so all are read
            return False
        length, state = self.cache.find(request.salt, request.prompt[: request.to_read], stream.tokens_read)
        if length > stream.tokens_read:
            stream.tokens_read = length
            self.decoder.states[stream.slot] = state
        if stream.tokens_read < request.to_read:
            return False
        self._end_prompt(stream)
        return True

    def _score_prompts(self, streams: Sequence[Stream[Request]], lengths: Sequence[int]) -> None:
        """The log-probabilities of the tokens behind those of the window, for the streams that want them."""
        wanted = _targets(streams, lengths)
        for start in range(0, len(wanted), SCORED):
            part = wanted[start : start + SCORED]
            rows, choice = np.arange(len(part)), self._scored
            choice.given[: len(part)] = [stream.request.prompt[at] for stream, _, at in part]
            choice.wanted[: len(part)] = [stream.request.logprobs or 0 for stream, _, _ in part]
            self.decoder.choose(choice, rows, np.array([row for _, row, _ in part]))
            for n, (stream, _, _) in enumerate(part):
                self._record(stream, choice, n, int(choice.token[n]), float(choice.logprob[n]), prompt=True)

    def _end_prompt(self, stream: Stream[Request]) -> None:
        """What a stream does when its prompt is read: it ends, or runs."""
        if stream.request.to_generate == 0:
            self.end(stream, "length")
        else:
            self.scheduler.run(stream)

    def _step(self) -> None:
        """One token more for each stream."""
        slots, streams, choice = self.scheduler.active, list(self.scheduler.running), self._choice
        self.decoder.read(self._next[slots][None], slots)
        self.decoder.choose(choice, slots)
        tokens, logprobs = choice.token[slots], choice.logprob[slots].tolist()
        self._next[slots] = tokens
        choice.position[slots] += np.uint64(1)
        for stream, slot, token, logprob in zip(streams, slots.tolist(), tokens.tolist(), logprobs, strict=True):
            self._record(stream, choice, slot, token, logprob)
        self.count(len(slots))

    def _record(
        self, stream: Stream[Request], choice: Choice, row: int, token: int, logprob: float, prompt: bool = False
    ) -> None:
        """One token of a stream, from a row of `choice`: generated, or of its prompt."""
        if stream.ended:
            return
        if token == BAD:
            self.end(stream, "error", "the model gave numbers that are not finite")
            return
        self.tell(stream, Token(token, logprob, _alternatives(choice, row, stream.request.logprobs or 0), prompt))
        if not prompt:
            stream.generated.append(token)
            choice.changes.note(row, token)
            if len(stream.generated) == stream.request.max_tokens:
                self.end(stream, "length")

    def let_go(self, stream: Stream[Request], reason: str) -> Array | None:
        if stream.slot is None:
            return None
        if reason != "error":
            self.cache.put(stream.request.salt, stream.seen(), self.decoder.states[stream.slot])
        state = self.decoder.top(stream.slot) if stream.request.want_state else None
        self.scheduler.release(stream)
        return state

    def clear(self) -> list[Stream[Request]]:
        return self.scheduler.clear()


def _alternatives(choice: Choice, row: int, count: int) -> list[tuple[int, float]]:
    """(number, logprob) of the `count` most likely tokens of a row, of fewer where the vocabulary has fewer."""
    pairs = zip(choice.tokens[row, :count].tolist(), choice.logprobs[row, :count].tolist(), strict=True)
    return [pair for pair in pairs if pair[0] != BAD]


def _targets(streams: Sequence[Stream[Request]], lengths: Sequence[int]) -> list[tuple[Stream[Request], int, int]]:
    """(stream, row of the window, place in its prompt) of the tokens behind those of a window, where they are scored."""
    return [
        (stream, t * len(streams) + n, stream.tokens_read + t + 1)
        for n, stream in enumerate(streams)
        if stream.request.scores_prompt
        for t in range(lengths[n])
        if stream.tokens_read + t + 1 < len(stream.request.prompt)
    ]
