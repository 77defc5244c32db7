"""Some steps of a run recorded on all ranks and written as a trace: dllm train --trace STEPS."""

from __future__ import annotations

import json
import pathlib
import socket
import time
from collections.abc import Callable
from typing import Any

from .. import __version__
from ..comm.messages import gather
from ..comm.tracing import SHORTEST, Recorder, clock_offsets, stages
from ..errors import reason
from ..files import storage
from ..runs.checkpoint_writer import Saver
from .trace_events import Told, events
from .trainer import SETTLED, Trainer

FILE = "trace.json"


def install(trainer: Trainer, which: tuple[int, int] | None) -> None:
    """Have the steps `which`, first and last, traced; (0, n): n steps behind the slow ones of a start; None: nothing is."""
    if which is not None:
        Trace(trainer, which).install()


class Trace:
    """Records some steps and writes trace.json. Collective: every rank makes one and installs it before the first step.

    Parameters
    ----------
    trainer : Trainer
    which : (int, int)
        The first and the last step; (0, n): n of them, behind those at the start that are slower.
    """

    def __init__(self, trainer: Trainer, which: tuple[int, int]) -> None:
        self.trainer, self.recorder = trainer, Recorder()
        first, last = which
        begin = trainer.state.step + SETTLED
        self.first, self.last = (first, last) if first else (begin + 1, begin + last)
        self._recording = False
        self._begun = 0.0  # when the step under way did
        self._writing: float | None = None  # since when a file of a checkpoint is written

    def install(self) -> None:
        """Wait for the first step."""
        Trainer.before_step.append(self._before)
        self.recorder.put(Trainer, "close", self._closing(Trainer.close))  # of all: after a death another one ends the run

    def _closing(self, close: Callable[[Trainer], None]) -> Callable[[Trainer], None]:
        def closing(trainer: Trainer) -> None:
            if self._before in Trainer.before_step and self._is_whole(trainer):  # the end comes before the last step
                self._finish()
            close(trainer)

        return closing

    def _before(self, trainer: Trainer) -> None:
        """A step begins."""
        if not self._is_whole(trainer):
            return
        step = trainer.state.step + 1
        if step > self.last:
            self._finish()
        elif step >= self.first:
            if not self._recording:
                self.first = step  # a run that was resumed may begin behind the step that was asked for
                self._begin()
            self._begun = time.perf_counter()

    def _is_whole(self, trainer: Trainer) -> bool:
        """Whether all ranks are there that have begun; else the trace is given up."""
        if trainer is self.trainer:
            return True
        self._leave()
        trainer.rank.reporter.warn("no trace: a rank has died before its last step")
        return False

    def _whole(self, write_down: Callable[..., None]) -> Callable[..., None]:
        """With a span for the whole step, which ends with it."""

        def recorded(*arguments: Any) -> None:
            write_down(*arguments)
            self.recorder.span(f"step {self.trainer.state.step}", self._begun)

        return recorded

    def _begin(self) -> None:
        """Put the recorder between the parts of a step."""
        self._recording, rank, recorder = True, self.trainer.rank, self.recorder
        averaging = self.trainer.averaging
        recorder.watch_messages(averaging)
        watched: list[tuple[Any, str, str, float]] = [
            (rank.lanes, "window", "read text", 0.0), (self.trainer.model, "forward", "forward", 0.0),
            (averaging, "begin", "begin the step", 0.0), (averaging, "gradient", "wait for the gradient", 0.0),
            (rank.optimizer, "step", "optimiser", 0.0), (averaging, "clear", "wait until all have read", SHORTEST),
            (averaging, "mix", "mix models", SHORTEST), (averaging, "agreed", "wait for the others' word", SHORTEST),
            (averaging, "consensus", "average model", SHORTEST), (rank.copies, "send", "send states", SHORTEST),
            (rank.copies, "complete", "wait for states", SHORTEST), (rank.metrics, "log", "metrics", 0.0),
            (rank.validation, "run", "evaluation", 0.0), (rank.saver, "begin", "checkpoint: copy", 0.0),
            (rank.saver, "settle", "checkpoint: settle", SHORTEST), (rank.saver, "progress", "checkpoint: send", SHORTEST),
        ]  # fmt: skip
        for owner, name, called, shortest in watched:
            recorder.watch(owner, name, called, shortest)
        recorder.put(self.trainer, "_write_down", self._whole(self.trainer._write_down))
        recorder.put(self.trainer.model, "backward", self._backward(self.trainer.model.backward))
        Saver.on_stage.append(self._on_stage)

    def _backward(self, backward: Callable[..., None]) -> Callable[..., None]:
        """With a span for each layer: they end when a part of the gradient is final."""
        names = {extent.stop: name.removesuffix(".b") for name, extent in self.trainer.rank.layout.blocks.items()}

        def recorded(on_ready: Callable[[slice], object], between: Callable[[], object] | None = None) -> None:
            begin = last = time.perf_counter()

            def ready(part: slice) -> None:
                nonlocal last
                self.recorder.span(f"backward {names.get(part.stop, '')}", last, SHORTEST)
                told = time.perf_counter()
                on_ready(part)
                self.recorder.span("announce", told, SHORTEST)
                last = time.perf_counter()

            backward(ready, between)
            self.recorder.span("backward", begin)

        return recorded

    def _on_stage(self, saver: Saver, stage: str) -> None:
        """By the writing thread."""
        if stage == "begin":
            self._writing = time.perf_counter()
        elif stage == "end":
            self._written(saver)

    def _written(self, saver: Saver) -> None:
        """A file is written, or as much of it as the trace sees."""
        begin, self._writing = self._writing, None
        if begin is not None:
            self.recorder.span(f"write step {saver.step}", begin, track="checkpoint writer")

    def _leave(self) -> None:
        """Nothing is recorded any more."""
        Trainer.before_step = [hook for hook in Trainer.before_step if hook != self._before]  # another list: this one is in use
        if self._on_stage in Saver.on_stage:
            Saver.on_stage.remove(self._on_stage)
        self.recorder.end()

    def _finish(self) -> None:
        """Gather what all ranks have and write it. Collective."""
        trainer, recorder = self.trainer, self.recorder
        self._leave()
        comm, node, reporter = trainer.comm, trainer.rank.node, trainer.rank.reporter
        if not self._recording:
            reporter.warn(f"no trace: step {self.first} is none of those that this start has taken")
            return
        self._written(trainer.rank.saver)
        offsets, doubt = clock_offsets(comm)
        own = Told(
            socket.gethostname(), list(node.pids), recorder.spans, recorder.messages, recorder.marks, stages(trainer.averaging)
        )
        everyone = gather(comm, own, Told)
        if comm.rank > 0:
            return
        path = pathlib.Path(trainer.rank.ownership.run, FILE)
        told = {"dllm": __version__, "steps": [self.first, trainer.state.step], "clocks may be off by seconds": doubt.tolist()}
        try:
            storage.write_text(path, json.dumps({"traceEvents": events(everyone, offsets.tolist()), "otherData": told}))
        except OSError as error:
            reporter.warn(f"cannot write {path}: {reason(error)}")
            return
        reporter.say(f"trace      {path}: open it at ui.perfetto.dev, which reads it in the browser")
