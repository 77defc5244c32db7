"""The other ranks: which of them is free, and streams that they compute for this one.

A rank without a free slot hands a stream to one that has some, over a private port that only ranks of this job can use
(sealed.py), and believes what can be true of it (engines/wire.py). Since a stream depends on nothing but its request, one whose
rank dies, or is not the one it should be, goes on here from where it broke off, the same to the bit.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import time
from collections.abc import AsyncGenerator, Mapping
from typing import TYPE_CHECKING

from ..engines.errors import busy
from ..engines.limits import Limits
from ..engines.requests import AnyRequest, Event, Finished, Full
from ..engines.streams import Cancel, Inbox, LocalStreams
from ..engines.wire import write_news, write_question
from ..remote.http import is_loopback
from . import sealed
from .reports import state_of
from .sealed import Channel, Gate, Keys

if TYPE_CHECKING:
    from .gossip_view import GossipView

BEAT = 1.0  # seconds after which a rank that has nothing to say of a stream says so
PATIENCE = 5.0  # seconds for a connection to begin, and for each message
SHUNNED = 10.0  # seconds in which nothing is asked of a rank that was of no use, unless it comes anew elsewhere
CALLERS = 1024  # connections of ranks at once
STRANGERS = 256  # connections at once of those who have not proved to be ranks
TOGETHER = 4096  # events of a message at most: fewer bytes than one may have
UNREAD = 30_000  # milliseconds that a rank may leave something unread


class Peers:
    """All ranks, as one of them sees them, for one model.

    Parameters
    ----------
    gossip : gossip_view.GossipView
    local : streams.LocalStreams
    keys : sealed.Keys
        That all ranks have agreed on, about this model.
    limits : limits.Limits
        Of requests, those of other ranks, too.

    Attributes
    ----------
    callers : int
        Streams that this rank computes for others.
    port : int
        Where it takes them; 0: not yet.
    """

    def __init__(self, gossip: GossipView, local: LocalStreams, keys: Keys, limits: Limits) -> None:
        self.gossip, self.local, self.keys, self.limits, self.rank = gossip, local, keys, limits, gossip.rank
        self.callers = self.port = 0
        self._gate = Gate(keys, STRANGERS, PATIENCE)
        self._shunned: dict[int, tuple[object, float]] = {}  # rank -> where it was, and until when, of the monotonic clock
        self._handed: dict[int, tuple[int, int]] = {}  # rank -> (count of its report, streams that it got since)
        self._tasks: set[asyncio.Task[None]] = set()

    async def listen(self, address: str) -> int:
        """Take streams from other ranks at a port of this address. Returns the port."""
        server = await asyncio.start_server(self._serve, address, 0)
        if hasattr(socket, "TCP_USER_TIMEOUT"):  # connections have what their listener has
            server.sockets[0].setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, UNREAD)
        self.port = server.sockets[0].getsockname()[1]
        return self.port

    def choose_rank(self, streams: int) -> int:
        """The rank for a request of so many streams: this one, unless it has no room and another has."""
        load = self.local.engine.load()
        if load["active"] + load["queued"] + streams <= load["slots"]:
            return self.rank
        free: dict[int, int] = {}
        table, known = self.gossip.table(), self.gossip.known
        here = table[self.rank][0]["host"] if self.rank in table else ""
        for rank, entry in table.items():
            report = entry[0]
            near = not is_loopback(report["address"][0]) or report["host"] == here  # loopback ends at a host
            where, until = self._shunned.get(rank, (None, 0.0))
            shunned = report["address"] == where and time.monotonic() < until
            if rank != self.rank and near and not shunned and state_of(entry) == "ok":
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

    def submit(self, requests: Mapping[int, AnyRequest], inbox: Inbox) -> tuple[int, dict[int, Cancel]]:
        """Have streams computed, all by one rank. requests : index -> Request. Raises Refused where there is no room.

        Returns the rank, and index -> what cancels the stream.
        """
        rank = self.choose_rank(len(requests)) if requests else self.rank
        try:
            return rank, {index: self._submit_to(rank, request, inbox, index) for index, request in requests.items()}
        except Full:
            inbox.cancel()
            raise busy() from None

    def _submit_to(self, rank: int, request: AnyRequest, inbox: Inbox, index: int) -> Cancel:
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

    async def _relay(self, rank: int, request: AnyRequest, inbox: Inbox, index: int, accepted: asyncio.Future[bool]) -> None:
        """Put what another rank computes into the inbox, or, where it has no room or is lost, what is computed here."""
        count, where = 0, self.gossip.known[rank][1]["address"]
        try:
            async with contextlib.aclosing(self._ask(rank, request)) as answer:
                async for events in answer:
                    if not accepted.done():
                        accepted.set_result(True)
                    for event in events:
                        if isinstance(event, Finished) and event.reason != "length":  # which may be that rank's alone
                            raise ConnectionError(event.message)
                        inbox.put(index, event)
                        count += 1
                        if isinstance(event, Finished):
                            return
        except Full:
            pass
        except Exception:  # whatever it is, that rank is of no use
            self._shunned[rank] = where, time.monotonic() + SHUNNED
        room = True
        try:
            self.local.submit(request, _Remainder(inbox, count), index)
        except Full:
            room = False
            inbox.put(index, Finished("full"))
        if not accepted.done():
            accepted.set_result(room)

    async def _ask(self, rank: int, request: AnyRequest) -> AsyncGenerator[list[Event], None]:
        """Lists of events of a stream of another rank, the first of them empty: it was taken.

        Raises Full, or OSError, EOFError or ValueError where the rank is lost or is not the one that it should be.
        """
        answer = self.local.engine.expected(request)
        async with asyncio.timeout(PATIENCE):
            reader, writer = await asyncio.open_connection(*self.gossip.known[rank][1]["address"])
        try:
            async with asyncio.timeout(PATIENCE):
                channel = await sealed.call(self.keys, rank, reader, writer, write_question(request))
            while True:
                async with asyncio.timeout(PATIENCE):  # some times BEAT
                    events = answer.read(await channel.receive())
                if events and events[-1] == Finished("full"):
                    raise Full
                yield events
        finally:
            writer.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """A connection from another rank, or from somebody who has no business here."""
        try:
            channel = await self._gate.welcome(reader, writer)
            inbox = Inbox()
            self.callers += 1
            try:
                if self.callers <= CALLERS:
                    await self._answer(channel, inbox)
            finally:
                self.callers -= 1
                inbox.cancel()
        except (OSError, EOFError, ValueError, TypeError):
            pass  # whoever asked sees the connection end
        finally:
            writer.close()

    async def _answer(self, channel: Channel, inbox: Inbox) -> None:
        async with asyncio.timeout(PATIENCE):
            question = self.local.engine.read_question(await channel.receive(), self.limits)
        try:
            self.local.submit(question, inbox, 0)
        except Full:
            await channel.send(write_news([Finished("full")]))
            return
        await channel.send(write_news([]))
        gone = asyncio.create_task(channel.reader.read(1))  # which ends when the other closes
        gone.add_done_callback(lambda _: inbox.close())
        try:
            events: list[Event] = []
            while not (events and isinstance(events[-1], Finished)):
                try:
                    async with asyncio.timeout(BEAT):
                        events = [event for _, event in await inbox.get()]
                except TimeoutError:
                    events = []  # all that is to be said is that this rank is there
                for start in range(0, max(1, len(events)), TOGETHER):
                    await channel.send(write_news(events[start : start + TOGETHER]))
        finally:
            gone.cancel()


class _Remainder:
    """A Sink without the first events of a stream, which the inbox has already."""

    def __init__(self, inbox: Inbox, count: int) -> None:
        self.inbox, self.left = inbox, count

    @property
    def cancels(self) -> list[Cancel]:
        return self.inbox.cancels

    def put(self, index: int, *events: Event) -> None:
        known = min(self.left, len(events))
        self.left -= known
        if known < len(events):
            self.inbox.put(index, *events[known:])
