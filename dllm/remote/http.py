"""HTTP to a store, by the standard library: every answer has a largest size, and one time limit for all of it.

A socket's own limit is for each piece that arrives, so a server that drips would never end. No redirect is followed, and no
proxy of the environment is used.
"""

from __future__ import annotations

import contextlib
import http.client
import io
import ipaddress
import queue
import socket
import ssl
import time
import urllib.parse
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import UserError, printable, reason

IDLE = 16  # connections to a server that are kept for the next question


@dataclass(frozen=True)
class Answer:
    """What a server said."""

    status: int
    body: bytes
    headers: Mapping[str, str]


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach a host: localhost, 127.0.0.0/8, ::1, ::ffff:127.0.0.0/104 (RFC 4291, 2.5.5.2)."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return host.lower() == "localhost"
    inner = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return (inner or address).is_loopback


class Server:
    """A server, asked by any number of threads at once.

    Parameters
    ----------
    address : str
        Such as http://127.0.0.1:5001, or with a path that stands before all others.
    timeout : float
        Seconds that it has to take a piece of what is sent, and then for its whole answer.
    headers : dict, optional
        Of every question.

    Raises
    ------
    UserError
        Where the address is none.
    """

    def __init__(self, address: str, timeout: float, headers: Mapping[str, str] | None = None) -> None:
        try:
            parts = urllib.parse.urlsplit(address)
            self.host, self._port = parts.hostname or "", parts.port
        except ValueError:
            parts = urllib.parse.SplitResult("", "", "", "", "")
            self.host, self._port = "", None
        if parts.scheme not in ("http", "https") or not self.host or parts.query or parts.fragment or not address.isprintable():
            raise UserError(f"{printable(address)[:200]!r} is no address of a store, such as http://127.0.0.1:5001")
        if parts.username is not None or parts.password is not None:
            raise UserError(f"the address of the store at {self.host} holds a password, which others can read there")
        self.name = address.rstrip("/")
        self._prefix, self._secure = parts.path.rstrip("/"), parts.scheme == "https"
        self._timeout, self._headers = timeout, dict(headers or {})
        self._idle: queue.LifoQueue[_Wire] = queue.LifoQueue(IDLE)
        self._context: ssl.SSLContext | None = None

    def ask(
        self,
        method: str,
        path: str,
        body: bytes | Iterable[bytes] = b"",
        *,
        most: int,
        headers: Mapping[str, str] | None = None,
    ) -> Answer:
        """The answer to a question, of whatever status.

        path : with its query, quoted
        body : pieces need Content-Length among the headers
        most : bytes of the answer

        Raises
        ------
        UserError
            Where there is none within the time, or it is too large.
        """
        while True:
            wire = self._kept()
            kept = wire is not None
            try:
                wire = wire or self._connect()
                return self._ask(wire, method, path, body, most, headers or {})
            except (http.client.RemoteDisconnected, ConnectionResetError, BrokenPipeError) as error:
                if not (kept and isinstance(body, bytes)):  # what was kept may have been closed since
                    raise UserError(f"{self.name} hung up: {reason(error)}") from None
            except TimeoutError:
                raise UserError(f"{self.name} did not answer within {self._timeout:g} s") from None
            except (OSError, ValueError, http.client.HTTPException) as error:
                raise UserError(
                    f"{self.name} does not answer: {printable(reason(error))[:200] or type(error).__name__}"
                ) from None

    def close(self) -> None:
        """The connections that are not in use."""
        while wire := self._kept():
            wire.end()

    def _kept(self) -> _Wire | None:
        with contextlib.suppress(queue.Empty):
            return self._idle.get_nowait()
        return None

    def _connect(self) -> _Wire:
        limit = time.monotonic() + self._timeout
        raw = socket.create_connection((self.host, self._port or (443 if self._secure else 80)), self._timeout)
        try:
            raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if self._secure:
                self._context = self._context or ssl.create_default_context()
                raw.settimeout(max(limit - time.monotonic(), 0.001))
                raw = self._context.wrap_socket(raw, server_hostname=self.host)
        except BaseException:
            raw.close()
            raise
        return _Wire(raw, self._timeout)

    def _ask(
        self, wire: _Wire, method: str, path: str, body: bytes | Iterable[bytes], most: int, headers: Mapping[str, str]
    ) -> Answer:
        sent = done = False
        connection = http.client.HTTPConnection(self.host, self._port or (443 if self._secure else 80))
        connection.auto_open = 0
        connection.sock = wire  # type: ignore[assignment]
        try:
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # it may have answered before it hung up
                connection.request(method, self._prefix + path, body, {**self._headers, **headers})  # type: ignore[arg-type]
                sent = True
            response = connection.getresponse()
            data = response.read(most + 1)
            if len(data) > most:
                raise UserError(f"{self.name} answers with more than {most >> 10:,} kB")
            if response.length:
                raise UserError(f"{self.name} hung up in the middle of an answer")
            done = sent and not response.will_close
            return Answer(response.status, data, {name.lower(): value for name, value in response.getheaders()})
        finally:
            if done:
                with contextlib.suppress(queue.Full):
                    self._idle.put_nowait(wire)
                    wire = None  # type: ignore[assignment]
            if wire is not None:
                wire.end()


class _Wire:
    """A socket in the form that http.client asks of one, whose every call ends in time."""

    def __init__(self, raw: socket.socket, timeout: float) -> None:
        self._raw, self._timeout = raw, timeout
        self._limit = 0.0

    def sendall(self, data: Any) -> None:
        """Send a piece; the time for the answer begins anew."""
        self._limit = time.monotonic() + self._timeout
        self._raw.settimeout(self._timeout)
        self._raw.sendall(data)

    def makefile(self, *_: Any) -> io.BufferedReader:
        """What reads the answer."""
        return io.BufferedReader(_Incoming(self))

    def receive(self, buffer: Any) -> int:
        """Bytes that came into the buffer; 0 at the end. Raises TimeoutError."""
        left = self._limit - time.monotonic()
        if left <= 0:
            raise TimeoutError
        self._raw.settimeout(left)
        return self._raw.recv_into(buffer)

    def close(self) -> None:
        """Nothing: http.client closes what it has not read to the end."""

    def end(self) -> None:
        """Close it."""
        self._raw.close()


class _Incoming(io.RawIOBase):
    """The bytes of an answer."""

    def __init__(self, wire: _Wire) -> None:
        self._wire = wire

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        return self._wire.receive(buffer)
