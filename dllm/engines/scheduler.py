"""Which stream does what next. Bookkeeping alone: no thread, no lock, no model.

    admit -> reading the prompt -> running        -> release
             (a window at a time)  (a token a step)

A window of one prompt takes almost as long as one of some prompts. So while others run, the first prompts wait a few turns
for more.
"""

from collections.abc import Callable
from typing import TypeAlias

import numpy as np

from .requests import Request
from .requests import Stream as AnyStream

Stream: TypeAlias = AnyStream[Request]
WINDOW = 64  # tokens of a prompt at a time at most; states are kept at its multiples
WINDOW_TOKENS = 256  # of all prompts that are read in one turn
WORTHWHILE, PATIENCE = 4, 4  # prompts that are worth a window, and turns that fewer wait for more while others run


class Scheduler:
    """The slots of an engine, and the streams that have them.

    Parameters
    ----------
    slots : int
        Streams at a time.
    window : int
        Tokens of a prompt that are read at a time at most.

    Attributes
    ----------
    reading : list of Stream
        Those whose prompts are not read yet, the next first.
    running : list of Stream
        Those that get a token in each step.
    active : (len(running),) int64 array
        The slots of `running`.
    """

    def __init__(self, slots: int, window: int = WINDOW) -> None:
        self.slots, self.window = slots, window
        self.reading: list[Stream] = []
        self.running: list[Stream] = []
        self.active = np.zeros(0, np.int64)
        self._free = list(range(slots))[::-1]
        self._turns = 0  # since a window was read, with prompts to read

    @property
    def free(self) -> int:
        """Slots without a stream."""
        return len(self._free)

    @property
    def idle(self) -> bool:
        """Whether no stream has a slot."""
        return not (self.reading or self.running)

    def admit(self, stream: Stream) -> int:
        """Give a stream a slot, the last of those that read. Returns the slot. Raises ValueError where none is free."""
        if not self._free:
            raise ValueError(f"all {self.slots} slots have streams")
        stream.slot = self._free.pop()
        self.reading.append(stream)
        return stream.slot

    def window_is_due(self) -> bool:
        """Count a turn. Returns whether a window is to be read in it."""
        self._turns += bool(self.reading)
        due = len(self.reading) >= WORTHWHILE or (bool(self.reading) and (not self.running or self._turns > PATIENCE))
        if due:
            self._turns = 0
        return due

    def next_window(self, is_read: Callable[[Stream], bool], share: bool) -> tuple[list[Stream], list[int]]:
        """The streams whose prompts are read next, as many as have room beside the first, and how many tokens of each.

        Parameters
        ----------
        is_read : callable
            Takes over what is known of a stream's prompt. Returns whether that is all of it; then the stream does not read.
        share : bool
            Of streams with the same tokens and salt one reads: the others wait for the state behind them.
        """
        streams: list[Stream] = []
        lengths: list[int] = []
        read: set[tuple[bytes, bytes]] = set()
        for stream in list(self.reading):
            if is_read(stream):
                continue
            left = self._left(stream)
            longest = lengths[0] if lengths else left
            if len(streams) == max(1, WINDOW_TOKENS // longest):
                break
            length = min(longest, left)
            tokens = stream.request.salt, stream.request.prompt[: stream.tokens_read + length].tobytes()
            if tokens not in read or stream.request.scores_prompt:
                streams.append(stream)
                lengths.append(length)
                if share:
                    read.add(tokens)
        return streams, lengths

    def _left(self, stream: Stream) -> int:
        """Tokens of its prompt until its next window ends."""
        return min(self.window - stream.tokens_read % self.window, stream.request.to_read - stream.tokens_read)

    def requeue(self, stream: Stream) -> None:
        """Let the others that read have their turn before this one."""
        self.reading.remove(stream)
        self.reading.append(stream)

    def run(self, stream: Stream) -> None:
        """Its prompt is read: it gets a token in each step."""
        self.reading.remove(stream)
        self.running.append(stream)
        self._find_active()

    def release(self, stream: Stream) -> None:
        """Take a stream's slot away; another may have it at once. Raises ValueError where it has none."""
        if stream.slot is None:
            raise ValueError("a stream without a slot")
        (self.running if stream in self.running else self.reading).remove(stream)
        self._find_active()
        self._free.append(stream.slot)
        stream.slot = None

    def clear(self) -> list[Stream]:
        """Take all slots away, whatever state the streams are in. Returns those that had them."""
        streams = [*self.running, *self.reading]
        self.running, self.reading, self._free = [], [], list(range(self.slots))[::-1]
        self._find_active()
        return streams

    def _find_active(self) -> None:
        self.active = np.array([stream.slot for stream in self.running], np.int64)
