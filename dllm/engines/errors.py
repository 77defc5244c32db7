"""What can go wrong with a request, and what its client is told of it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

BUSY = "overloaded"  # the code of what may be tried again
KINDS = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}  # status -> OpenAI's type


class Disconnected(OSError):
    """Whoever asked is not there any more."""


class Refused(Exception):
    """A request that gets an error for an answer.

    Parameters
    ----------
    message : str
        For people.
    param : str, optional
        The field of the request that is wrong.
    status : int
        Of HTTP.
    code : str, optional
        For programs.
    headers : mapping of str, optional
        Of the answer.
    """

    def __init__(
        self, message: str, param: str | None = None, status: int = 400, code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:  # fmt: skip
        super().__init__(message)
        self.message, self.param, self.status, self.code = message, param, status, code
        self.headers = dict(headers or {})

    def body(self) -> dict[str, Any]:
        """The answer, in OpenAI's form."""
        kind = KINDS.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def data(self) -> bytes:
        """The body as JSON: in ASCII, since its message may hold what is no character."""
        return json.dumps(self.body()).encode()


def busy(message: str = "this server has as much to do as it may take on: try again") -> Refused:
    """The error of a server without room; clients try again by themselves."""
    return Refused(message, status=503, code=BUSY, headers={"Retry-After": "1"})
