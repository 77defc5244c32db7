"""The other ranks: which of them is free, and streams that they compute for this one.

A rank without a free slot hands a stream to one that has some, over a private port that only ranks of this job can use. Since
a stream depends on nothing but its request, one whose rank dies goes on here from where it broke off, the same to the bit.
"""

import asyncio
import contextlib
import hashlib
import hmac
import json
import secrets

import numpy as np

from .limits import LOOPBACK
from .openai import busy
from .requests import Finished, Full, Request, Token
from .streams import Inbox

LOST = 3.0  # seconds without a word after which a rank is taken for gone
PATIENCE = 5.0  # seconds for a connection to begin
LINE = 16 << 20  # bytes of a request, or of a line of events
CALLERS = 1024  # connections at once


def state_of(entry):
    """Of a rank's entry in the table of the gossip: "dead", "silent", "draining" or "ok"."""
    report, silence, dead = entry
    return "dead" if dead else "silent" if silence > LOST else "draining" if report["draining"] else "ok"


class Peers:
    """
    Parameters
    ----------
    gossip : comm.membership.Membership
    local : streams.Local
    secret : bytes
        That all ranks share.
    """

    def __init__(self, gossip, local, secret):
        self.gossip, self.local, self.secret, self.rank = gossip, local, secret, gossip.rank
        self.handed = {}  # rank -> (count of its report, streams that it got since)
        self.tasks, self.callers = set(), 0

    async def listen(self, address):
        """Take streams from other ranks at a port of this address. Returns the port."""
        server = await asyncio.start_server(self._serve, address, 0)
        return server.sockets[0].getsockname()[1]

    def lost(self, rank):
        """Whether a rank is dead or has been silent for long."""
        entry = self.gossip.table().get(rank)
        return entry is None or state_of(entry) in ("dead", "silent")

    def choose(self, streams):
        """The rank for a request of so many streams: this one, unless it has no room and another has."""
        load = self.local.engine.load()
        if load["active"] + load["queued"] + streams <= load["slots"]:
            return self.rank
        free, table = {}, self.gossip.table()
        here = table[self.rank][0]["host"] if self.rank in table else ""
        for rank, entry in table.items():
            report = entry[0]
            near = report["address"][0] not in LOOPBACK or report["host"] == here  # loopback ends at a host
            if rank != self.rank and near and state_of(entry) == "ok":
                count, sent = self.handed.get(rank, (0, 0))
                sent = sent if count == self.gossip.known[rank][0] else 0
                free[rank] = report["slots"] - report["active"] - report["queued"] - sent
        best = max(free, key=free.get, default=self.rank)
        if best == self.rank or free[best] < streams:
            return self.rank
        count, sent = self.handed.get(best, (0, 0))
        now = self.gossip.known[best][0]
        self.handed[best] = now, streams + (sent if count == now else 0)
        return best

    def begin(self, requests, inbox):
        """Have streams computed, all by one rank. requests : index -> Request. Raises Refused where there is no room.

        Returns the rank, and index -> function that cancels.
        """
        rank = self.choose(len(requests)) if requests else self.rank
        try:
            return rank, {index: self._submit(rank, request, inbox, index) for index, request in requests.items()}
        except Full:
            inbox.cancel()
            raise busy() from None

    def _submit(self, rank, request, inbox, index):
        """Have a stream computed by `rank`. Raises Full. Returns a function that cancels."""
        if rank == self.rank:
            return self.local.submit(request, inbox, index)
        loop = asyncio.get_running_loop()
        inbox.asked.append(loop.create_future())
        task = loop.create_task(self._follow(rank, request, inbox, index, inbox.asked[-1]))
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)
        inbox.cancels.append(task.cancel)
        return task.cancel

    async def _follow(self, rank, request, inbox, index, taken):
        """Put what another rank computes into the inbox, or, where it has no room or is lost, what is computed here."""
        seen = 0
        with contextlib.suppress(Exception):  # whatever it is, that rank is of no use
            async for events in self._ask(rank, request):
                if not taken.done():
                    taken.set_result(True)
                    continue
                *before, last = events
                if isinstance(last, Finished) and last.reason == "error":  # which may be that rank's alone
                    inbox.put(index, before)
                    seen += len(before)
                    break
                inbox.put(index, events)
                seen += len(events)
                if isinstance(last, Finished):
                    return
        room = True
        try:
            self.local.submit(request, _Rest(inbox, seen), index)
        except Full:
            room = False
            inbox.put(index, [Finished("full")])
        if not taken.done():
            taken.set_result(room)

    async def _ask(self, rank, request):
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
                    async with asyncio.timeout(LOST / 2):
                        line = await reader.readuntil(b"\n")
                except TimeoutError:
                    if self.lost(rank):
                        raise
                    continue
                yield [Finished(*entry) if isinstance(entry[0], str) else Token(*entry) for entry in json.loads(line)]
        finally:
            writer.close()

    def _seal(self, nonce, data):
        return hmac.new(self.secret, nonce + data, hashlib.sha256).hexdigest().encode()

    def _is_sealed(self, nonce, data, seal=b""):
        return hmac.compare_digest(seal, self._seal(nonce, data))

    async def _serve(self, reader, writer):
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

    async def _answer(self, reader, writer, inbox):
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


class _Rest:
    """An inbox without the first events of a stream, which it has already."""

    def __init__(self, inbox, seen):
        self.inbox, self.seen, self.cancels = inbox, seen, inbox.cancels

    def put(self, index, events):
        skipped = min(self.seen, len(events))
        self.seen -= skipped
        if events[skipped:]:
            self.inbox.put(index, events[skipped:])
