"""One thread that computes whatever is asked of a rank, for many at a time; others ask it, from any thread.

    submit -> waiting (queue) -> held by what the kind of model has -> ended

In a turn of the thread, `choose` says who begins, and `compute` takes what is held a little further, so that what is cancelled
soon ends. What happened goes out in one call for each `deliver`. text_engine.py and source_engine.py have engines, kinds.py
their table.
"""

import threading
import time
import traceback
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Sequence
from typing import Generic

from ..kernels.types import Array
from .limits import Limits
from .requests import Asked, Deliver, Event, Finished, Full, Stopped, Stream
from .throughput import Throughput
from .wire import Answer, SourceAnswer


class Engine(ABC, Generic[Asked]):
    """Answers requests. Whoever makes one says what is done in a turn.

    Parameters
    ----------
    slots : int
        Streams at a time.
    queue : int
        Streams that may wait.
    """

    def __init__(self, slots: int, queue: int) -> None:
        self.slots, self.queue = slots, queue
        self._outbox = Outbox[Asked]()
        # Shared with other threads, under the lock:
        self._changed = threading.Condition()
        self._waiting: deque[Stream[Asked]] = deque()
        self._cancelled: list[Stream[Asked]] = []
        self._stopping, self._deadline, self._problem = False, float("inf"), ""
        self._thread: threading.Thread | None = None
        self._steps, self._throughput = 0, Throughput()

    # ---- what a kind of engine does, in the engine's thread

    @abstractmethod
    def warm_up(self) -> None:
        """Compile what is needed; in the thread that starts the engine."""

    @abstractmethod
    def check(self, request: Asked) -> None:
        """Raise ValueError where this engine cannot do that. From any thread."""

    @property
    @abstractmethod
    def active(self) -> int:
        """Streams that are held. From any thread."""

    @abstractmethod
    def choose(self, waiting: Sequence[Stream[Asked]]) -> Sequence[Stream[Asked]]:
        """Which of those that wait begin now."""

    @abstractmethod
    def admit(self, stream: Stream[Asked]) -> None:
        """Hold a stream that was chosen."""

    @abstractmethod
    def compute(self) -> None:
        """Take what is held further: `tell` and `end` say what came of it, `count` how much it was."""

    @abstractmethod
    def let_go(self, stream: Stream[Asked], reason: str) -> Array | None:
        """Hold a stream no longer. Returns the state that its Finished is to have. reason : why it ends"""

    @abstractmethod
    def clear(self) -> list[Stream[Asked]]:
        """Hold nothing any more. Returns what was held."""

    @staticmethod
    @abstractmethod
    def read_question(message: bytes, limits: Limits) -> Asked:
        """The request of another rank. Raises ValueError where it is none, or wants more than clients may."""

    @abstractmethod
    def expected(self, request: Asked) -> Answer | SourceAnswer:
        """What checks all that another rank says of a request."""

    def counts(self) -> dict[str, float]:
        """More numbers for `load`. From any thread."""
        return {}

    def full(self, request: Asked) -> str:
        """What there is too much of to let a request wait; "": nothing. Under the lock, from any thread."""
        return ""

    # ---- for everybody

    def start(self) -> None:
        """Compile what is needed, and begin."""
        self.warm_up()
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

    def submit(self, request: Asked, deliver: Deliver[Asked]) -> Stream[Asked]:
        """Begin with a request. From any thread.

        deliver(news) is called in the engine's thread, at most once a turn, with all its news: a list of
        (stream, Token or Finished); streams that share an equal `deliver` share the call. It must not block.
        Raises Full, Stopped, or ValueError for what the model does not have.
        """
        self.check(request)
        stream = Stream(request, deliver, self._cancel)
        with self._changed:
            if self._problem or self._stopping:
                raise Stopped(self._problem or "the engine is stopping")
            if len(self._waiting) >= self.queue:
                raise Full(f"{self.queue} streams wait already")
            if too_much := self.full(request):
                raise Full(too_much)
            self._waiting.append(stream)
            self._changed.notify()
        return stream

    def load(self) -> dict[str, float]:
        """Numbers for whoever watches. `alive` 0: the thread has ended, nothing is answered any more."""
        with self._changed:
            queued, problem = len(self._waiting), self._problem
        return {
            "active": self.active, "queued": queued, "slots": self.slots,
            "tokens": self._throughput.tokens, "tokens_per_second": self._throughput.per_second(), "steps": self._steps,
            "alive": int(not problem and self._thread is not None and self._thread.is_alive()),
        } | self.counts()  # fmt: skip

    # ---- for a kind of engine

    def tell(self, stream: Stream[Asked], event: Event) -> None:
        """Let an event of a stream be delivered."""
        self._outbox.add(stream, event)

    def end(self, stream: Stream[Asked], reason: str, message: str = "", found: tuple[Array, ...] = ()) -> None:
        """Let a stream go at once, and say so. found : see Finished"""
        state = self.let_go(stream, reason)
        stream.ended = True
        self.tell(stream, Finished(reason, message, state, found))

    def count(self, tokens: int) -> None:
        """A step was taken, of so many tokens."""
        self._steps += 1
        self._throughput.add(tokens)

    def _cancel(self, stream: Stream[Asked]) -> None:
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
        for stream in [*self.clear(), *waiting]:
            if not stream.ended:
                stream.ended = True
                self.tell(stream, Finished("error", message))
        self._deliver()

    def _turn(self) -> bool:
        """Returns whether there is more to do, now or later."""
        with self._changed:
            while not (self._waiting or self._cancelled or self._stopping or self.active):
                self._changed.wait()
            cancelled, self._cancelled = self._cancelled, []
            for stream in cancelled:
                if stream in self._waiting:
                    self._waiting.remove(stream)
            idle = not (self._waiting or self.active)
            if self._stopping and (idle or time.monotonic() >= self._deadline):
                return False
        for stream in cancelled:
            if not stream.ended:
                self.end(stream, "cancelled")
        with self._changed:
            chosen = self.choose([*self._waiting]) if self._waiting else []
            for stream in chosen:
                self._waiting.remove(stream)
        for stream in chosen:
            self.admit(stream)
        self.compute()
        self._deliver()
        return True

    def _deliver(self) -> None:
        if undelivered := self._outbox.deliver():
            with self._changed:
                self._cancelled += undelivered


class Outbox(Generic[Asked]):
    """What has happened since it was delivered last, for each `deliver`."""

    def __init__(self) -> None:
        self._news: dict[Deliver[Asked], list[tuple[Stream[Asked], Event]]] = {}

    def add(self, stream: Stream[Asked], event: Event) -> None:
        """Keep an event of a stream for its `deliver`."""
        self._news.setdefault(stream.deliver, []).append((stream, event))

    def deliver(self) -> list[Stream[Asked]]:
        """One call for each `deliver`. Returns the streams of those that failed: nobody is there any more to use them."""
        news, self._news = self._news, {}
        undelivered: list[Stream[Asked]] = []
        for deliver, events in news.items():
            try:
                deliver(events)
            except Exception:
                undelivered += [stream for stream, _ in events]
        return undelivered
