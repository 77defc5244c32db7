"""What TensorBoard shows of a run: files of events in its folder tensorboard/, by tensorboard's own writer of records.

Each start of a run writes a file of its own. It begins with a word that what older files say of later steps is void, since they
are taken again (tensorboard/backend/event_processing/event_accumulator.py).
"""

from __future__ import annotations

import importlib
import importlib.util
import io
import os
import pathlib
import time
from typing import Any

from ..config import LogConfig
from ..errors import UserError, printable, reason
from .curves import SCORES, Line, is_number

FOLDER = "tensorboard"
TRAINING = {  # of a line of training: its name -> the chart
    "loss": "loss/train", "lr": "training/learning rate", "grad_norm": "training/gradient norm",
    "skipped": "training/steps left out", "epoch": "training/epoch", "tokens_per_second": "speed/tokens a second",
    "hidden_comm_fraction": "speed/communication hidden",
}  # fmt: skip


def check(log: LogConfig) -> None:
    """Raise UserError where tensorboard is wanted, and not installed or broken."""
    if not log.tensorboard:
        return
    advice = "pip install 'dllm[tensorboard]', or --set log.tensorboard=false"
    if importlib.util.find_spec("tensorboard") is None:
        raise UserError(f"log.tensorboard = true needs {advice}")
    try:
        for module in ("compat.proto.event_pb2", "compat.proto.summary_pb2", "summary.writer.record_writer"):
            importlib.import_module(f"tensorboard.{module}")
    except Exception as error:  # such as the TypeError of another protobuf
        why = printable(reason(error))
        raise UserError(f"log.tensorboard = true needs a tensorboard that works ({why}): {advice}") from None


def charts(line: Line) -> dict[str, float]:
    """Chart -> value of a line of metrics."""
    split = line.get("split", "train")
    found = {f"{words}/{split}": line[name] for name, (words, _) in SCORES.items() if is_number(line.get(name))}
    if "split" in line:
        return {f"loss/{split}": line["loss"]} | found
    return {chart: line[name] for name, chart in TRAINING.items() if is_number(line.get(name))} | found


class EventFile:
    """The file of one start of a run. Raises OSError, as its methods do; what could not be written is written later.

    Parameters
    ----------
    run : path
    step : int
        The run goes on from.
    """

    def __init__(self, run: pathlib.Path, step: int) -> None:
        from tensorboard.compat.proto.event_pb2 import SessionLog

        (run / FOLDER).mkdir(exist_ok=True)
        name = f"events.out.tfevents.{time.time_ns():020d}.{os.getpid()}"  # in the order in which they are read
        self._file = open(run / FOLDER / name, "xb", buffering=0)  # noqa: SIM115, closed by end()
        self._waiting = b""
        self._add(file_version="brain.Event:2")
        self._add(step=step + 1, session_log=SessionLog(status=SessionLog.START))
        self._write()

    def log(self, line: Line) -> None:
        """A line of metrics."""
        from tensorboard.compat.proto.summary_pb2 import Summary

        values = [Summary.Value(tag=chart, simple_value=value) for chart, value in charts(line).items()]
        self._add(step=line["step"], summary=Summary(value=values))
        self._write()

    def end(self) -> None:
        """Close the file."""
        with self._file:
            self._write()

    def _add(self, **event: Any) -> None:
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.summary.writer.record_writer import RecordWriter

        record = io.BytesIO()
        RecordWriter(record).write(Event(wall_time=time.time(), **event).SerializeToString())
        self._waiting += record.getvalue()

    def _write(self) -> None:
        """Write what waits; on a full disk it goes on waiting, since half a record would hide all that follow it."""
        while self._waiting:
            self._waiting = self._waiting[self._file.write(self._waiting) :]
