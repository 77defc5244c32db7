"""The door of a rank: where a process asks for the place of a dead rank, and where those that MPI does not know gossip.

A new rank was not there when MPI started, so it exchanges with the others, by their doors, what MPI carries between these: each
BEAT it tells a few ranks what it knows of all, and is told what they know. All of it is sealed (sealed.py, DoorKeys).

    Look                    -> Seen: which places are free
    Claim                   -> Granted, and in a message of its own what is known of all ranks; or Elsewhere; or Refused
    TELL, then what is known -> what is known

Places are given by one rank, the living one with the lowest number, so that two who ask at once get two places. Where ranks do
not see the same, two might give the same place: then the lives that they give differ, but for one case in STEP, and the process
of the earlier life leaves when it hears of the later one. A place that was given is free again where nobody has come to it in
RESERVED seconds. MPI tells of deaths of those that it knows; of the others a closed door does, or a silence of GONE seconds.
"""

from __future__ import annotations

import asyncio
import functools
import hmac
import pathlib
import random
import secrets
import socket
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated

import msgspec

from ..comm import messages, runtime
from ..comm.membership import LIFE, LIVES, Membership, Report
from ..errors import UserError
from ..launching import join_file
from ..launching.join_file import SECRET, About, Hex, Name, Rank, RankAt
from . import sealed
from .sealed import Channel, DoorKeys, Gate, Keys

if TYPE_CHECKING:
    from mpi4py import MPI

BEAT = 0.2  # seconds
FANOUT = 2  # ranks that a rank of a later life talks to each BEAT
SILENT = 3.0  # seconds without news of a rank after which its door is tried
GONE = 30.0  # seconds of silence of a rank whose door cannot be reached, after which it is taken for dead
PATIENCE = 3.0  # seconds for an exchange
IDLE = 60.0  # seconds that a connection may say nothing
RESERVED = 20.0  # seconds in which a place that was given is given to nobody else
STEP = 256  # lives that a new one may be ahead of the old one
CALLERS = 1024  # connections at once
STRANGERS = 64  # connections at once of those who have not proved to know the secret
ASKED = 4096  # bytes of a question
TELL = b"T"

Life = Annotated[int, msgspec.Meta(ge=1, lt=LIVES)]
Public = Annotated[str, msgspec.Meta(pattern=r"\A[0-9a-f]*\Z", min_length=64, max_length=64)]
At = tuple[Name, Annotated[int, msgspec.Meta(ge=0, le=65535)]]


class Look(msgspec.Struct, frozen=True, tag="look"):
    """Which places are free?"""


class Claim(msgspec.Struct, frozen=True, tag="claim"):
    """A process would be a rank."""

    digest: Hex  # of the facts in which ranks must be the same
    public: Public  # its key
    host: Name


class Seen(msgspec.Struct, frozen=True, tag="seen"):
    """The places that are free."""

    places: list[Rank]


class Granted(msgspec.Struct, frozen=True, tag="granted"):
    """It is a rank now."""

    rank: Rank
    life: Life
    publics: dict[Rank, Public]  # of the other ranks


class Elsewhere(msgspec.Struct, frozen=True, tag="elsewhere"):
    """Another rank gives places."""

    rank: Rank
    door: At


class Refused(msgspec.Struct, frozen=True, tag="refused"):
    """It is no rank."""

    full: bool  # no place is free now; else: the server has other settings, or ends


Question = Look | Claim
Answer = Seen | Granted | Elsewhere | Refused


def agree_on_secret(comm: MPI.Comm, keys: Keys) -> None:
    """Give all keys one secret that rank 0 draws; on its way it is sealed for each rank. Collective. Raises UserError."""
    if comm.rank == 0:
        keys.secret = secrets.token_bytes(SECRET)
    everyones = [keys.sealed_secret(rank) if rank else "" for rank in range(comm.size)] if comm.rank == 0 else []
    sealed_ones = messages.broadcast(comm, everyones, list[str])
    with runtime.together(comm):
        try:
            if comm.rank:
                keys.open_secret(0, sealed_ones[comm.rank])
        except (ValueError, LookupError):
            raise UserError(
                "rank 0 has not sent the secret of the job: start all ranks with the same version of dllm"
            ) from None


class Door:
    """The door of one rank, and its news of ranks that MPI does not know.

    Parameters
    ----------
    gossip : Membership
    keys : Keys
        With the job's secret.
    about : About
        What the server is.
    path : path
        Of the join file of this host.
    ending : callable
        Returns whether this rank is about to leave.
    log : callable
        Takes the name of an event, and its values.
    """

    def __init__(
        self,
        gossip: Membership,
        keys: Keys,
        about: About,
        path: pathlib.Path,
        ending: Callable[[], bool],
        log: Callable[..., None],
    ) -> None:
        self.gossip, self.keys, self.about, self.path, self.ending, self.log = gossip, keys, about, path, ending, log
        self.callers = 0
        self._gate = Gate(DoorKeys(gossip.rank, keys.secret), STRANGERS, PATIENCE)
        self._given: dict[int, tuple[int, float]] = {}  # rank -> (the life that was given, until when it is reserved)
        self._channels: dict[int, tuple[int, Channel]] = {}  # rank -> (its life, a connection)
        self._meeting: dict[int, asyncio.Task[None]] = {}
        self._written: dict[int, RankAt] | None = None
        self._server: asyncio.Server | None = None
        gossip.reborn = self._renew

    async def listen(self, address: str) -> int:
        """Open the door at this address. Returns the port."""
        self._server = await asyncio.start_server(self._serve, address, 0)
        if hasattr(socket, "TCP_USER_TIMEOUT"):  # connections have what their listener has
            self._server.sockets[0].setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 30_000)  # ms
        port: int = self._server.sockets[0].getsockname()[1]
        return port

    async def run(self) -> None:
        """Keep up with ranks that MPI does not know, and the join file with all of them, until cancelled."""
        while True:
            self.beat()
            if not self.ending() and self._writes():
                await self._write()
            await asyncio.sleep(BEAT)

    def beat(self) -> None:
        """Talk to some ranks: of a later life to any, of the first one to those of later lives that have fallen silent."""
        table = self.gossip.table()
        far = [
            rank for rank, (report, _, dead) in table.items()
            if rank != self.gossip.rank and not dead and "door" in report and (self.gossip.life or self.gossip.life_of(rank))
        ]  # fmt: skip
        silent = {rank for rank in far if table[rank][1] > SILENT}
        speaking = [rank for rank in far if rank not in silent] if self.gossip.life else []
        for rank in (*silent, *random.sample(speaking, min(FANOUT, len(speaking)))):
            if rank not in self._meeting:
                task = self._meeting[rank] = asyncio.create_task(self.meet(rank))
                task.add_done_callback(functools.partial(self._met, rank))

    def _met(self, rank: int, task: asyncio.Task[None]) -> None:
        del self._meeting[rank]
        if not task.cancelled():
            task.result()

    async def end(self) -> None:
        """Say once more how this rank is, shut the door, and remove the join file where no rank of this host needs it."""
        if self.gossip.life:
            await asyncio.sleep(2 * BEAT)  # until the gossip has it
            living = [rank for rank in self.gossip.known if rank != self.gossip.rank and not self.is_free(rank)]
            await asyncio.gather(*(self.meet(rank) for rank in random.sample(living, min(FANOUT, len(living)))))
        table = self.gossip.table()
        own = table.get(self.gossip.rank, ({}, 0.0, False))[0].get("host")
        here = [rank for rank, (report, _, _) in table.items() if report["host"] == own]
        if all(rank == self.gossip.rank or self.is_free(rank) or table[rank][0]["draining"] for rank in here):
            await asyncio.to_thread(join_file.remove, self.path, self.about)
        for _, channel in self._channels.values():
            channel.writer.close()
        if self._server is not None:
            self._server.close()

    def _renew(self, rank: int, life: int, report: Report) -> None:
        self.keys.renew(rank, report.get("public", ""))

    # ---- who is there

    def is_free(self, rank: int) -> bool:
        """Whether a rank's place may be taken: it is dead, or has left as it was told."""
        if self.gossip.is_dead(rank):
            return True
        if rank not in self.gossip.known or rank == self.gossip.rank:
            return False
        report, silence, _ = self.gossip.table()[rank]
        return bool(report["drained"]) and silence > SILENT

    def places(self) -> list[int]:
        """Ranks whose places are free, and not given to a process that is still to come, the lowest first."""
        free = [rank for rank in range(self.gossip.size) if self.is_free(rank)]
        return [rank for rank in free if not self._is_reserved(rank)]

    def _is_reserved(self, rank: int) -> bool:
        life, end = self._given.get(rank, (0, 0.0))
        return self.gossip.life_of(rank) < life and time.monotonic() < end

    def giver(self) -> int:
        """The rank that gives places, as far as is seen from here."""
        table = self.gossip.table()
        well = [
            rank for rank, (report, silence, _) in table.items()
            if not (self.is_free(rank) or report["draining"] or silence > SILENT)
        ]  # fmt: skip
        return min(well, default=self.gossip.rank)

    def give(self, claim: Claim) -> Granted | Elsewhere | Refused:
        """What becomes of a claim."""
        giver = self.giver()
        if giver != self.gossip.rank:
            return Elsewhere(giver, self.gossip.known[giver][1]["door"])
        if self.ending() or not hmac.compare_digest(claim.digest, self.about.digest()):
            return Refused(False)
        table = self.gossip.table()
        near = [rank for rank in self.places() if rank in table and table[rank][0]["host"] == claim.host]
        for rank in (*near, *(rank for rank in self.places() if rank not in near)):
            before = max(self.gossip.life_of(rank), self.gossip.dead.get(rank, 0), self._given.get(rank, (0, 0.0))[0])
            life = before + 1 + secrets.randbelow(STEP)
            if life < LIVES:
                self._given[rank] = life, time.monotonic() + RESERVED
                publics = {one: public for one, public in self.keys.publics.items() if one != rank}
                return Granted(rank, life, publics)
        return Refused(True)

    # ---- what is said

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """A connection from a rank, from one that would be one, or from somebody who has no business here."""
        try:
            channel = await self._gate.welcome(reader, writer)
            self.callers += 1
            try:
                while self.callers <= CALLERS:
                    async with asyncio.timeout(IDLE):
                        message = await channel.receive(max(ASKED, self.gossip.entry * self.gossip.size))
                    if not await self._answer(channel, message):
                        break
            finally:
                self.callers -= 1
        except (OSError, EOFError, ValueError):
            pass  # whoever asked sees the connection end
        finally:
            writer.close()

    async def _answer(self, channel: Channel, message: bytes) -> bool:
        """Whether more may come. Raises OSError, ValueError."""
        if message[:1] == TELL:
            understood = self.gossip.take(memoryview(message)[1:])
            if understood:
                await self._send(channel, self.gossip.told())
            return understood
        question: Question = msgspec.json.decode(message, type=Question)
        answer = Seen(self.places()) if isinstance(question, Look) else self.give(question)
        if isinstance(answer, Granted):
            self.log("place given", to=answer.rank, life=answer.life)
        await self._send(channel, msgspec.json.encode(answer))
        if isinstance(answer, Granted):
            await self._send(channel, self.gossip.told())
        return False

    async def _send(self, channel: Channel, message: bytes) -> None:
        async with asyncio.timeout(PATIENCE):
            await channel.send(message)

    async def meet(self, rank: int) -> None:
        """Tell a rank what is known here, and learn what it knows; or find that it is dead."""
        count, report = self.gossip.known[rank]
        life = count >> LIFE
        for _ in range(2):  # a connection may have ended since the last time
            kept_life, kept = self._channels.pop(rank, (life, None))
            if kept is not None and kept_life != life:
                kept.writer.close()
                kept = None
            try:
                async with asyncio.timeout(PATIENCE):
                    channel = await self._exchange(rank, report["door"], kept)
                self._channels[rank] = life, channel
                return
            except ConnectionRefusedError:
                self._bury(rank, life)
                return
            except (OSError, EOFError, ValueError, KeyError):
                if kept is None:
                    break
        if time.monotonic() - self.gossip.heard[rank] > GONE:
            self._bury(rank, life)

    async def _exchange(self, rank: int, door: At, kept: Channel | None) -> Channel:
        """Returns the connection, to be used again. Raises OSError, EOFError, ValueError."""
        told = TELL + self.gossip.told()
        writer = kept.writer if kept else None
        try:
            if kept:
                channel = kept
                await channel.send(told)
            else:
                reader, writer = await asyncio.open_connection(*door)
                channel = await sealed.call(self._gate.keys, rank, reader, writer, told)
            if not self.gossip.take(await channel.receive(self.gossip.entry * self.gossip.size)):
                raise ValueError("no news")
            writer = None
            return channel
        finally:
            if writer:
                writer.close()

    def _bury(self, rank: int, life: int) -> None:
        self.gossip.note_death(rank, life)
        self.log("death", of=rank, life=life)

    # ---- the join file

    def _writes(self) -> bool:
        """Whether this is the rank of its host that writes the file: the lowest of those that are there."""
        table = self.gossip.table()
        here = table[self.gossip.rank][0]["host"] if self.gossip.rank in table else None
        there = [
            rank for rank, (report, silence, _) in table.items()
            if report["host"] == here and not (self.is_free(rank) or report["draining"] or silence > SILENT)
        ]  # fmt: skip
        return min(there, default=None) == self.gossip.rank

    async def _write(self) -> None:
        """Write the file anew where a rank has come, gone or moved."""
        ranks = {
            rank: RankAt(report["host"], report["pid"], tuple(report["door"]), bool(report["drained"]))
            for rank, (report, _, _) in self.gossip.table().items() if "door" in report
        }  # fmt: skip
        if ranks != self._written:
            self._written = ranks
            try:
                await asyncio.to_thread(join_file.write, self.path, self.about, ranks)
            except UserError as error:
                self.log("no join file", error=str(error))
