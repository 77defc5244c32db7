"""The file by which a process finds a server of this host and may take the place of a dead rank of it.

It has the secret of the job, so it is its user's alone: mode 600, in a folder of mode 700. One rank of each host writes it
anew whenever a rank comes, goes or moves, and the last one removes it. What is read of it is checked as a stranger's would be.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import os
import pathlib
import re
import socket
import stat
import tempfile
from collections.abc import Mapping
from typing import Annotated, Any

import msgspec

from .. import __version__
from ..errors import UserError, printable, reason
from ..files import storage

SECRET = 32  # bytes of the secret of a job
LARGEST = 8 << 20  # bytes
MOST_RANKS = 1 << 16
MOST_SHOWN = 100  # characters of a fact
PER_RANK = frozenset({"model", "join", "ranks", "hostfile", "token_file"})  # options that need not be the same on all ranks
PLAIN = r"\A[A-Za-z0-9_.:%-]*\Z"

Hex = Annotated[str, msgspec.Meta(pattern=r"\A[0-9a-f]*\Z", max_length=64)]
Text = Annotated[str, msgspec.Meta(max_length=4096)]
Name = Annotated[str, msgspec.Meta(max_length=128, pattern=PLAIN)]
Rank = Annotated[int, msgspec.Meta(ge=0, lt=MOST_RANKS)]


class RankAt(msgspec.Struct, frozen=True):
    """Where a rank is."""

    host: Name
    pid: Annotated[int, msgspec.Meta(ge=0, le=2**32)]
    door: tuple[Name, Annotated[int, msgspec.Meta(ge=0, le=65535)]]
    left: bool  # it was told to end, and has


class About(msgspec.Struct, frozen=True):
    """What a server is, which stays while it is up."""

    job: Hex  # of the launcher that started it; empty: none did
    size: Annotated[int, msgspec.Meta(ge=2, lt=MOST_RANKS)]
    entry: Annotated[int, msgspec.Meta(ge=1, le=1 << 20)]  # bytes that the report of a rank may have
    secret: Annotated[str, msgspec.Meta(pattern=r"\A[0-9a-f]*\Z", min_length=2 * SECRET, max_length=2 * SECRET)]
    salt: Annotated[str, msgspec.Meta(pattern=r"\A[0-9a-f]*\Z", min_length=32, max_length=32)]  # of its tokens
    facts: dict[Text, Text]  # in which all ranks are the same
    words: list[Text]  # its options, for the command line
    threads: Annotated[int, msgspec.Meta(ge=1, le=1 << 20)]  # of each rank of this host

    def digest(self) -> str:
        """Of the facts, 64 hexadecimal digits."""
        return hashlib.sha256(msgspec.json.encode(self.facts)).hexdigest()


class JoinFile(msgspec.Struct, frozen=True):
    """All that stands in the file."""

    version: Text  # of dllm
    about: About
    ranks: dict[Rank, RankAt]


class _Head(msgspec.Struct):
    version: Text


def host_name() -> str:
    """Of this host, as ranks tell each other."""
    return re.sub(r"[^A-Za-z0-9_.-]", "_", socket.gethostname()[:64])


def folder() -> pathlib.Path:
    """Where such files are: on this host, of this user, and gone when it is started anew."""
    runtime = os.environ.get("XDG_RUNTIME_DIR", "")
    if os.path.isabs(runtime) and os.path.isdir(runtime):
        return pathlib.Path(runtime, "dllm")
    return pathlib.Path(tempfile.gettempdir(), f"dllm-{os.geteuid()}")


def path_of(host: str, port: int) -> pathlib.Path:
    """The file of the server that clients reach at this address and port."""
    return folder() / f"serve-{host}-{port}.json"


def write(path: pathlib.Path, about: About, ranks: Mapping[int, RankAt]) -> None:
    """Write it, atomically. Raises UserError where its folder is not this user's alone, or it cannot be written."""
    data = msgspec.json.encode(JoinFile(__version__, about, dict(ranks)))
    try:
        with contextlib.suppress(FileExistsError):
            os.mkdir(path.parent, 0o700)
        found = os.lstat(path.parent)
        if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid() or found.st_mode & 0o077:
            raise UserError(f"{path.parent} is not a folder of this user alone: remove it, or chmod 700 it")
        with storage.atomic(path) as temporary:
            descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            with open(descriptor, "wb") as file:
                file.write(data)
    except OSError as error:
        raise UserError(f"cannot write {path}: {reason(error)}") from None


def read(path: str | os.PathLike[str]) -> JoinFile:
    """What stands in a file that nobody but this user can have written or read. Raises UserError."""
    try:
        flags = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY | os.O_NOFOLLOW
        with open(os.open(path, flags), "rb") as file:
            found = os.fstat(file.fileno())
            if not stat.S_ISREG(found.st_mode):
                raise UserError(f"--join {path} is no regular file")
            if found.st_uid != os.geteuid():
                raise UserError(f"--join {path} belongs to another user: join as the user of the server")
            if found.st_mode & 0o077:
                raise UserError(f"--join {path} can be read or written by others: chmod 600 {path}")
            data = file.read(LARGEST + 1)
    except FileNotFoundError:
        raise UserError(f"there is no --join {path}: the server has ended, or is on another host") from None
    except OSError as error:
        raise UserError(f"cannot read --join {path}: {reason(error)}") from None
    try:
        if len(data) > LARGEST:
            raise ValueError("too large")
        version = msgspec.json.decode(data, type=_Head).version
        if version == __version__:
            return msgspec.json.decode(data, type=JoinFile)
    except (ValueError, RecursionError):
        raise UserError(f"--join {path} is no join file of a server: dllm serve names it when it starts") from None
    theirs = printable(version)[:40]
    raise UserError(f"--join {path} is of dllm {theirs}, this is dllm {__version__}: join with the same version")


def remove(path: pathlib.Path, about: About) -> None:
    """Remove the file of this server, where it is its file still."""
    with contextlib.suppress(UserError, OSError):
        if read(path).about.secret == about.secret:
            path.unlink(missing_ok=True)


def of_job(job: str) -> tuple[pathlib.Path, JoinFile] | None:
    """The file of the server that a launcher has started, with what stands in it; None: there is none yet, or no more."""
    for path in sorted(folder().glob("serve-*.json")):
        with contextlib.suppress(UserError):
            found = read(path)
            if found.about.job == job:
                return path, found
    return None


def words_of(options: argparse.Namespace, port: int) -> list[str]:
    """The options of a server as words of the command, but for those that each rank may have its own of."""
    words: list[str] = []
    for name, value in {**vars(options), "port": port}.items():
        option = f"--{name.replace('_', '-')}"
        if name in PER_RANK or value is None or value is False:
            continue
        words += [option] if value is True else [f"{option}={one}" for one in (value if isinstance(value, list) else [value])]
    return words


def facts_of(options: argparse.Namespace, port: int, others: Mapping[str, Any]) -> dict[str, str]:
    """name -> text, of all in which the ranks of a server must be the same: options, and what else is given."""
    chosen = {f"option --{name.replace('_', '-')}": value for name, value in vars(options).items() if name not in PER_RANK}
    return {name: _short(value) for name, value in {**others, **chosen, "option --port": port}.items()}


def _short(value: Any) -> str:
    text = str(value)
    if len(text) <= MOST_SHOWN:
        return printable(text)
    return f"{printable(text[:MOST_SHOWN])}... ({hashlib.sha256(text.encode(errors='replace')).hexdigest()})"
