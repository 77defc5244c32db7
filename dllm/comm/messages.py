"""What ranks tell each other beside gradients and models: values of types that both sides know, as JSON and plain arrays.

A message says nothing but data: whoever reads it gets what it asked for, of the type it asked for, or an error that names the
sender. A message has three parts, one behind the other:

    8 bytes      the length of the JSON, little-endian
    JSON         the value; an array in it is [at, dtype, shape]: `at` is where its bytes begin in the third part
    arrays       their bytes
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import msgspec
import numpy as np

from ..errors import UserError
from ..kernels.types import Array

if TYPE_CHECKING:
    from mpi4py import MPI

HEAD = 8  # bytes of the length
LARGEST = 1 << 30  # bytes of a message
SPINS, NAP = 200, 1e-4  # looks at a request in a row, and seconds between those that follow
DTYPES = frozenset({"|b1", "|u1", "|i1", *(f"<{kind}{size}" for kind in "uif" for size in (2, 4, 8))})  # of arrays

T = TypeVar("T")


class _Place(NamedTuple):
    """What the JSON of a message says of an array."""

    at: int
    dtype: str
    shape: tuple[int, ...]


def pack(value: Any) -> bytes:
    """A message that says `value`: of numbers, text, lists, tuples, dicts, dataclasses and arrays of numbers.

    Numbers that are not finite belong in arrays: JSON has none. Raises UserError for text that is not UTF-8.
    """
    parts: list[bytes] = []

    def place(array: Any) -> _Place:
        if not (isinstance(array, np.ndarray) and array.dtype.str in DTYPES):
            raise TypeError(f"{type(array).__name__} is nothing that a message can say")
        at = sum(map(len, parts))
        parts.append(np.ascontiguousarray(array).tobytes())
        return _Place(at, array.dtype.str, array.shape)

    try:
        text = msgspec.json.encode(value, enc_hook=place)
    except UnicodeEncodeError:
        raise UserError(f"{str(value)[:100]!r} is not UTF-8, as names and paths must be here: choose another") from None
    return b"".join([len(text).to_bytes(HEAD, "little"), text, *parts])


def unpack(message: bytes | memoryview, kind: Any) -> Any:
    """The value of type `kind` that a message says; np.ndarray stands for an array. Raises ValueError where it says none."""
    data = memoryview(message)
    length = int.from_bytes(data[:HEAD], "little")
    arrays, taken = data[HEAD + length :], 0

    def find(kind: type, told: Any) -> Array:
        nonlocal taken
        place = msgspec.convert(told, _Place)
        if place.dtype not in DTYPES or min(place.at, *place.shape, 0) < 0:
            raise ValueError(f"no array is {told}")
        found: Array = np.ndarray(place.shape, place.dtype, arrays, place.at)
        taken += found.nbytes
        if taken > len(arrays):  # two arrays in one place would take more memory than the message
            raise ValueError("its arrays overlap")
        return found.copy()

    try:
        return msgspec.json.decode(data[HEAD : HEAD + length], type=kind, dec_hook=find)
    except (TypeError, ValueError, RecursionError, OverflowError, MemoryError) as error:  # msgspec's errors are of ValueError
        raise ValueError(f"not a message of the kind that was expected: {str(error).partition(chr(10))[0]:.200}") from None


def allgather(comm: MPI.Comm, value: T, kind: Any) -> list[T]:
    """The values of all ranks, each of type `kind`. Collective. Raises UserError on all ranks where one is not.

    It may be called where a rank may die: the operations are nonblocking ones of `comm`, which can be revoked.
    """
    if comm.size == 1:
        return [value]
    mine, lengths = _announce(comm, value)
    everyones = np.empty(lengths.sum(), np.uint8)
    _wait(comm.Iallgatherv(mine, [everyones, lengths]))
    return [_read(part, kind, rank, True) for rank, part in enumerate(_split(everyones, lengths))]


def gather(comm: MPI.Comm, value: T, kind: Any) -> list[T]:
    """The values of all ranks on rank 0, an empty list on the others. Collective. Raises UserError on rank 0."""
    if comm.size == 1:
        return [value]
    mine, lengths = _announce(comm, value)
    everyones = np.empty(lengths.sum() if comm.rank == 0 else 0, np.uint8)
    _wait(comm.Igatherv(mine, [everyones, lengths] if comm.rank == 0 else None))
    return [_read(part, kind, rank) for rank, part in enumerate(_split(everyones, lengths))] if comm.rank == 0 else []


def broadcast(comm: MPI.Comm, value: T, kind: Any) -> T:
    """Rank 0's value on all ranks; what the others give is not looked at. Collective. Raises UserError."""
    if comm.size == 1:
        return value
    message = pack(value) if comm.rank == 0 else b""
    length = np.array([len(message)])
    _wait(comm.Ibcast(length))
    _check_lengths(length)
    data = np.frombuffer(message, np.uint8).copy() if comm.rank == 0 else np.empty(length[0], np.uint8)
    _wait(comm.Ibcast(data))
    found: T = _read(data, kind, 0)
    return found


def total(comm: MPI.Comm | None, values: Array) -> Array:
    """The sum over ranks of values (n,), the same length on all; None: of this rank alone. Collective."""
    return _combine(comm, values, "SUM")


def largest(comm: MPI.Comm | None, values: Array) -> Array:
    """The maximum over ranks of values (n,), the same length on all; None: of this rank alone. Collective."""
    return _combine(comm, values, "MAX")


def _combine(comm: MPI.Comm | None, values: Array, name: str) -> Array:
    """As `total`: no rank learns more than what comes out, but for partial results that MPI sends on."""
    if comm is None or comm.size == 1:
        return values
    from mpi4py import MPI

    send, out = np.ascontiguousarray(values), np.empty(np.shape(values), values.dtype)
    _wait(comm.Iallreduce(send, out, getattr(MPI, name)))
    return out


def _wait(request: MPI.Request) -> None:
    """Wait for a request, and leave the core to others where that takes long: they may be what is waited for."""
    for _ in range(SPINS):
        if request.Test():
            return
    while not request.Test():
        time.sleep(NAP)


def _announce(comm: MPI.Comm, value: Any) -> tuple[Array, Array]:
    """This rank's message (n,) uint8, and how long those of all ranks are, (ranks,) int64."""
    mine, lengths = np.frombuffer(pack(value), np.uint8), np.empty(comm.size, np.int64)
    _wait(comm.Iallgather(np.array([mine.size]), lengths))
    _check_lengths(lengths)
    return mine, lengths


def _check_lengths(lengths: Array) -> None:
    odd = np.flatnonzero((lengths < 0) | (lengths > LARGEST))
    if odd.size:
        raise UserError.of_all(f"rank {odd[0]} announced a message of {lengths[odd[0]]:,} bytes; at most {LARGEST:,} are read")


def _split(everyones: Array, lengths: Array) -> list[Array]:
    return np.split(everyones, np.cumsum(lengths)[:-1])


def _read(part: Array, kind: Any, rank: int, by_all: bool = False) -> Any:
    try:
        return unpack(part.data, kind)
    except ValueError as error:
        text = f"rank {rank} sent {error}; start all ranks with the same version of dllm"
        raise (UserError.of_all(text) if by_all else UserError(text)) from None
