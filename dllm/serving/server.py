"""One rank at work: its event loop, its engine, its gossip, from the first request to the last."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import resource
import signal
import socket
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import uvicorn

from ..comm import runtime
from ..comm.membership import Membership
from ..engines.engine import Engine
from ..engines.limits import Limits
from ..engines.streams import LocalStreams
from ..errors import UserError
from ..inference.loaded_model import LoadedModel
from ..launching import interfaces
from ..launching.join_file import host_name, path_of
from ..peers.counts import Ledger
from ..peers.gossip_view import GossipView
from ..peers.joiner import Seat
from ..peers.joining import Door
from ..peers.peers import Peers
from ..peers.reports import report_of, room
from ..remote.http import is_loopback
from .app import App
from .connection import Connection
from .log import Log
from .origins import Origins
from .service import Service
from .tokens import Clients

if TYPE_CHECKING:
    from mpi4py import MPI

FILES = 65536  # that a rank may have open, where the system allows it
KEEP_ALIVE = 20  # seconds between requests of a connection


class Server:
    """A rank of a server. Collective. Raises UserError where other hosts cannot reach this one.

    Parameters
    ----------
    comm : MPI.Comm
        Collective.
    served : sequence of (LoadedModel, Engine)
        The models, and the engine of each, started.
    options : argparse.Namespace
        Of the command.
    tokens : sequence of str
        Of which clients must have one; empty: they need none.
    listener : socket
        Bound, not yet listening: no request comes before somebody answers.
    seat : joiner.Seat
        What this process is among the ranks.
    """

    def __init__(
        self,
        comm: MPI.Comm,
        served: Sequence[tuple[LoadedModel, Engine[Any]]],
        options: argparse.Namespace,
        tokens: Sequence[str],
        listener: socket.socket,
        seat: Seat,
    ) -> None:
        self.comm, self.served, self.options, self.clients = comm, served, options, Clients(tokens)
        self.listener, self.log, self.state, self.stops = listener, Log(seat.place.rank), "ok", 0
        self.keys = seat.keys
        host = listener.getsockname()[0]
        self.origins = Origins(not is_loopback(host), options.allow_host, options.allow_origin)
        with runtime.together(comm):
            self.listen_at, self.address = peer_addresses(host, options.host, options.interface, seat.one_host)
        self.fixed: dict[str, Any] = {"host": host_name(), "pid": os.getpid()}
        self.gossip = Membership(comm, self.report, report_of(len(served)), room(len(served)), seat.place)
        self.door: Door | None = None
        if seat.about:
            path = path_of(*listener.getsockname()[:2])
            self.door = Door(self.gossip, self.keys, seat.about, path, lambda: self.state != "ok", self.log)
        self.gossip.take(seat.known)
        self.ledger = Ledger()
        if self.gossip.before:  # this rank goes on counting from there
            self.ledger.take(self.gossip.rank, self.gossip.before)
        self.limits = Limits(
            body=options.max_body, prompt=options.max_prompt, source=options.max_source, tokens=options.max_tokens,
            requests=options.max_requests, connections=options.max_connections, deadline=options.deadline,
        )  # fmt: skip
        self.app: App  # and this, of _run
        self.http: _Http

    def report(self) -> dict[str, Any]:
        """What other ranks shall know. In the thread of the gossip."""
        known = {**self.fixed, "made": time.time(), **self.app.report()}  # made before its numbers are read
        for one, told in zip(self.app.services, known["models"], strict=True):
            told["address"] = self.address, one.peers.port
        known |= {"draining": self.state != "ok", "drained": self.state == "drained"}
        return dict(self.ledger.take(self.gossip.rank, known))

    def run(self, stopping: Sequence[bool]) -> int:
        """Answer until told to stop, then until what is under way is done. Returns the exit code.

        stopping : not empty: told already.
        """
        _raise_file_limit()
        self.log.capture_libraries()
        self.log.start()
        asyncio.run(self._run(stopping))
        return 0 if self.alive else 1

    @property
    def alive(self) -> bool:
        """Whether all engines work."""
        return all(engine.load()["alive"] for _, engine in self.served)

    def _service(self, place: int, loop: asyncio.AbstractEventLoop) -> Service:
        """What answers for a model. place : in the order of the command"""
        model, engine = self.served[place]
        local, keys = LocalStreams(engine, loop), self.keys.about(model.fingerprint.encode())
        peers = Peers(GossipView(self.gossip, place), local, keys, self.limits)
        return Service(model, local, peers, self.limits, self.options.log_prompts)

    async def _run(self, stopping: Sequence[bool]) -> None:
        loop = asyncio.get_running_loop()
        services = [self._service(place, loop) for place in range(len(self.served))]
        for one in services:
            await one.peers.listen(self.listen_at)
        self.app = App(services, self.gossip, self.limits, self.log)
        app = self.app.asgi(self.clients, self.origins, self.options.root_path)
        if self.door:
            self.fixed |= {"door": (self.address, await self.door.listen(self.listen_at))}
            self.fixed |= {"public": self.keys.public} if self.gossip.life else {}
            meetings = loop.create_task(self.door.run())
        self.gossip.start()
        config = uvicorn.Config(
            app, http=type("Limited", (Connection,), {"limits": self.limits}), ws="none",
            loop="asyncio", lifespan="off", log_config=None, access_log=False, server_header=False, proxy_headers=False,
            backlog=1024, timeout_keep_alive=KEEP_ALIVE, timeout_graceful_shutdown=max(1, round(self.options.drain)),
        )  # fmt: skip
        self.http = _Http(config)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            loop.add_signal_handler(number, self.stop)
        if stopping:
            self.stop()
        self.log("serving", model=", ".join(self.app.names), port=self.listener.getsockname()[1], pid=os.getpid())
        watch = loop.create_task(self._watch())
        await self.http.serve(sockets=[self.listener])
        watch.cancel()
        end = time.monotonic() + self.options.drain
        while any(one.peers.callers for one in services) and self.stops < 2 and time.monotonic() < end:
            await asyncio.sleep(0.05)
        self.state = "drained"
        await self._wait_for_others()
        if self.door:
            meetings.cancel()
            await self.door.end()

    def stop(self) -> None:
        """The first time no new requests are taken, the second time nothing is finished any more."""
        self.stops += 1
        if self.stops == 1:
            self.state = self.app.state = "draining"
        self.http.should_exit = True
        self.http.force_exit = self.stops > 1
        self.log("draining")

    async def _watch(self) -> None:
        """A rank whose engine has failed can do nothing but leave: then its share of connections goes to the others.

        The same holds for one that was taken for dead, and has a later life.
        """
        while self.alive and not self.gossip.replaced:
            await asyncio.sleep(0.5)
            self.log.catch_up()
        self.log("replaced" if self.gossip.replaced else "failed")
        self.stop()

    async def _wait_for_others(self) -> None:
        """Where the end of one rank is the end of all, none leaves before all others have finished."""
        if self.gossip.survivable or not self.alive:
            return
        while self.stops < 2:
            table = self.gossip.table()
            if all(report["drained"] for report, _, dead in table.values() if not dead) and len(table) == self.comm.size:
                return
            await asyncio.sleep(0.05)

    def leave(self, code: int) -> None:
        """End this process with an exit code."""
        self.state = "drained"
        for _, engine in self.served:
            engine.stop(0)
        self.log.catch_up(ending=True)
        self.log("ended")
        self.log.end()
        self.gossip.end()
        runtime.exit_together(self.comm, code)


class _Http(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Signals are ours."""
        yield


def peer_addresses(bound: str, host: str, interface: str | None, one_host: bool) -> tuple[str, str]:
    """Where to listen for other ranks, and where they find this one. Raises UserError where that is nowhere.

    Parameters
    ----------
    bound : str
        Address that clients reach.
    host : str
        As the user said it.
    interface : str or None
        Between the hosts.
    one_host : bool
        Whether all ranks are here.
    """
    named = interfaces.address_of(interface) if interface else ""
    if one_host or (is_loopback(bound) and not named):
        return "127.0.0.1", "127.0.0.1"
    if named:
        return named, named
    return "0.0.0.0" if host == "::" else host, _address(host)  # ranks are called by addresses of IPv4


def _address(host: str) -> str:
    """That other hosts can reach this one at. Raises UserError."""
    if host not in ("0.0.0.0", "::"):
        return host
    with contextlib.suppress(OSError):
        found = socket.gethostbyname(socket.gethostname())
        if not found.startswith("127."):
            return found
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect(("192.0.2.1", 9))  # the address of the default route; nothing is sent
        address: str = probe.getsockname()[0]
        return address
    raise UserError(
        f"{socket.gethostname()} has no address that other hosts know: give its name one, or start on each host by itself "
        "with its own --host"
    )


def _raise_file_limit() -> None:
    """Idle connections are cheap, but each is a file."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = FILES if hard == resource.RLIM_INFINITY else min(FILES, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
