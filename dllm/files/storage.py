"""Files that are whole or not there: atomic writes, and hashes that are checked before a file is believed."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import pathlib
import shutil
import stat
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeAlias

from ..errors import UserError, reason

Path: TypeAlias = str | os.PathLike[str]

BLOCK = 1 << 20  # bytes that are hashed at a time
# What is read whole has a largest size, in bytes, so that no file takes all memory. What dllm writes stays far below.
SMALL = 1 << 17  # settings, which have 3 kB
LARGEST_LIST = 1 << 24  # hosts, edges of a graph: 30 bytes and 10 bytes a line
LARGEST_JSON = 1 << 26  # a vocabulary of a million words has 20 MB, a manifest of a terabyte of text 25 MB
LARGEST_METRICS = 1 << 30  # a line has 400 bytes
MOST_VALUES = 1 << 22  # commas and brackets in a JSON file: what Python makes of a value takes 20 times its bytes


@contextlib.contextmanager
def atomic(path: Path) -> Iterator[pathlib.Path]:
    """A temporary path beside `path` to make a file at; on leaving it is flushed to disk and renamed, on error removed.

    Make the file by mode "x", which follows no link that somebody else has put there.
    """
    target = pathlib.Path(path)
    temporary = _temporary(target)
    try:
        yield temporary
        flush(temporary)
        os.replace(temporary, target)
        flush(target.parent)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def atomic_folder(path: Path) -> Iterator[pathlib.Path]:
    """The same for a folder with files in it, which must not be there yet; its parents are made."""
    target = pathlib.Path(path)
    temporary = _temporary(target)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        for file in (*temporary.iterdir(), temporary):
            flush(file)
        os.rename(temporary, target)
        flush(target.parent)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def write_pieces(
    target: pathlib.Path, pieces: Callable[[int], Iterable[bytes]], most: int | None, moved: Callable[[int], object]
) -> None:
    """Make the file `target` of what comes in pieces, whole or not at all. Raises UserError.

    pieces : given the most bytes that there may be: `most`, or fewer where the disk has no room for so many
    moved : told the bytes of each piece
    """
    try:
        room = shutil.disk_usage(target.parent).free
        with atomic(target) as temporary, open(temporary, "xb") as file:
            for piece in pieces(room if most is None else min(most, room)):
                file.write(piece)
                moved(len(piece))
    except OSError as error:
        raise UserError(f"cannot write {target}: {reason(error)}") from None


def owner_only() -> None:
    """Let nobody but this user read what this process makes from here on: files and folders, of all libraries."""
    os.umask(os.umask(0o077) | 0o077)


def _temporary(target: pathlib.Path) -> pathlib.Path:
    """A name beside it that nobody can foresee, in a folder where others may write."""
    return target.with_name(f".{target.name[:100]}.{os.urandom(8).hex()}.tmp")


def flush(path: Path) -> None:
    """fsync a file or a folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(path: Path, text: str) -> None:
    """Write UTF-8, atomically. Raises OSError."""
    with atomic(path) as temporary, open(temporary, "x", encoding="utf-8") as file:
        file.write(text)


def sha256(path: Path, rest: Callable[[], object] = lambda: None) -> str:
    """Of a file, in hexadecimal; rest() is called after each MiB."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(BLOCK):
            digest.update(block)
            rest()
    return digest.hexdigest()


def write_json(path: Path, value: Any, most: int | None = None) -> None:
    """Write JSON, atomically. Raises OSError; UserError where it has more than `most` bytes, which `read_json` would refuse."""
    text = json.dumps(value, indent=1, ensure_ascii=False) + "\n"
    if most is not None:
        _check_size(path, text.encode(), most)
    write_text(path, text)


def read_text(path: Path, most: int = SMALL, what: str = "", errors: str = "strict") -> str:
    """The text of a file of at most `most` bytes: UTF-8, with or without a byte-order mark.

    what : named before the path in messages, such as "the hosts in "
    errors : what becomes of other bytes, as `bytes.decode` has it

    Raises UserError where there is none: also for a pipe, a device, a folder, a larger file and other bytes.
    """
    try:
        return _read(path, most, what).decode("utf-8-sig", errors)
    except UnicodeDecodeError as error:
        raise UserError(f"cannot read {what}{path}: {reason(error)}") from None


def _read(path: Path, most: int, what: str = "") -> bytes:
    try:
        check_regular(path, what)  # before it is opened, since opening a device may do something
        with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
            found = os.fstat(file.fileno())  # of what was opened, should another have taken its place: a pipe has no end
            if not stat.S_ISREG(found.st_mode):
                raise UserError(f"cannot read {what}{path}: it is not a file")
            # What is asked for takes memory before it is there, so no more than the file has, and a little: it may grow.
            data = file.read(min(most, max(found.st_size, BLOCK)) + 1) if found.st_size <= most else None
    except OSError as error:
        raise UserError(f"cannot read {what}{path}: {reason(error)}") from None
    if data is None or len(data) > most:
        raise UserError(f"{path} is too large: over {most >> 10:,} kB")
    return data


def read_json(path: Path, keys: Iterable[str], most: int = LARGEST_JSON) -> dict[str, Any]:
    """A JSON object of at most `most` bytes that has `keys`. Raises UserError that names the file and what is wrong with it."""
    return parse_json(path, _read(path, most), keys, most)


def parse_json(path: Path, data: bytes, keys: Iterable[str], most: int = LARGEST_JSON) -> dict[str, Any]:
    """The same of bytes that `path` has, or would have here."""
    _check_size(path, data, most)
    try:
        value: dict[str, Any] = json.loads(data.decode("utf-8"))
        if b"\\u" in data:
            json.dumps(value, ensure_ascii=False).encode()  # half a character of UTF-16 is no text
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON ({error})") from None
    missing = [key for key in keys if not (isinstance(value, dict) and key in value)]
    if missing:
        raise UserError(f"{path} has no '{missing[0]}'; make the folder anew")
    return value


def _check_size(path: Path, data: bytes, most: int) -> None:
    """Raise UserError where `read_json` does not take so much."""
    if len(data) > most:
        raise UserError(f"{path} is too large: over {most >> 10:,} kB")
    if sum(map(data.count, (b",", b"[", b"{"))) > MOST_VALUES:
        raise UserError(f"{path} holds too much: over {MOST_VALUES:,} values")


def check_file(
    path: Path, digest: str, least: int = 0, most: int | None = None, rest: Callable[[], object] = lambda: None
) -> None:
    """Raise UserError where the file is missing, has not between `least` and `most` bytes, or its sha256 is not `digest`.

    rest : as of `sha256`
    """
    try:
        check_regular(path)
        size = os.stat(path).st_size
        if most is not None and size > most:  # of a sparse file a terabyte costs its maker nothing
            raise UserError(f"{path} is damaged: it has {size:,} bytes, what it should hold takes at most {most:,}")
        if size < least:
            raise UserError(f"{path} is damaged: it has {size:,} bytes, what it should hold takes at least {least:,}")
        found = sha256(path, rest)
    except OSError as error:
        raise UserError(f"cannot read {path}: {reason(error)}") from None
    if found != digest:
        raise UserError(f"{path} is damaged: its sha256 is not the one in the manifest; make or copy it anew")


def check_regular(path: Path, what: str = "") -> None:
    """Raise UserError where `path` is a pipe or a device: reading it might never end. Raises OSError where it is missing."""
    try:
        regular = stat.S_ISREG(os.stat(path).st_mode)
    except ValueError as error:  # a name with NUL in it
        raise UserError(f"cannot read {what}{path}: {reason(error)}") from None
    if not regular:
        raise UserError(f"cannot read {what}{path}: it is not a file")


def forget(path: Path) -> None:
    """Drop a file from the system's memory: what is read next comes from the disk."""
    if hasattr(os, "posix_fadvise"):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)
