"""Keeps strangers away from MPI where all ranks are on this host: what listens for other hosts hears this one alone.

Neither MPI can be told to: Open MPI 5 and MPICH's Hydra listen at every address, whatever their interface is. Linux lets a
socket that listens be bound to the loopback device later (since 5.7 without privileges); packets from elsewhere are refused.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import pathlib
import re
import socket
from collections.abc import Iterator

HERE = (("OMPI_COMM_WORLD_LOCAL_SIZE", "OMPI_COMM_WORLD_SIZE"), ("MPI_LOCALNRANKS", "PMI_SIZE"))  # equal: all ranks are here
CONTROL = re.compile(rb"--control-port\0[^\0]*:(\d+)\0")  # of Hydra's proxy: a socket of mpirun that every rank inherits
PIDFD_GETFD = 438  # number of the system call, the same on every processor


def device() -> str:
    """The name of the loopback device."""
    return next((name for _, name in socket.if_nameindex() if re.fullmatch(r"lo\d*", name)), "lo")


def all_ranks_here() -> bool:
    """Whether this process is a rank, and all others are on its host, as mpirun says."""
    return any(name in os.environ and os.environ[name] == os.environ.get(total) for name, total in HERE)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """A block in which MPI starts: what listens since then, or was inherited from mpirun, hears this host alone."""
    before = set(_sockets("self").values())
    yield
    if all_ranks_here():
        control = _control_port()
        for number, inode in _sockets("self").items():
            with contextlib.suppress(OSError), socket.socket(fileno=os.dup(number)) as found:
                if inode not in before or (_listens(found) and found.getsockname()[1] == control):
                    confine(found)


def confine(found: socket.socket) -> None:
    """Let a socket that listens, if it does, hear this host alone. Raises OSError where that is forbidden."""
    if _listens(found) and not found.getsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, 16).strip(b"\0"):
        found.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, device().encode() + b"\0")


def confine_process(pid: int) -> None:
    """`confine` the sockets of a child of this process. Raises OSError where that is forbidden."""
    if not hasattr(os, "pidfd_open"):
        return
    with contextlib.suppress(ProcessLookupError), _handle(pid) as handle:
        for number in _sockets(str(pid)):
            try:
                copied = _copy(handle, number)
            except OSError as error:
                if error.errno != errno.EBADF:  # which says that it has closed the socket meanwhile
                    raise
                continue
            with socket.socket(fileno=copied) as found:
                confine(found)


@contextlib.contextmanager
def _handle(pid: int) -> Iterator[int]:
    handle = os.pidfd_open(pid)
    try:
        yield handle
    finally:
        os.close(handle)


def _copy(handle: int, number: int) -> int:
    """A descriptor of our own for one of another process. Raises OSError."""
    libc = ctypes.CDLL(None, use_errno=True)
    copied = int(libc.syscall(PIDFD_GETFD, handle, number, 0))
    if copied < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return copied


def _listens(found: socket.socket) -> bool:
    internet = found.family in (socket.AF_INET, socket.AF_INET6) and found.type == socket.SOCK_STREAM
    return internet and bool(found.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN))


def _sockets(process: str) -> dict[int, str]:
    """descriptor -> the socket's name of a process; none where there is no /proc."""
    found = {}
    with contextlib.suppress(OSError):
        for entry in pathlib.Path("/proc", process, "fd").iterdir():
            with contextlib.suppress(OSError):
                name = os.readlink(entry)
                if name.startswith("socket:"):
                    found[int(entry.name)] = name
    return found


def _control_port() -> int | None:
    """The port at which MPICH's mpirun awaits its proxies; None where this rank is not its."""
    try:
        match = CONTROL.search(pathlib.Path(f"/proc/{os.getppid()}/cmdline").read_bytes())
    except OSError:
        return None
    return int(match[1]) if match else None
