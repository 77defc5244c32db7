"""A line now and then while much is moved."""

from __future__ import annotations

import sys
import time

from ..errors import printable

EVERY = 5.0  # seconds between lines


class Progress:
    """Counts bytes, and writes lines to standard error where it takes long.

    what : said in each line
    total : bytes; 0: unknown
    """

    def __init__(self, what: str, total: int = 0) -> None:
        self._what, self._total, self._done = printable(what), total, 0
        self._next = time.monotonic() + EVERY

    def __call__(self, size: int) -> None:
        """So many bytes more."""
        self._done += size
        if time.monotonic() >= self._next:
            self._next = time.monotonic() + EVERY
            of = f" of {max(self._total, self._done) / 1e6:,.0f}" if self._total else ""
            print(f"dllm: {self._what}: {self._done / 1e6:,.0f}{of} MB", file=sys.stderr, flush=True)
