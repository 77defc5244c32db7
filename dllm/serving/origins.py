"""By which names a server may be called, and the pages of which sites may ask it.

A page anywhere can have a browser send requests to a server at loopback: by a name of its own that leads there (DNS rebinding),
or by the server's (cross-site requests). The headers Host and Origin tell of both, and no page can choose them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TypeAlias

from ..engines.errors import Refused
from ..errors import UserError
from ..remote.http import is_loopback

Headers: TypeAlias = list[tuple[bytes, bytes]]

ANY = "*"
NAME = r"(?:\[[0-9a-f:.]+\]|[a-z0-9_](?:[a-z0-9_.-]{0,252}[a-z0-9_])?)"
HOST = re.compile(rf"({NAME})(?::\d{{1,5}})?")
ORIGIN = re.compile(rf"([a-z][a-z0-9+.-]*)://{NAME}(?::\d{{1,5}})?")
DEFAULT_PORTS = {"http": ":80", "https": ":443"}
METHODS = b"GET, HEAD, POST"
EXPOSED = b"x-request-id, x-dllm-rank, retry-after"  # beside what every page may read
HEADER_NAMES = re.compile(rb"[A-Za-z0-9_-]+(?:[ \t]*,[ \t]*[A-Za-z0-9_-]+)*")
MOST_NAMES = 2000  # bytes of the names of headers that a page wants to send
SECONDS = b"7200"  # that a browser may keep the answer to a preflight; the most that Chromium takes


class Origins:
    """Which values of Host and Origin are right, and what a browser is told of it (CORS, https://fetch.spec.whatwg.org).

    Parameters
    ----------
    anyone : bool
        Whether any name is right where `names` is empty; else those of loopback are, and `names`.
    names : sequence of str
        By which clients may call the server, such as llm.example.com or llm.example.com:8443. Their pages may ask, too.
    pages : sequence of str
        Origins whose pages may ask, such as https://app.example.com; "*": all.

    Raises
    ------
    UserError
        Where one of them is no name or no origin.
    """

    def __init__(self, anyone: bool = True, names: Sequence[str] = (), pages: Sequence[str] = ()) -> None:
        self._authorities = {_checked_host(name) for name in names}
        self._names = {_name_of(one) for one in self._authorities}
        self._pages = {_checked_origin(page) for page in pages}
        self._every_name, self._every_page = anyone and not names, ANY in self._pages

    def check(self, headers: Mapping[bytes, bytes]) -> Headers:
        """The headers of CORS of an answer to this request, also of one that refuses it. Raises Refused."""
        host, origin = (headers.get(name, b"").decode("latin-1").lower() for name in (b"host", b"origin"))
        name = _name_of(host)
        if not (self._every_name or is_loopback(name) or name in self._names):
            raise Refused(f"this server is not called {name[:100]!r}: --allow-host allows it", status=403, code="wrong_host")
        may_differ = [] if self._every_page or not self._pages else [(b"vary", b"Origin")]
        if not origin:
            return may_differ
        if self._every_page or origin in self._pages:
            allowed = b"*" if self._every_page else origin.encode("latin-1")
            return [(b"access-control-allow-origin", allowed), (b"access-control-expose-headers", EXPOSED), *may_differ]
        authority = origin.partition("://")[2]
        if not authority or (authority != host and authority not in self._authorities):
            raise Refused("pages of other sites may not ask: --allow-origin allows one", status=403, code="wrong_origin")
        return may_differ

    @staticmethod
    def preflight(method: str, headers: Mapping[bytes, bytes]) -> Headers | None:
        """What else an answer says to a browser that asks whether a page may ask; None: the request is no such question."""
        if method != "OPTIONS" or b"origin" not in headers or b"access-control-request-method" not in headers:
            return None
        wanted = headers.get(b"access-control-request-headers", b"").strip()
        well = len(wanted) <= MOST_NAMES and HEADER_NAMES.fullmatch(wanted)
        return [
            (b"access-control-allow-methods", METHODS),
            *([(b"access-control-allow-headers", wanted)] if well else []),  # * would leave out Authorization
            (b"access-control-max-age", SECONDS),
            (b"vary", b"Access-Control-Request-Headers"),
        ]


def _name_of(host: str) -> str:
    """The name or address in NAME or NAME:PORT, without the brackets of IPv6."""
    name = host.rpartition(":")[0] if not host.endswith("]") and ":" in host else host
    return name.strip("[]")


def _checked_host(text: str) -> str:
    """A name in the form that headers have. Raises UserError."""
    host = text.lower()
    if not HOST.fullmatch(host):
        raise UserError(f"--allow-host {text[:200]!r} is no name of a server: write it as llm.example.com")
    return host


def _checked_origin(text: str) -> str:
    """An origin in the form that browsers send (RFC 6454, 6.2). Raises UserError."""
    origin = text.lower().removesuffix("/")
    found = ORIGIN.fullmatch(origin)
    if text != ANY and not found:
        raise UserError(f"--allow-origin {text[:200]!r} is no origin of pages: write it as https://app.example.com, or as *")
    return origin.removesuffix(DEFAULT_PORTS.get(found[1], " ")) if found else ANY
