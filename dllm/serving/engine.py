"""Continuous batching: one thread takes all streams a token further at a time; any may join or leave at any token.

    submit -> waiting -> reading the prompt -> running          -> ended
              (queue)    (windows)             (a token a step)

A turn of the thread lets streams in where slots are free, reads at most one window of the prompts that are not read yet, so
that those that run do not stall, and takes one step (scheduler.py says who does what). What happened goes out in one call for
each `deliver`. A stream's tokens depend on the model and its request alone, to the bit (decoder.py, kernels/sample.py).
"""

import threading
import time
import traceback
from collections import deque
from collections.abc import Sequence
from typing import Protocol

import numpy as np

from ..kernels.sample import BAD, Choice
from ..kernels.team import Team
from ..model.decoder import Decoder
from ..model.language_model import LanguageModel
from .prefix_cache import PrefixCache
from .requests import MAX_LOGPROBS, Deliver, Event, Finished, Full, Request, Stopped, Stream, Token
from .scheduler import WINDOW, Scheduler
from .throughput import Throughput

SCORED = 64  # tokens of prompts whose log-probabilities are computed at a time


class Servable(Protocol):
    """What makes the model that an engine works with: a LoadedModel of inference/loaded_model.py, or whatever else can."""

    def model(self, window: int, lanes: int, team: Team) -> LanguageModel:
        """A LanguageModel with parameters."""


class Engine:
    """Answers requests with one model.

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

    def __init__(
        self, source: Servable, slots: int = 64, threads: int = 1, cache_bytes: int = 64 << 20, queue: int = 256,
        precision: str = "fp32", window: int = WINDOW,
    ) -> None:  # fmt: skip
        self.slots, self.queue = slots, queue
        model = source.model(1, 1, Team(threads))
        self.decoder = Decoder(model, slots, precision)
        self.cache = PrefixCache(cache_bytes)
        self.scheduler = Scheduler(slots, window)
        self._choice, self._scored = Choice(slots, MAX_LOGPROBS), Choice(SCORED, MAX_LOGPROBS)
        self._next = np.zeros(slots, np.int64)  # the token that each stream's state has not seen
        self._outbox = Outbox()
        # Shared with other threads, under the lock:
        self._changed = threading.Condition()
        self._waiting: deque[Stream] = deque()
        self._cancelled: list[Stream] = []
        self._stopping, self._deadline, self._problem = False, float("inf"), ""
        self._thread: threading.Thread | None = None
        self._steps, self._throughput = 0, Throughput()

    def start(self) -> None:
        """Compile what is needed, and begin."""
        self.decoder.warm_up()
        self._throughput = Throughput()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    def stop(self, drain_seconds: float = 0.0) -> None:
        """Take nothing more, finish what is there within some seconds, end the rest with "error"."""
        with self._changed:
            self._stopping, self._deadline = True, time.monotonic() + drain_seconds
            self._changed.notify()
        if self._thread is not None:
            self._thread.join()

    def submit(self, request: Request, deliver: Deliver) -> Stream:
        """Begin with a request. From any thread.

        deliver(news) is called in the engine's thread, at most once a step, with all its news: a list of
        (stream, Token or Finished); streams that share an equal `deliver` share the call. It must not block.
        Raises Full, Stopped, or ValueError for tokens that the model does not have.
        """
        prompt = request.prompt
        if prompt.min() < 0 or prompt.max() >= self.decoder.vocabulary:
            raise ValueError(f"tokens are numbers from 0 to {self.decoder.vocabulary - 1}")
        stream = Stream(request, deliver, self._cancel)
        with self._changed:
            if self._problem or self._stopping:
                raise Stopped(self._problem or "the engine is stopping")
            if len(self._waiting) >= self.queue:
                raise Full(f"{self.queue} streams wait already")
            self._waiting.append(stream)
            self._changed.notify()
        return stream

    def load(self) -> dict[str, float]:
        """Numbers for whoever watches. `alive` 0: the thread has ended, nothing is answered any more."""
        with self._changed:
            queued, problem = len(self._waiting), self._problem
        return {
            "active": self.slots - self.scheduler.free, "queued": queued, "slots": self.slots,
            "tokens": self._throughput.tokens, "tokens_per_second": self._throughput.per_second(), "steps": self._steps,
            "cache_bytes": self.cache.bytes, "cache_hits": self.cache.hits,
            "alive": int(not problem and self._thread is not None and self._thread.is_alive()),
        }  # fmt: skip

    def _cancel(self, stream: Stream) -> None:
        with self._changed:
            if not stream.ended:
                self._cancelled.append(stream)
                self._changed.notify()

    def _run(self) -> None:
        message = "the engine is stopping"
        try:
            while self._turn():
                pass
        except BaseException as error:
            traceback.print_exc()
            message = f"the engine failed: {type(error).__name__}: {error}"
        with self._changed:
            self._problem, waiting = message, [*self._waiting]
            self._waiting.clear()
        for stream in [*self.scheduler.clear(), *waiting]:
            if not stream.ended:
                stream.ended = True
                self._outbox.add(stream, Finished("error", message))
        self._deliver()

    def _turn(self) -> bool:
        """Returns whether there is more to do, now or later."""
        scheduler = self.scheduler
        with self._changed:
            while not (self._waiting or self._cancelled or self._stopping) and scheduler.idle:
                self._changed.wait()
            cancelled, self._cancelled = self._cancelled, []
            for stream in cancelled:
                if stream in self._waiting:
                    self._waiting.remove(stream)
            idle = not self._waiting and scheduler.idle
            if self._stopping and (idle or time.monotonic() >= self._deadline):
                return False
        for stream in cancelled:
            if not stream.ended:
                self._end(stream, "cancelled")
        while scheduler.free and self._waiting:  # only this thread takes from it
            with self._changed:
                stream = self._waiting.popleft()
            self._admit(stream)
        if scheduler.window_is_due():
            self._read_window()
        if scheduler.running:
            self._step()
        self._deliver()
        return True

    def _admit(self, stream: Stream) -> None:
        """Give a stream a slot."""
        request, slot = stream.request, self.scheduler.admit(stream)
        if request.scores_prompt:
            self._outbox.add(stream, Token(int(request.prompt[0]), None, [], True))
        self.decoder.states[slot] = 0
        _set_row(self._choice, slot, request)
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

    def _look_up(self, stream: Stream) -> bool:
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

    def _score_prompts(self, streams: Sequence[Stream], lengths: Sequence[int]) -> None:
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

    def _end_prompt(self, stream: Stream) -> None:
        """What a stream does when its prompt is read: it ends, or runs."""
        if stream.request.to_generate == 0:
            self._end(stream, "length")
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
        self._steps += 1
        self._throughput.add(len(slots))

    def _record(self, stream: Stream, choice: Choice, row: int, token: int, logprob: float, prompt: bool = False) -> None:
        """One token of a stream, from a row of `choice`: generated, or of its prompt."""
        if stream.ended:
            return
        if token == BAD:
            self._end(stream, "error", "the model gave numbers that are not finite")
            return
        self._outbox.add(stream, Token(token, logprob, _alternatives(choice, row, stream.request.logprobs or 0), prompt))
        if not prompt:
            stream.generated.append(token)
            if len(stream.generated) == stream.request.max_tokens:
                self._end(stream, "length")

    def _end(self, stream: Stream, reason: str, message: str = "") -> None:
        """Free its slot at once, and say so."""
        state = None
        if stream.slot is not None:
            if reason != "error":
                self.cache.put(stream.request.salt, stream.seen(), self.decoder.states[stream.slot])
            if stream.request.want_state:
                state = self.decoder.top(stream.slot)
            self.scheduler.release(stream)
        stream.ended = True
        self._outbox.add(stream, Finished(reason, message, state))

    def _deliver(self) -> None:
        if undelivered := self._outbox.deliver():
            with self._changed:
                self._cancelled += undelivered


class Outbox:
    """What has happened since it was delivered last, for each `deliver`."""

    def __init__(self) -> None:
        self._news: dict[Deliver, list[tuple[Stream, Event]]] = {}

    def add(self, stream: Stream, event: Event) -> None:
        """Keep an event of a stream for its `deliver`."""
        self._news.setdefault(stream.deliver, []).append((stream, event))

    def deliver(self) -> list[Stream]:
        """One call for each `deliver`. Returns the streams of those that failed: nobody is there any more to use them."""
        news, self._news = self._news, {}
        undelivered: list[Stream] = []
        for deliver, events in news.items():
            try:
                deliver(events)
            except Exception:
                undelivered += [stream for stream, _ in events]
        return undelivered


def _set_row(choice: Choice, row: int, request: Request) -> None:
    """Have a row of `choice` draw as a request wants it, from its first token on."""
    choice.temperature[row], choice.top_k[row], choice.top_p[row] = request.temperature, request.top_k, request.top_p
    choice.seed[row], choice.position[row] = request.seed % 2**64, 0
    choice.wanted[row] = request.logprobs or 0


def _alternatives(choice: Choice, row: int, count: int) -> list[tuple[int, float]]:
    """(number, logprob) of the `count` most likely tokens of a row, of fewer where the vocabulary has fewer."""
    pairs = zip(choice.tokens[row, :count].tolist(), choice.logprobs[row, :count].tolist(), strict=True)
    return [pair for pair in pairs if pair[0] != BAD]


def _targets(streams: Sequence[Stream], lengths: Sequence[int]) -> list[tuple[Stream, int, int]]:
    """(stream, row of the window, place in its prompt) of the tokens behind those of a window, where they are scored."""
    return [
        (stream, t * len(streams) + n, stream.tokens_read + t + 1)
        for n, stream in enumerate(streams)
        if stream.request.scores_prompt
        for t in range(lengths[n])
        if stream.tokens_read + t + 1 < len(stream.request.prompt)
    ]
