"""The other ranks: which of them is free, and streams that they compute for this one.

A rank without a free slot hands a stream to one that has some, over a private port that only ranks of this job can use. Since
a stream depends on nothing but its request, one whose rank dies goes on here from where it broke off, the same to the bit.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import hmac
import json
import secrets
from collections.abc import AsyncIterator, Mapping
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from .errors import busy
from .limits import LOOPBACK
from .requests import Event, Finished, Full, Request, Token
from .streams import Cancel, Inbox, LocalStreams

if TYPE_CHECKING:
    from ..comm.membership import Membership

SILENT = 3.0  # seconds without a word after which a rank is taken for gone
PATIENCE = 5.0  # seconds for a connection to begin
LINE = 16 << 20  # bytes of a request, or of a line of events
CALLERS = 1024  # connections at once

Entry: TypeAlias = tuple[Mapping[str, Any], float, bool]  # a rank's report, seconds since it was heard of, whether it died


def state_of(entry: Entry) -> str:
    """Of a rank's entry in the table of the gossip: "dead", "silent", "draining" or "ok"."""
    report, silence, dead = entry
    return "dead" if dead else "silent" if silence > SILENT else "draining" if report["draining"] else "ok"


class Peers:
    """All ranks, as one of them sees them.

    Parameters
    ----------
    gossip : comm.membership.Membership
    local : streams.LocalStreams
    secret : bytes
        That all ranks share.

    Attributes
    ----------
    callers : int
        Streams that this rank computes for others.
    """

    def __init__(self, gossip: Membership, local: LocalStreams, secret: bytes) -> None:
        self.gossip, self.local, self.secret, self.rank = gossip, local, secret, gossip.rank
        self.callers = 0
        self._handed: dict[int, tuple[int, int]] = {}  # rank -> (count of its report, streams that it got since)
        self._tasks: set[asyncio.Task[None]] = set()

    async def listen(self, address: str) -> int:
        """Take streams from other ranks at a port of this address. Returns the port."""
        server = await asyncio.start_server(self._serve, address, 0)
        port: int = server.sockets[0].getsockname()[1]
        return port

    def is_lost(self, rank: int) -> bool:
        """Whether a rank is dead or has been silent for long."""
        entry = self.gossip.table().get(rank)
        return entry is None or state_of(entry) in ("dead", "silent")

    def choose_rank(self, streams: int) -> int:
        """The rank for a request of so many streams: this one, unless it has no room and another has."""
        load = self.local.engine.load()
        if load["active"] + load["queued"] + streams <= load["slots"]:
            return self.rank
        free: dict[int, int] = {}
        table, known = self.gossip.table(), dict(self.gossip.known)
        here = table[self.rank][0]["host"] if self.rank in table else ""
        for rank, entry in table.items():
            report = entry[0]
            near = report["address"][0] not in LOOPBACK or report["host"] == here  # loopback ends at a host
            if rank != self.rank and near and state_of(entry) == "ok":
                free[rank] = report["slots"] - report["active"] - report["queued"] - self._handed_since(rank, known[rank][0])
        best = max(free, key=lambda rank: free[rank], default=self.rank)
        if best == self.rank or free[best] < streams:
            return self.rank
        count = known[best][0]
        self._handed[best] = count, streams + self._handed_since(best, count)
        return best

    def _handed_since(self, rank: int, count: int) -> int:
        """Streams that a rank has got from here since its report with this count."""
        last, streams = self._handed.get(rank, (0, 0))
        return streams if last == count else 0

    def submit(self, requests: Mapping[int, Request], inbox: Inbox) -> tuple[int, dict[int, Cancel]]:
        """Have streams computed, all by one rank. requests : index -> Request. Raises Refused where there is no room.

        Returns the rank, and index -> what cancels the stream.
        """
        rank = self.choose_rank(len(requests)) if requests else self.rank
        try:
            return rank, {index: self._submit_to(rank, request, inbox, index) for index, request in requests.items()}
        except Full:
            inbox.cancel()
            raise busy() from None

    def _submit_to(self, rank: int, request: Request, inbox: Inbox, index: int) -> Cancel:
        """Have a stream computed by `rank`. Raises Full. Returns what cancels it."""
        if rank == self.rank:
            return self.local.submit(request, inbox, index)
        loop = asyncio.get_running_loop()
        accepted: asyncio.Future[bool] = loop.create_future()
        inbox.accepted.append(accepted)
        task = loop.create_task(self._relay(rank, request, inbox, index, accepted))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        inbox.cancels.append(task.cancel)
        return task.cancel

    async def _relay(self, rank: int, request: Request, inbox: Inbox, index: int, accepted: asyncio.Future[bool]) -> None:
        """Put what another rank computes into the inbox, or, where it has no room or is lost, what is computed here."""
        count = 0
        with contextlib.suppress(Exception):  # whatever it is, that rank is of no use
            async for events in self._ask(rank, request):
                if not accepted.done():
                    accepted.set_result(True)
                for event in events:
                    if isinstance(event, Finished) and event.reason == "error":  # which may be that rank's alone
                        raise ConnectionError(event.message)
                    inbox.put(index, event)
                    count += 1
                    if isinstance(event, Finished):
                        return
        room = True
        try:
            self.local.submit(request, _Remainder(inbox, count), index)
        except Full:
            room = False
            inbox.put(index, Finished("full"))
        if not accepted.done():
            accepted.set_result(room)

    async def _ask(self, rank: int, request: Request) -> AsyncIterator[list[Event]]:
        """Lists of events of a stream of another rank, the first of them empty: it was taken.

        Raises OSError, EOFError or ValueError where the rank is lost, or has no room.
        """
        address = self.gossip.known[rank][1]["address"]
        async with asyncio.timeout(PATIENCE):
            reader, writer = await asyncio.open_connection(*address, limit=LINE)
        try:
            async with asyncio.timeout(PATIENCE):
                question = json.dumps(vars(request) | {"prompt": request.prompt.tolist()}).encode()
                nonce, size = (await reader.readline()).strip(), b"%d" % len(question)
                writer.write(b" ".join((size, self._seal(nonce, size), self._seal(nonce, question))) + b"\n" + question)
                await writer.drain()
            while True:
                try:
                    async with asyncio.timeout(SILENT / 2):
                        line = await reader.readuntil(b"\n")
                except TimeoutError:
                    if self.is_lost(rank):
                        raise
                    continue
                yield [Finished(*entry) if isinstance(entry[0], str) else Token(*entry) for entry in json.loads(line)]
        finally:
            writer.close()

    def _seal(self, nonce: bytes, data: bytes) -> bytes:
        return hmac.new(self.secret, nonce + data, hashlib.sha256).hexdigest().encode()

    def _is_sealed(self, nonce: bytes, data: bytes, seal: bytes = b"") -> bool:
        return hmac.compare_digest(seal, self._seal(nonce, data))

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """A connection from another rank, or from somebody who has no business here."""
        inbox = Inbox()
        self.callers += 1
        try:
            if self.callers <= CALLERS:
                await self._answer(reader, writer, inbox)
        except (OSError, EOFError, ValueError, TypeError):
            pass  # whoever asked sees the connection end
        finally:
            self.callers -= 1
            inbox.cancel()
            writer.close()

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, inbox: Inbox) -> None:
        nonce = secrets.token_hex(16).encode()
        async with asyncio.timeout(PATIENCE):
            writer.write(nonce + b"\n")
            size, *seals = (await reader.readline()).split()
            if not self._is_sealed(nonce, size, *seals[:1]) or int(size) > LINE:  # nothing large is read from a stranger
                return
            question = await reader.readexactly(int(size))
        if not self._is_sealed(nonce, question, *seals[1:]):
            return
        fields = json.loads(question)
        try:
            self.local.submit(Request(**fields | {"prompt": np.array(fields["prompt"], np.int64)}), inbox, 0)
        except Full:
            return
        writer.write(b"[]\n")
        gone = asyncio.create_task(reader.read(1))  # which ends when the other closes
        gone.add_done_callback(lambda _: inbox.close())
        try:
            while True:
                events = [event for _, event in await inbox.get()]
                writer.write(json.dumps(events, default=np.ndarray.tolist).encode() + b"\n")
                await writer.drain()
                if isinstance(events[-1], Finished):
                    return
        finally:
            gone.cancel()


class _Remainder:
    """A Sink without the first events of a stream, which the inbox has already."""

    def __init__(self, inbox: Inbox, count: int) -> None:
        self.inbox, self.left = inbox, count

    @property
    def cancels(self) -> list[Cancel]:
        return self.inbox.cancels

    def put(self, index: int, event: Event) -> None:
        if self.left:
            self.left -= 1
        else:
            self.inbox.put(index, event)
