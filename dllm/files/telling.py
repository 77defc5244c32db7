"""Standard output and standard error that never end what they tell of: a closed pipe, a full disk, letters they cannot write.

What cannot be written is dropped. Of the first such failure standard error says why, but for a closed pipe, whose reader has
gone by its own will. mpirun ends the job where it cannot pass a line on. So a rank first looks where mpirun's own output goes,
and writes to a pipe itself: its reader may be gone by the time that mpirun writes.
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
import select
import stat
import sys
from typing import Any, TextIO

from ..errors import reason
from . import starter


class _Telling(io.FileIO):
    """A descriptor for which a failed write is no error."""

    failure: OSError | None = None  # the first

    def write(self, data: Any) -> int:
        """All of it, or as much as goes. Returns its size."""
        try:
            _deliver(self.fileno(), data)
        except OSError as error:
            first, self.failure = self.failure is None, self.failure or error
            if first and self.fileno() == 1 and error.errno != errno.EPIPE:
                line = f"dllm: cannot write to standard output: {reason(error)}\n"
                write_error(line.encode())  # not by sys.stderr: a live line, which is being written, may stand in its place
        return len(data)


def write_error(line: bytes) -> None:
    """A line on standard error in one write, so that those of several ranks do not mix; or nothing."""
    with contextlib.suppress(OSError):
        _deliver(2, line)


def _deliver(number: int, data: Any) -> None:
    """Write all of it to a descriptor, or to the pipe that mpirun would pass it on to. Raises OSError."""
    view = memoryview(data).cast("B")
    pipe = _pipe_of_mpirun(number)
    try:
        while view:
            try:
                view = view[os.write(number if pipe is None else pipe, view) :]
            except BlockingIOError:  # a program that has the same terminal has made it nonblocking
                select.select([], [number if pipe is None else pipe], [])
    finally:
        if pipe is not None:
            os.close(pipe)


def _pipe_of_mpirun(number: int) -> int | None:
    """mpirun's own pipe with this number, opened anew, where what ranks write goes there as it is; else None.

    Raises OSError where mpirun could not pass it on: the pipe has no reader, or the disk is full.
    """
    pid = starter.mpirun_pid()
    if pid is None:
        return None
    path = f"/proc/{pid}/fd/{number}"
    try:
        kind = os.stat(path).st_mode
        full = stat.S_ISREG(kind) and os.statvfs(path).f_bfree == 0
        is_pipe, is_device = stat.S_ISFIFO(kind), stat.S_ISCHR(kind)
        opened = os.open(path, os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY) if is_pipe or is_device else None
    except OSError as error:
        if error.errno == errno.ENXIO:  # what Linux says of a pipe without a reader
            raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE)) from None
        return None  # mpirun's output is not ours to see
    if full:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    if opened is not None and (is_device or starter.mpirun_changes_output()):
        try:
            os.write(opened, b"")
        finally:
            os.close(opened)
        opened = None
    return opened


def never_end() -> None:
    """Have this process's standard output and error drop what they cannot write. Once is enough."""
    while (number := os.open(os.devnull, os.O_RDWR)) < 3:  # one that is closed would be the next file's, and get messages
        pass
    os.close(number)
    sys.stdout, sys.stderr = _never_ending(sys.stdout, 1), _never_ending(sys.stderr, 2)


def _never_ending(stream: TextIO | None, number: int) -> TextIO:
    """The same stream, or one in its place. One that is not the process's own, as a test has it, stays."""
    buffer = getattr(stream, "buffer", None)
    raw = getattr(buffer, "raw", buffer)  # python -u has no buffer between
    if stream is not None and (type(raw) is not io.FileIO or raw.fileno() != number):
        return stream
    file = _Telling(number, "w", closefd=False)
    at_once = raw is buffer and stream is not None
    by_line = at_once or getattr(stream, "line_buffering", number == 2)
    encoding = getattr(stream, "encoding", "utf-8")
    return io.TextIOWrapper(file if at_once else io.BufferedWriter(file), encoding, "backslashreplace", None, by_line, at_once)


def has_no_reader() -> bool:
    """Whether nobody reads standard output any more."""
    failure = _failure()
    return failure is not None and failure.errno == errno.EPIPE


def found_no_room() -> bool:
    """Whether something that was written to standard output is not there, though nobody has closed it."""
    failure = _failure()
    return failure is not None and failure.errno != errno.EPIPE


def _failure() -> OSError | None:
    sys.stdout.flush()
    buffer = getattr(sys.stdout, "buffer", None)
    raw = getattr(buffer, "raw", buffer)
    return raw.failure if isinstance(raw, _Telling) else None


def has_all_letters() -> bool:
    """Whether standard output can write any text as it is."""
    return (sys.stdout.encoding or "utf-8").lower().startswith("utf")
