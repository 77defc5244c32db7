"""How fast tokens come: a count, and the rate of the last seconds."""

import time
from collections import deque

SECONDS = 5.0  # that the rate looks back
INTERVAL = 0.5  # seconds between the points of the count that are kept


class Throughput:
    """Counts tokens. One thread adds, any may ask.

    Attributes
    ----------
    tokens : int
        All there were.
    """

    def __init__(self) -> None:
        self.tokens = 0
        self._points = deque([(time.monotonic(), 0)])  # (time, tokens)

    def add(self, count: int) -> None:
        """Count the tokens of a step that ends now."""
        now = time.monotonic()
        if now - self._points[-1][0] >= SECONDS:  # after a rest
            self._points = deque([(now, self.tokens)])
        self.tokens += count
        if now - self._points[-1][0] >= INTERVAL:
            self._points.append((now, self.tokens))
            while len(self._points) > 2 and now - self._points[0][0] > SECONDS:
                self._points.popleft()

    def per_second(self) -> float:
        """Tokens a second, of the last SECONDS; 0 where there were none for so long."""
        points = self._points
        (then, before), now, tokens = points[0], time.monotonic(), self.tokens
        return (tokens - before) / max(now - then, 1e-3) if now - points[-1][0] < SECONDS else 0.0
