"""What a run shows and leaves behind: the header, a live line or plain lines, metrics.jsonl, summary.json, loss.png.

One rank has a Reporter that speaks; on the others it is silent. For each disk that ranks see, one of them writes.
"""

from __future__ import annotations

import collections
import contextlib
import json
import os
import pathlib
import sys
import time
from collections.abc import Callable
from typing import IO, TYPE_CHECKING, Any

from ..errors import printable, reason
from ..files import storage
from ..files.starter import launched_rank
from ..model.blocks import Units
from . import event_files
from .curves import SCORES, Line, can_draw, curves_of, draw, is_number, read_lines, write_whole
from .event_files import EventFile

if TYPE_CHECKING:
    from rich.progress import Progress


class Reporter:
    """The reporter of a run.

    Parameters
    ----------
    speaks : bool
        Whether this rank reports.
    progress : str
        auto, live, plain or none. auto: live on a terminal, else plain.
    before : Reporter, optional
        This rank's, of the same run with more ranks. The rank that wrote its last lines may have died before it did.
    """

    def __init__(self, speaks: bool, progress: str = "auto", before: Reporter | None = None) -> None:
        self.speaks = speaks
        self.recent: collections.deque[Line] = before.recent if before else collections.deque(maxlen=4)  # of two steps
        live = progress == "live" or (progress == "auto" and _on_terminal())
        self.mode = "none" if not speaks or progress == "none" else "live" if live else "plain"
        self.bar: Progress | None = None
        self.metrics: IO[bytes] | None = None
        self.waiting = b""  # lines for metrics.jsonl
        self.failed: set[str] = set()  # files that could not be written
        self.tensorboard: bool = before.tensorboard if before else False  # whether TensorBoard's files are wanted
        self.events: EventFile | None = None
        self.units: Units = before.units if before else Units()  # of what a run reads and predicts

    def say(self, text: str) -> None:
        """A line, or several, in one write."""
        if self.bar is not None:
            self.bar.console.print(text, markup=False, highlight=False)
        elif self.mode != "none":
            sys.stdout.write(text + "\n")
            sys.stdout.flush()

    def warn(self, text: str) -> None:
        """A line on standard error, of the rank that speaks."""
        if self.speaks:
            self.complain(text)

    def complain(self, text: str) -> None:
        """A line on standard error, whoever speaks."""
        sys.stderr.write(f"dllm: {text}\n")
        sys.stderr.flush()

    def begin(self, run: str | os.PathLike[str], step: int, total: int, writes: bool) -> None:
        """Open metrics.jsonl in the folder `run` behind its lines up to `step`, and the live line towards `total` steps.

        writes : whether this rank writes for its disk
        """
        self.run, self.begun, self.first, self.total = pathlib.Path(run), time.monotonic(), step, total
        if writes:
            added = self._open_metrics(step)
            if self.tensorboard:
                self._attempt(event_files.FOLDER, self._open_events, step, added)
        if self.mode == "live":
            from rich.console import Console
            from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn  # slow to import

            columns = TextColumn("step {task.completed}/{task.total}"), BarColumn(20), TextColumn("{task.description}")
            console = Console(force_terminal=True, soft_wrap=True)
            self.bar = Progress(*columns, TextColumn("eta"), TimeRemainingColumn(), console=console, transient=True)
            self.task = self.bar.add_task("", total=total, completed=step)
            self.bar.start()

    def _open_metrics(self, step: int) -> list[Line]:
        """Returns lines that a rank which died has not written."""
        path = self.run / "metrics.jsonl"
        kept = [line for line in read_lines(path) if line["step"] <= step] if step else []
        written = {(line["step"], line.get("split")) for line in kept}
        added = [line for line in self.recent if line["step"] <= step and (line["step"], line.get("split")) not in written]
        storage.write_text(path, "".join(json.dumps(line) + "\n" for line in (*kept, *added)))
        self.metrics = open(path, "ab", buffering=0)  # noqa: SIM115, closed by end()
        return added

    def _open_events(self, step: int, lines: list[Line]) -> None:
        self.events = EventFile(self.run, step)
        for line in lines:
            self.events.log(line)

    def log(self, line: Line) -> None:
        """A line of metrics.jsonl: of training, or of an evaluation where it has "split"."""
        self.recent.append(line)
        if self.metrics is not None:
            self.waiting += json.dumps(line).encode() + b"\n"
            self._attempt("metrics.jsonl", self._write_metrics)
        if self.events is not None:
            self._attempt(event_files.FOLDER, self.events.log, line)
        if self.mode == "none":
            return
        if "split" in line:
            self.say(f"step {line['step']}  {line['split']} {scores_in_words(line)}")
            return
        speed = f"{line['tokens_per_second']:,.0f} {self.units.read}/s"
        text = f"{scores_in_words(line)}  {speed}  communication hidden {line['hidden_comm_fraction']:.0%}"
        if self.bar is not None:
            self.bar.update(self.task, completed=line["step"], description=text)
        elif self.mode == "plain":
            seconds = time.monotonic() - self.begun
            left = seconds / max(1, line["step"] - self.first) * (self.total - line["step"])
            self.say(f"step {line['step']}/{self.total}  {text}  eta {_clock(left)}")

    def _write_metrics(self) -> None:
        """Write what waits; on a full disk it goes on waiting."""
        if self.metrics is None:
            raise ValueError("metrics.jsonl is not open: begin() opens it")
        while self.waiting:
            self.waiting = self.waiting[self.metrics.write(self.waiting) :]

    def end(self) -> None:
        """Close the live line and the metrics."""
        if self.bar is not None:
            self.bar.stop()
            self.bar = None
        if self.metrics is not None:
            self._attempt("metrics.jsonl", self._write_metrics)
            self._attempt("metrics.jsonl", self.metrics.close)
            self.metrics = None
        if self.events is not None:
            self._attempt(event_files.FOLDER, self.events.end)
            self.events = None

    def summarise(self, summary: dict[str, Any], writes: bool) -> None:
        """Write summary.json where this rank writes for its disk."""
        if writes:
            self._attempt("summary.json", storage.write_json, self.run / "summary.json", summary)

    def _attempt(self, name: str, write: Callable[..., object], *arguments: object) -> None:
        """write(*arguments); a full disk is a warning, once for each file: what was computed is worth more than its record."""
        try:
            write(*arguments)
        except OSError as error:
            if name not in self.failed:
                self.complain(f"cannot write {self.run / name}: {reason(error)}; training goes on")
            self.failed.add(name)

    def plot(self) -> str:
        """Draw loss.png from metrics.jsonl. Returns its path, or why there is none."""
        if not can_draw():
            return "pip install matplotlib draws loss.png next time"
        try:
            write = draw(curves_of({self.run.name: read_lines(self.run / "metrics.jsonl")}), self.run.name)
            self._attempt("loss.png", write_whole, self.run / "loss.png", write)
        except Exception as error:  # of a broken matplotlib, of metrics that are too large: the run is done nevertheless
            return f"there is no loss.png: {printable(reason(error) or type(error).__name__)}"
        return "there is no loss.png" if "loss.png" in self.failed else str(self.run / "loss.png")


def _on_terminal() -> bool:
    """Whether a person watches. Open MPI gives a rank a terminal though mpirun writes to a file: there mpirun's own counts."""
    if not sys.stdout.isatty() or launched_rank() is None:
        return sys.stdout.isatty()
    with contextlib.suppress(OSError):
        return os.readlink(f"/proc/{os.getppid()}/fd/1").startswith(("/dev/pts/", "/dev/tty"))
    return False


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}" if minutes >= 60 else f"{minutes}:{rest:02d}"


def scores_in_words(line: Line) -> str:
    """The loss of a line of metrics, and what else it has of SCORES."""
    said = [f"loss {line['loss']:.4f}"]
    for name, (words, form) in SCORES.items():
        value = line.get(name)
        if value is not None and is_number(value):
            said.append(f"{words} {_in_words(value) if name == 'perplexity' else form.format(value)}")
    return "  ".join(said)


def _in_words(perplexity: float) -> str:
    """With two digits behind the point; of a model that diverges, its order of magnitude."""
    return f"{perplexity:.2f}" if perplexity < 1e6 else f"{perplexity:.0e}"
