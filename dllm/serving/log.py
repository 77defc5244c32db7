"""The log of a server: a line for each request, and for whatever else happens. What strangers can cause is bounded.

A thread of its own writes: nobody waits where standard error is a pipe that nobody reads. Then lines are left out, and counted.
"""

import json
import logging
import re
import threading
import time
from collections import deque
from typing import Any

from ..files import telling

MINUTE = 60.0  # seconds
MOST = 20  # lines in a minute of a kind that anybody can cause
UNWRITTEN = 1 << 20  # characters of lines that wait to be written
FLUSH = 2.0  # seconds that the end waits for them
TEXT, TRACE = 1000, 8000  # characters of a message of a library, and of its traceback
# What terminals obey or hide, beside what JSON escapes.
UNSEEN = re.compile("[\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069]")


class Log:
    """Lines of JSON on standard error, one write each, so that those of several ranks do not mix.

    Until `start` and after `end` whoever says something writes it.

    Parameters
    ----------
    rank : int
        That every line names.
    """

    def __init__(self, rank: int) -> None:
        self.rank = rank
        self._lock = threading.Lock()
        self._changed = threading.Condition()
        self._lines: deque[str] = deque()  # this and the next three under `_changed`
        self._size = self._lost = 0  # characters in it, and lines that found no room
        self._over = False
        self._writer: threading.Thread | None = None
        self._kinds: dict[str, list[float]] = {}  # kind -> [when its minute began, lines since, of which not written]

    def __call__(self, event: str, **values: Any) -> None:
        """Write {"time", "rank", "event", ...}; time in seconds since 1970."""
        line = {"time": round(time.time(), 3), "rank": self.rank, "event": event, **values}
        text = UNSEEN.sub(lambda found: f"\\u{ord(found[0]):04x}", json.dumps(line, ensure_ascii=False)) + "\n"
        with self._changed:
            at_once = self._writer is None
            if not at_once and self._size and self._size + len(text) > UNWRITTEN:
                self._lost += 1
            elif not at_once:
                self._lines.append(text)
                self._size += len(text)
            self._changed.notify()
        if at_once:
            telling.write_error(text.encode(errors="replace"))

    def start(self) -> None:
        """Write in a thread from now on."""
        self._writer = threading.Thread(target=self._write, name="log", daemon=True)
        self._writer.start()

    def end(self) -> None:
        """Write what waits, within FLUSH seconds."""
        with self._changed:
            writer, self._writer, self._over = self._writer, None, True
            self._changed.notify()
        if writer is not None:
            writer.join(FLUSH)

    def _write(self) -> None:
        while True:
            with self._changed:
                while not (self._lines or self._lost or self._over):
                    self._changed.wait()
                lines, lost = [*self._lines], self._lost
                self._lines.clear()
                self._lost = 0
                if not (lines or lost):
                    return
            for text in lines:
                telling.write_error(text.encode(errors="replace"))
                with self._changed:
                    self._size -= len(text)
            if lost:
                left = {"time": round(time.time(), 3), "rank": self.rank, "event": "left_out", "kind": "unread", "lines": lost}
                telling.write_error((json.dumps(left) + "\n").encode())

    def limited(self, kind: str, event: str, **values: Any) -> None:
        """Write a line of a kind of which there are at most MOST in a minute; `catch_up` says how many more there were."""
        self.catch_up()
        with self._lock:
            state = self._kinds.setdefault(kind, [time.monotonic(), 0, 0])
            state[1] += 1
            if state[1] > MOST:
                state[2] += 1
                return
        self(event, **values)

    def catch_up(self, ending: bool = False) -> None:
        """Write how many lines were left out in the minutes that have passed. ending: and in this one."""
        now, ended = time.monotonic(), []
        with self._lock:
            for kind, (begun, _, left) in list(self._kinds.items()):
                if ending or now - begun >= MINUTE:
                    del self._kinds[kind]
                    ended += [(kind, int(left))] if left else []
        for kind, left in ended:
            self("left_out", kind=kind, lines=left)

    def capture_libraries(self) -> None:
        """Have what libraries say by Python's `logging` in this log, too."""
        logging.basicConfig(level=logging.WARNING, handlers=[_Handler(self)], force=True)


class _Handler(logging.Handler):
    def __init__(self, log: Log) -> None:
        super().__init__()
        self.log = log

    def emit(self, record: logging.LogRecord) -> None:
        more = {"trace": logging.Formatter().formatException(record.exc_info)[-TRACE:]} if record.exc_info else {}
        kind, text = f"{record.name}, line {record.lineno}", record.getMessage()[:TEXT]
        self.log.limited(kind, "message", level=record.levelname, source=record.name, text=text, **more)
