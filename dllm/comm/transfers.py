"""Files on their way between the disks of ranks: in pieces, by nonblocking messages, so that steps go on meanwhile.

Of each file the source tells its size and the target whether it takes it; then come the pieces. What comes in is written under
a temporary name, and becomes a file when its sha256 is the one that was promised. The disk is touched by a thread of this
process, MPI by the thread that calls `progress`, so nobody waits for a disk.

A rank sends one file after the other, in the order of the moves, and takes in from all others at the same time: nobody waits
for one that waits for him.
"""

from __future__ import annotations

import collections
import concurrent.futures
import hashlib
import itertools
import math
import os
import pathlib
import time
from collections.abc import Callable, Generator, Iterable, Sequence
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple, TypeVar

import numpy as np

from ..errors import UserError, printable, reason
from ..files import storage
from ..kernels.types import Array
from .messages import allgather
from .replicas import Domains, File, Move, plan
from .runtime import NAP, together

if TYPE_CHECKING:
    from mpi4py import MPI

PIECE = 1 << 18  # bytes of a message
FLYING = 32  # pieces at most that are read ahead, under way or not yet written, from one rank to another
SIZE, ANSWER, DATA, TAGS = 111, 112, 113, 3  # tags of the first channel; how many a channel has
CHECKPOINTS, UPKEEP, NOW = 0, 1, 2  # channels: transfers that are under way at the same time do not meet
SHARE = 0.05  # of the time of a step: what transfers may take of it
RATE = 1e8  # bytes a second, what a slow network of a cluster carries: so many that pieces cost is counted by it
TELL = 5.0  # seconds between lines on a transfer that takes long
GONE = "it is not there"
T = TypeVar("T")
Stream = Generator[None, None, T]  # yields whenever it cannot go on for now


_retired: list[Transfer] = []  # in which a rank has died: MPI may still write to their memory


class Failure(NamedTuple):
    """A file that did not come."""

    move: Move
    reason: str
    at_target: bool  # the target's disk is at fault, not what the source has sent


class Transfer:
    """What one rank does for some moves. Every rank makes one with the same moves, and calls `progress` until it is done.

    Parameters
    ----------
    comm : MPI.Comm
    folder : path
        Where the files lie, on each rank's own disk.
    moves : sequence of Move
        The same on every rank.
    channel : int
        CHECKPOINTS, UPKEEP or NOW.

    Attributes
    ----------
    failed : list of Failure
        Of those that should have come here.
    moved : int
        Bytes that have come here or gone from here.
    """

    def __init__(self, comm: MPI.Comm, folder: storage.Path, moves: Sequence[Move], channel: int) -> None:
        self.comm, self.folder = comm, pathlib.Path(folder)
        self._size, self._answer, self._data = (tag + channel * TAGS for tag in (SIZE, ANSWER, DATA))
        self._short = False
        self.failed: list[Failure] = []
        self.moved = 0
        self._credit = 0.0
        self._requests: dict[int, tuple[MPI.Request, Array]] = {}  # under way, with the memory that MPI uses
        outgoing = [move for move in moves if move.source == comm.rank]
        incoming = collections.defaultdict[int, list[Move]](list)
        for move in moves:
            if move.target == comm.rank:
                incoming[move.source].append(move)
        pairs = {(move.target, move.source) for move in moves}
        crowd = max(collections.Counter(target for target, _ in pairs).values(), default=1)
        self._share = SHARE * RATE / crowd  # bytes that may leave in a second of steps: a target hears of all at once
        self._disk = concurrent.futures.ThreadPoolExecutor(1, "dllm-transfer")
        self._streams: list[Stream[None]] = [self._receive(some) for some in incoming.values()]
        self._streams += [self._send(outgoing)] if outgoing else []

    @property
    def done(self) -> bool:
        """Whether all that concerns this rank has come, gone or failed."""
        return not self._streams

    def progress(self, seconds: float = math.inf) -> None:
        """Go on as far as is possible now. seconds : that the last step took; what leaves takes SHARE of it at most."""
        allowance = seconds * self._share
        self._credit = min(self._credit + allowance, max(allowance, PIECE))
        for stream in list(self._streams):
            try:
                next(stream)
            except StopIteration:
                self._streams.remove(stream)
        if self.done:
            self._disk.shutdown()

    def run(self, tell: Callable[[int], object] = lambda moved: None) -> None:
        """`progress` until it is done. tell : told every few seconds how many bytes have moved."""
        told = time.monotonic()
        while not self.done:
            before = self.moved
            self.progress()
            if time.monotonic() - told > TELL:
                tell(self.moved)
                told = time.monotonic()
            if self.moved == before:
                time.sleep(NAP)

    def cut_short(self) -> None:
        """Finish the file that is being sent, and no other; all ranks do so."""
        self._short = True
        self.run()

    def under_way(self) -> list[MPI.Request]:
        """Requests that end in an error when a rank dies; nothing else is called afterwards."""
        _retired.append(self)
        self._disk.shutdown(wait=False, cancel_futures=True)
        return [request for request, _ in self._requests.values()]

    def _send(self, moves: Iterable[Move]) -> Stream[None]:
        for move in moves:
            reader = yield from self._on_disk(_Reader, None if self._short else self.folder / move.file.name)
            taken = np.zeros(1, np.int64)
            yield from self._until(self.comm.Isend(size := np.array([reader.size]), move.target, self._size), size)
            yield from self._until(self.comm.Irecv(taken, move.target, self._answer), taken)
            sizes = [min(PIECE, reader.size - start) for start in range(0, reader.size if taken[0] else 0, PIECE)]
            ahead = collections.deque(self._disk.submit(reader.read, size) for size in sizes[:FLYING])
            flying = collections.deque[Stream[None]]()
            for number in range(len(sizes)):
                piece = yield from _result(ahead.popleft())
                ahead.extend(self._disk.submit(reader.read, size) for size in sizes[number + FLYING : number + FLYING + 1])
                while self._credit < len(piece):
                    yield
                self._credit -= len(piece)
                flying.append(self._until(self.comm.Isend(piece, move.target, self._data), piece))
                self.moved += len(piece)
                if len(flying) == FLYING:
                    yield from flying.popleft()
            for one in flying:
                yield from one
            yield from self._on_disk(reader.close)

    def _receive(self, moves: Iterable[Move]) -> Stream[None]:
        for move in moves:
            size = np.zeros(1, np.int64)
            yield from self._until(self.comm.Irecv(size, move.source, self._size), size)
            writer = None
            if 0 <= size[0] <= move.file.most:
                try:
                    writer = yield from self._on_disk(_Writer, self.folder, move.file.name)
                except OSError as error:
                    self.failed.append(Failure(move, reason(error), True))
            else:
                text = GONE if size[0] < 0 else f"it has {size[0]:,} bytes, more than it should"
                self.failed.append(Failure(move, text, False))
            answer = np.array([writer is not None], np.int64)
            yield from self._until(self.comm.Isend(answer, move.source, self._answer), answer)
            if writer is not None:
                yield from self._take_in(move, writer, int(size[0]))

    def _take_in(self, move: Move, writer: _Writer, size: int) -> Stream[None]:
        flying, writing = collections.deque[tuple[Stream[None], Array]](), collections.deque[concurrent.futures.Future[None]]()
        asked = came = 0
        while came < size:
            while asked < size and len(flying) < FLYING:
                piece = np.empty(min(PIECE, size - asked), np.uint8)
                flying.append((self._until(self.comm.Irecv(piece, move.source, self._data), piece), piece))
                asked += len(piece)
            arrival, piece = flying.popleft()
            yield from arrival
            writing.append(self._disk.submit(writer.write, piece))  # which keeps its failure: the rest still has to come
            if len(writing) == FLYING:
                yield from _result(writing.popleft())
            came += len(piece)
            self.moved += len(piece)
        try:
            sound = yield from self._on_disk(writer.close, move.file.sha256)
        except OSError as error:
            self.failed.append(Failure(move, reason(error), True))
        else:
            if not sound:
                self.failed.append(Failure(move, "it is damaged there", False))

    def _until(self, request: MPI.Request, buffer: Array) -> Stream[None]:
        """The end of a request. It counts as under way from now on, though it is first looked at when this is driven."""
        number = id(request)
        self._requests[number] = request, buffer

        def look() -> Stream[None]:
            while not request.Test():
                yield
            del self._requests[number]

        return look()

    def _on_disk(self, work: Callable[..., T], *arguments: Any) -> Stream[T]:
        """What work(*arguments) returns or raises, in the thread that touches the disk."""
        return (yield from _result(self._disk.submit(work, *arguments)))


def _result(future: concurrent.futures.Future[T]) -> Stream[T]:
    """What comes of work of the thread that touches the disk."""
    while not future.done():
        yield
    return future.result()


class _Reader:
    """A file that is sent: its size, -1 where it cannot be read, and its bytes."""

    def __init__(self, path: pathlib.Path | None) -> None:
        self.size = -1
        self._file: BinaryIO | None = None
        if path is None:
            return
        try:
            storage.check_regular(path)
            file = open(path, "rb")  # noqa: SIM115, closed by close()
            self._file, self.size = file, os.fstat(file.fileno()).st_size
        except (OSError, UserError):
            pass  # the target is told

    def read(self, size: int) -> Array:
        """The next `size` bytes; zeros where they cannot be read: the target will notice."""
        piece: Array = np.zeros(size, np.uint8)
        try:
            if self._file is not None:
                self._file.readinto(piece.data)  # type: ignore[attr-defined, unused-ignore]
        except OSError:
            pass
        return piece

    def close(self) -> None:
        if self._file is not None:
            self._file.close()


class _Writer:
    """A file that comes in. Raises OSError where it cannot be made, and at its end where it could not be written."""

    def __init__(self, folder: pathlib.Path, name: str) -> None:
        path = folder / name
        if path.parent != folder and path.parent.is_symlink():
            raise OSError(f"{path.parent} is a link to another folder")
        path.parent.mkdir(parents=True, exist_ok=True)
        self._whole = storage.atomic(path)
        self._file = open(self._whole.__enter__(), "xb")  # noqa: SIM115, closed by close()
        self._digest = hashlib.sha256()
        self._problem: OSError | None = None

    def write(self, piece: Array) -> None:
        """Append a piece; a failure waits for close()."""
        try:
            if self._problem is None:
                self._digest.update(piece.data)
                self._file.write(piece.data)
        except OSError as error:
            self._problem = error

    def close(self, sha256: str) -> bool:
        """Make it a file where its hash is `sha256`. Returns whether it is."""
        try:
            self._file.close()
        except OSError as error:
            self._problem = self._problem or error
        sound = self._digest.hexdigest() == sha256
        problem = self._problem or (None if sound else OSError("damaged"))
        self._whole.__exit__(None if problem is None else OSError, problem, None)  # which removes the file where there is one
        if self._problem is not None:
            raise self._problem
        return sound


def failures(comm: MPI.Comm, moves: Sequence[Move], transfer: Transfer | None) -> list[tuple[Move, str]]:
    """Which of the moves failed at any rank, and why: the same on all ranks. Collective."""
    own = [(moves.index(failure.move), failure.reason) for failure in (transfer.failed if transfer else ())]
    told = itertools.chain(*allgather(comm, own, list[tuple[int, str]]))
    return [(moves[number], printable(why)[:100]) for number, why in told if 0 <= number < len(moves)]


def replicate(
    comm: MPI.Comm,
    domains: Domains,
    folder: storage.Path,
    files: Sequence[File],
    have: set[str],
    want: set[str],
    say: Callable[[str], None],
) -> list[File]:
    """Bring to every disk the files that it shall have, from those that have them. Collective, to the end.

    Parameters
    ----------
    comm : MPI.Comm
    domains : Domains
        Of `folder`.
    folder : path
        Where the files lie on each disk.
    files : sequence of File
        All that may be meant, the same on every rank.
    have, want : set of str
        Names of sound files on this rank's disk, and of those that shall be there; where several ranks see a disk it does not
        matter which of them says so.
    say : callable
        Told a line on what takes long and what was mended; all ranks tell the same.

    Returns the wanted files that nobody has, the same on all ranks. Raises UserError on all ranks where a disk fails.
    """
    known, spoilt = {file.name: file for file in files}, set[tuple[int, str]]()
    while True:
        wants = _of_leaders(domains, allgather(comm, sorted(want), list[str]))
        asked = set().union(*wants)
        has = _of_leaders(domains, allgather(comm, sorted(have & asked), list[str]))
        has = [{name for name in names if (rank, name) not in spoilt} for rank, names in enumerate(has)]
        moves, gone = plan([known[name] for name in sorted(asked & known.keys())], has, wants)
        if not moves:
            return gone
        transfer = Transfer(comm, folder, moves, NOW)
        mine = sum(move.file.most for move in moves if comm.rank in (move.source, move.target))
        try:
            transfer.run(lambda moved: say(f"copying: {moved / 1e6:,.0f} MB of at most {mine / 1e6:,.0f} MB"))
        except Exception:
            transfer.under_way()
            raise
        with together(comm):
            for failure in transfer.failed:
                if failure.at_target:
                    raise UserError(f"cannot write {pathlib.Path(folder, failure.move.file.name)}: {failure.reason}")
        lost = {failure.move.file.name for failure in transfer.failed}
        have = have | {move.file.name for move in moves if move.target == domains.of[comm.rank]} - lost
        spoilt -= {(move.target, move.file.name) for move in moves}
        for move, why in failures(comm, moves, transfer):
            spoilt |= {(rank, move.file.name) for rank in (move.source, move.target)}
            path, host = pathlib.Path(folder, move.file.name), printable(domains.hosts[move.source])
            say(f"{printable(str(path))} on {host}: {why}; another copy takes its place, if there is one")
            if domains.of[comm.rank] == move.source:  # it wants a sound one itself
                have, want = have - {move.file.name}, want | {move.file.name}


def _of_leaders(domains: Domains, told: list[list[str]]) -> list[set[str]]:
    """What the ranks of each domain have told together, as if its leader had; the others nothing."""
    found: list[set[str]] = [set() for _ in told]
    for rank, names in enumerate(told):
        found[domains.of[rank]].update(names)
    return found
