"""The disks that a run lies on: this host's, and those of the other hosts of a job, which may share none."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import selectors
import signal
import subprocess
import time
from collections.abc import Iterable

from ..errors import UserError, reason
from ..runs import marks, ownership, run_folder
from . import mpirun
from .run_status import LONGEST, RunStatus, together

PROGRAM = "dllm.launching.run_status"
AGAIN = 5.0  # seconds after which a host is listened to anew
MOST_WATCHED = 64  # hosts that are listened to while a job runs, a process each; all are asked before and after it


class RunDisks:
    """How a run is on the disks of a job's hosts. Leaving its `with` ends what listens to them.

    Parameters
    ----------
    run : str
        The run's folder, the same on all hosts.
    hosts : dict
        name -> ranks that it takes; empty: this machine, or others that see its disk.
    """

    def __init__(self, run: str, hosts: dict[str, int]) -> None:
        self.run, self._pulse = run, ownership.Pulse(run)
        self.known: dict[str, RunStatus] = {}  # of other hosts, as they answered when they were asked last
        self.owners: set[str | None] = {None}  # all that any disk has named when it was asked
        self._listeners: dict[str, _Listener] = {}
        self.use(hosts)

    def __enter__(self) -> RunDisks:
        return self

    def __exit__(self, *error: object) -> None:
        self._listen_to([])

    def use(self, hosts: dict[str, int]) -> None:
        """Ask these hosts from now on."""
        self.others = [host for host in hosts if not mpirun.is_here(host)]
        self.here = not hosts or len(self.others) < len(hosts)  # else this host's disk may have any old copy, or none

    def status(self) -> RunStatus:
        """As all hosts that answer say it now: takes a second or two where there are others, `mpirun.ANSWER` at most."""
        self.known = self._ask("status", self.others)
        found = [*([RunStatus.here(self.run, self._pulse)] if self.here else []), *self.known.values()]
        self.owners |= {status.owner for status in found}
        return together(found)

    def look(self) -> RunStatus:
        """At once: this disk as it is, of others what was heard last; not the step of a checkpoint."""
        self._listen_to(self.others[:MOST_WATCHED])
        now, here = time.monotonic(), [RunStatus.here(self.run, self._pulse, steps=False)] if self.here else []
        return together([*here, *(heard.status.later(now - heard.at) for heard in self._listeners.values() if heard.status)])

    def take_resize_request(self) -> int | None:
        """The number of ranks that somebody wants, wherever it was said; once."""
        wanted = [marks.take_resize_request(self.run), *(heard.take_resize_request() for heard in self._listeners.values())]
        return next(filter(None, wanted), None)

    def begin_anew(self) -> None:
        """Remove the folder of a run that came to no checkpoint, from all disks. Raises UserError where it is anything else."""
        if self.here:
            run_folder.begin_anew(self.run)
        asked = [host for host in self.others if host not in self.known or self.known[host].there]
        self._change("anew", asked)

    def go_on(self) -> None:
        """Take the mark of the run's end away, from all disks. Raises UserError."""
        try:
            if self.here:
                marks.not_done(self.run)
        except OSError as error:
            raise UserError(f"cannot go on with {self.run}: {reason(error)}") from None
        self._change("go-on", [host for host in self.others if host not in self.known or self.known[host].done])

    def rename(self, run: str) -> None:
        """Have another folder from now on."""
        self._listen_to([])
        self.run, self.known, self.owners, self._pulse = run, {}, {None}, ownership.Pulse(run)

    def silent(self) -> list[str]:
        """Hosts that did not answer when they were asked last."""
        return [host for host in self.others if host not in self.known]

    def _change(self, word: str, hosts: list[str]) -> None:
        for host, status in self._ask(word, hosts).items():
            if status.error:
                raise UserError(f"{host}: {status.error}")

    def _ask(self, word: str, hosts: Iterable[str]) -> dict[str, RunStatus]:
        """host -> what it answers, of those that do in time."""
        asked = [_Listener(host, self.run, word) for host in hosts]
        end = time.monotonic() + mpirun.ANSWER
        try:
            with selectors.DefaultSelector() as ears:
                for listener in asked:
                    ears.register(listener.answer, selectors.EVENT_READ, listener)
                while ears.get_map() and (left := end - time.monotonic()) > 0:
                    for key, _ in ears.select(left):
                        if not key.data.hear() or key.data.status:
                            ears.unregister(key.fileobj)
        finally:
            for listener in asked:
                listener.end()
        return {listener.host: listener.status for listener in asked if listener.status}

    def _listen_to(self, hosts: list[str]) -> None:
        """Take in what these hosts have said; begin with those that are new or have ended."""
        for host in [host for host in self._listeners if host not in hosts]:
            self._listeners.pop(host).end()
        for host in hosts:
            heard = self._listeners.get(host)
            if heard is None:
                self._listeners[host] = _Listener(host, self.run, "watch")
            elif (not heard.hear() or heard.is_mute()) and time.monotonic() - heard.begun > AGAIN:
                heard.end()
                self._listeners[host] = _Listener(host, self.run, "watch", heard)


class _Listener:
    """The program on another host, and what was heard of it. before: the listener that it follows."""

    def __init__(self, host: str, run: str, word: str, before: _Listener | None = None) -> None:
        self.host, self.begun = host, time.monotonic()
        self.status: RunStatus | None = before.status if before else None
        self.at: float = before.at if before else -math.inf  # when it was heard
        self._rest = b""
        self.process = subprocess.Popen(
            mpirun.elsewhere(host, PROGRAM, run, word), bufsize=0, start_new_session=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        assert self.process.stdin
        assert self.process.stdout
        self._ask, self.answer = self.process.stdin, self.process.stdout
        os.set_blocking(self.answer.fileno(), False)

    def hear(self) -> bool:
        """Take in what it has said. Returns whether it may say more."""
        data: bytes | None = self.answer.read(1 << 16)
        if not data:
            return data is None  # nothing yet; else the end
        *lines, rest = (self._rest + data).split(b"\n")
        self._rest = rest[-LONGEST:]
        for status in filter(None, map(RunStatus.read, lines)):
            self.status, self.at = status, time.monotonic()
        return True

    def is_mute(self) -> bool:
        """Whether it should have said something long ago: its link may be cut."""
        return time.monotonic() - max(self.begun, self.at) > mpirun.ANSWER

    def take_resize_request(self) -> int | None:
        """What it has said of one, once; and let it take it away."""
        if self.status is None or self.status.resize is None:
            return None
        wanted, self.status = self.status.resize, dataclasses.replace(self.status, resize=None)
        with contextlib.suppress(OSError):
            self._ask.write(b"\n")
        return wanted

    def end(self) -> None:
        """Leave nothing of it here. What runs on the other host ends with its standard input."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self._ask.close()
        self.answer.close()
