"""Sources that are read as a whole: those that wait are computed together, a batch at a time.

    submit -> waiting -> in a batch -> ended
              (queue)    (a step of its Worker a turn)

While a batch is computed, the next one gathers. It has sources that want the same of the model and that fit into the memory
which the Worker has planned: rows, as many for each as the longest of them has tokens or frames. What a source gets does not
depend on its batch (workers.py).
"""

from collections.abc import Iterator, Sequence

from ..kernels.types import Array
from .engine import Engine
from .requests import Finished, SourceRequest, Stream, Token
from .wire import SourceAnswer, read_source_question
from .workers import News, Worker

WAITING = 32  # times the rows of a batch: tokens or frames of all sources that may be here


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
        self._batch: list[Stream[SourceRequest]] = []
        self._work: Iterator[News] = iter(())

    def warm_up(self) -> None:
        self.worker.warm_up()

    def check(self, request: SourceRequest) -> None:
        self.worker.check(request)
        if len(request.source) > self.worker.rows or request.beams > self.slots:
            raise ValueError(f"a source has at most {self.worker.rows} tokens or frames, a search {self.slots} beams")

    @property
    def active(self) -> int:
        return sum(not stream.ended for stream in self._batch)

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
        return sum(len(stream.request.source) for stream in (*self._waiting, *self._batch) if not stream.ended)

    def choose(self, waiting: Sequence[Stream[SourceRequest]]) -> Sequence[Stream[SourceRequest]]:
        if self._batch:
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
        self._work = self.worker.run(chosen)
        return chosen

    def admit(self, stream: Stream[SourceRequest]) -> None:
        self._batch = [*self._batch, stream]

    def compute(self) -> None:
        if not self._batch:
            return
        try:
            news = next(self._work, None)
        except ArithmeticError as error:
            news = None
            for stream in self._batch:
                if not stream.ended:
                    self.end(stream, "error", str(error))
        for number, event in news or ():
            stream = self._batch[number]
            if stream.ended:
                continue
            if isinstance(event, Finished):
                self.end(stream, event.reason, event.message, event.found)
            else:
                self.tell(stream, event)
        self.count(sum(isinstance(event, Token) for _, event in news or ()))
        if news is None or not self.active:
            self._batch, self._work = [], iter(())

    def let_go(self, stream: Stream[SourceRequest], reason: str) -> Array | None:
        return None

    def clear(self) -> list[Stream[SourceRequest]]:
        held, self._batch = self._batch, []
        return held
