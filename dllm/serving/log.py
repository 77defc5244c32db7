"""The log of a server: a line for each request, and for whatever else happens."""

import json
import logging
import os
import time
from typing import Any


class Log:
    """Lines of JSON on standard error, one write each, so that those of several ranks do not mix.

    Parameters
    ----------
    rank : int
        That every line names.
    """

    def __init__(self, rank: int) -> None:
        self.rank = rank

    def __call__(self, event: str, **values: Any) -> None:
        """Write {"time", "rank", "event", ...}; time in seconds since 1970."""
        line = {"time": round(time.time(), 3), "rank": self.rank, "event": event, **values}
        os.write(2, (json.dumps(line, ensure_ascii=False) + "\n").encode(errors="replace"))

    def capture_libraries(self) -> None:
        """Have what libraries say by Python's `logging` in this log, too."""
        logging.basicConfig(level=logging.WARNING, handlers=[_Handler(self)], force=True)


class _Handler(logging.Handler):
    def __init__(self, log: Log) -> None:
        super().__init__()
        self.log = log

    def emit(self, record: logging.LogRecord) -> None:
        more = {"trace": logging.Formatter().formatException(record.exc_info)} if record.exc_info else {}
        self.log("message", level=record.levelname, source=record.name, text=record.getMessage(), **more)
