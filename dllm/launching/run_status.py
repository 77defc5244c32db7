"""What one disk says of a run; and the program that the launcher starts on other hosts to learn it, or to change it there.

    python -m dllm.launching.run_status RUN status   a line that says how the run is
    python -m dllm.launching.run_status RUN anew     remove what came to no checkpoint
    python -m dllm.launching.run_status RUN go-on    take the mark of its end away
    python -m dllm.launching.run_status RUN watch    a line every few seconds, until nobody listens

It stays small in memory while it watches, since it does so beside a rank: what imports Numba is imported only where it is used.
"""

from __future__ import annotations

import dataclasses
import math
import os
import select
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated

import msgspec

from ..errors import UserError, printable, reason
from ..runs import marks, ownership

EVERY = 1.0  # seconds between lines
MARK = b"dllm-run "  # before a status: what a login prints stands there, too
LONGEST = 8192  # bytes of a line
_Step = Annotated[int, msgspec.Meta(ge=0, le=2**53)]
_Seconds = Annotated[float, msgspec.Meta(ge=0)]
_Ranks = Annotated[int, msgspec.Meta(ge=1, le=marks.MOST_RANKS)]
_Token = Annotated[str, msgspec.Meta(max_length=200)]
_Line = Annotated[str, msgspec.Meta(max_length=LONGEST // 8)]  # JSON may take six letters for one


@dataclass(frozen=True)
class RunStatus:
    """How a run is."""

    there: bool = False  # whether anything has its name
    settings: bool = False  # whether it has a config.toml
    step: _Step | None = None  # of its newest checkpoint
    done: bool = False
    owner: _Token | None = None  # the job that took it last
    silent: _Seconds | None = None  # seconds since that job last showed that it is alive
    resize: _Ranks | None = None  # ranks that somebody wants
    error: _Line = ""  # what could not be done

    @classmethod
    def here(cls, run: str, pulse: ownership.Pulse, steps: bool = True) -> RunStatus:
        """On the disk of this host. steps: also look for checkpoints, which takes longer."""
        step, owner = None, ownership.owner(run)
        if steps:
            from ..runs.run_folder import newest_step

            step = newest_step(run)
        return cls(
            there=os.path.lexists(run),
            settings=os.path.exists(os.path.join(run, "config.toml")),
            step=step,
            done=marks.is_done(run),
            owner=None if owner is None else owner[:200],
            silent=pulse.silent(),
            resize=marks.resize_request(run),
        )

    @classmethod
    def read(cls, line: bytes) -> RunStatus | None:
        """What a host has said; None where it is no status: a host is not believed blindly."""
        if not line.startswith(MARK) or len(line) > LONGEST:
            return None
        try:
            return msgspec.json.decode(line[len(MARK) :], type=cls)
        except (ValueError, RecursionError):  # msgspec's errors are of ValueError
            return None

    def line(self) -> bytes:
        """As `read` reads it."""
        return MARK + msgspec.json.encode(self) + b"\n"

    def later(self, seconds: float) -> RunStatus:
        """The same when nothing more was heard for so long."""
        return self if self.silent is None else dataclasses.replace(self, silent=self.silent + seconds)


def together(statuses: Iterable[RunStatus]) -> RunStatus:
    """What several disks say of a run.

    The newest step counts, and the owner of whom something was heard last. A disk that was away for a while may have an older
    owner, and an end that is no longer true: an end counts where it is that owner's.
    """
    found = list(statuses)
    latest = min(found, key=lambda status: math.inf if status.silent is None else status.silent, default=RunStatus())
    return RunStatus(
        there=any(status.there for status in found),
        settings=any(status.settings for status in found),
        step=max((status.step for status in found if status.step is not None), default=None),
        done=any(status.done and status.owner == latest.owner for status in found),
        owner=latest.owner,
        silent=latest.silent,
        resize=next((status.resize for status in found if status.resize is not None), None),
        error=next((status.error for status in found if status.error), ""),
    )


def main(run: str, word: str) -> int:
    """Do what `word` says and tell how the run is then. Returns the exit code."""
    if word == "watch":
        return _watch(run)
    error = ""
    try:
        if word == "anew":
            from ..runs.run_folder import begin_anew

            begin_anew(run)
        elif word == "go-on":
            marks.not_done(run)
    except (UserError, OSError) as failed:
        text = str(failed) if isinstance(failed, UserError) else f"{run}: {reason(failed)}"
        error = printable(text)[: LONGEST // 8]
    _say(dataclasses.replace(RunStatus.here(run, ownership.Pulse(run)), error=error))
    return 0


def _watch(run: str) -> int:
    """Say how the run is until standard input ends. A byte there says that a request for other ranks was taken in."""
    pulse = ownership.Pulse(run)
    try:
        while True:
            _say(RunStatus.here(run, pulse, steps=False))
            ready, _, _ = select.select([0], [], [], EVERY)
            if ready:
                if not os.read(0, 1):
                    return 0
                marks.take_resize_request(run)
    except BrokenPipeError:
        return 0


def _say(status: RunStatus) -> None:
    os.write(1, status.line())


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
