"""Sources that are read as a whole: those that wait are computed together, a batch at a time.

    submit -> waiting -> in a batch -> ended
              (queue)    (a step of its Worker a turn)

While a batch is computed, the next one gathers. It has sources that want the same of the model and that fit into the memory
which the Worker has planned: rows, as many for each as the longest of them has tokens or frames. What a source gets does not
depend on its batch (workers.py).

Long targets do not keep others waiting: a batch that has had its turn is set aside, with what was read for it, where another
wants one. A new batch and one that was set aside go on in turn, so none waits for long.
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from ..kernels.types import Array
from .engine import Engine
from .requests import Event, Finished, SourceRequest, Stream, Token
from .wire import SourceAnswer, read_source_question
from .workers import News, Worker

WAITING = 32  # times the rows of a batch: tokens or frames of all sources that may be here
TURN = 0.25  # seconds that a batch is computed while another waits, and the step that is under way then
BATCHES = 4  # that take turns: beyond them none is begun, since each keeps what it has read


@dataclass(eq=False)
class Batch:
    """Sources that are computed together."""

    streams: list[Stream[SourceRequest]]
    work: Iterator[News]
    kept: Any = None  # of the worker, while it is set aside

    @property
    def active(self) -> int:
        """Streams that have not ended. From any thread."""
        return sum(not stream.ended for stream in self.streams)


class SourceEngine(Engine[SourceRequest]):
    """Answers with what a Worker computes.

    Parameters
    ----------
    worker : Worker
    slots : int
        Rows of texts that are written at a time, beams included.
    queue : int
        Sources that may wait.
    """

    read_question = staticmethod(read_source_question)

    def __init__(self, worker: Worker, slots: int = 64, queue: int = 256) -> None:
        super().__init__(slots, queue)
        self.worker = worker
        self._batch: Batch | None = None  # which has its turn
        self._aside: tuple[Batch, ...] = ()  # a new one for each change, as other threads look at it
        self._new_one_next, self._turn_ends = True, 0.0

    def warm_up(self) -> None:
        self.worker.warm_up()

    def check(self, request: SourceRequest) -> None:
        self.worker.check(request)
        if len(request.source) > self.worker.rows or request.beams > self.slots:
            raise ValueError(f"a source has at most {self.worker.rows} tokens or frames, a search {self.slots} beams")

    @property
    def active(self) -> int:
        return sum(batch.active for batch in self._held())

    def _held(self) -> list[Batch]:
        batch = self._batch
        return [*self._aside, *([] if batch is None or batch in self._aside else [batch])]

    def expected(self, request: SourceRequest) -> SourceAnswer:
        worker = self.worker
        return SourceAnswer(request, worker.vocabulary, worker.end, lambda found: worker.fits(request, found))

    def full(self, request: SourceRequest) -> str:
        most = WAITING * self.worker.rows
        return f"sources of {most} tokens or frames are here already" if self._rows() + len(request.source) > most else ""

    def counts(self) -> dict[str, float]:
        with self._changed:
            return {"source_rows": self._rows()}

    def _rows(self) -> int:
        held = [stream for batch in self._held() for stream in batch.streams]
        return sum(len(stream.request.source) for stream in (*self._waiting, *held) if not stream.ended)

    def choose(self, waiting: Sequence[Stream[SourceRequest]]) -> Sequence[Stream[SourceRequest]]:
        if self._batch or len(self._aside) >= BATCHES or (self._aside and not self._new_one_next):
            return []
        first, longest, chosen = waiting[0].request, 0, list[Stream[SourceRequest]]()
        kind = self.worker.together(first)
        for stream in waiting:
            longest = max(longest, len(stream.request.source))
            count = len(chosen) + 1
            if count > self.worker.lanes or count * longest > self.worker.rows or count * first.beams > self.slots:
                break
            if self.worker.together(stream.request) == kind:
                chosen.append(stream)
        self._batch = Batch(chosen, self.worker.run(chosen))
        self._new_one_next, self._turn_ends = False, time.monotonic() + TURN
        return chosen

    def admit(self, stream: Stream[SourceRequest]) -> None:
        pass  # it is in the batch that was made when it was chosen

    def compute(self) -> None:
        batch = self._batch or self._take_up()
        if batch is None:
            return
        try:
            news = next(batch.work, None)
        except ArithmeticError as error:
            news = None
            for stream in batch.streams:
                if not stream.ended:
                    self.end(stream, "error", str(error))
        for number, event in news or ():
            stream = batch.streams[number]
            if stream.ended:
                continue
            if isinstance(event, Finished):
                self.end(stream, event.reason, event.message, event.found)
            else:
                self.tell(stream, event)
        self.count(sum(_tokens(batch.streams[number], event) for number, event in news or ()))
        if news is None or not batch.active:
            self._batch = None
        elif time.monotonic() >= self._turn_ends and (self._aside or self._waiting):
            batch.kept = self.worker.keep()
            self._new_one_next |= not self._aside
            self._aside = (*self._aside, batch)
            self._batch = None

    def _take_up(self) -> Batch | None:
        """Let the batch go on that was set aside first, of those that anybody still wants; None: there is none."""
        self._new_one_next, self._turn_ends = True, time.monotonic() + TURN
        while self._aside:
            self._batch, self._aside = self._aside[0], self._aside[1:]
            if self._batch.active:
                self.worker.restore(self._batch.kept)
                self._batch.kept = None
                return self._batch
        self._batch = None
        return None

    def let_go(self, stream: Stream[SourceRequest], reason: str) -> Array | None:
        return None

    def clear(self) -> list[Stream[SourceRequest]]:
        held = [stream for batch in self._held() for stream in batch.streams]
        self._batch, self._aside = None, ()
        return held


def _tokens(stream: Stream[SourceRequest], event: Event) -> int:
    """How many were generated: one that is told as it comes, or those of the texts that a search has found."""
    if isinstance(event, Token):
        return 1
    return sum(map(len, event.found[1:])) if stream.request.beams > 1 else 0
