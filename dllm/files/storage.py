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
LARGEST_JSON = 1 << 28  # bytes; no vocabulary comes near


@contextlib.contextmanager
def atomic(path: Path) -> Iterator[pathlib.Path]:
    """A temporary path beside `path` to write to; on leaving it is flushed to disk and renamed, on error removed."""
    target = pathlib.Path(path)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
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
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
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


def owner_only() -> None:
    """Let nobody but this user read what this process makes from here on: files and folders, of all libraries."""
    os.umask(os.umask(0o077) | 0o077)


def flush(path: Path) -> None:
    """fsync a file or a folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(path: Path, text: str) -> None:
    """Write UTF-8, atomically. Raises OSError."""
    with atomic(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def sha256(path: Path, rest: Callable[[], object] = lambda: None) -> str:
    """Of a file, in hexadecimal; rest() is called after each MiB."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(BLOCK):
            digest.update(block)
            rest()
    return digest.hexdigest()


def write_json(path: Path, value: Any) -> None:
    """Write JSON, atomically. Raises OSError."""
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def read_json(path: Path, keys: Iterable[str]) -> dict[str, Any]:
    """A JSON object that has `keys`. Raises UserError that names the file and what is wrong with it."""
    try:
        check_regular(path)
        if os.stat(path).st_size > LARGEST_JSON:
            raise UserError(f"{path} is too large: over {LARGEST_JSON >> 20} MB")
        value: dict[str, Any] = json.loads(pathlib.Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read {path}: {reason(error)}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON ({error})") from None
    missing = [key for key in keys if not (isinstance(value, dict) and key in value)]
    if missing:
        raise UserError(f"{path} has no '{missing[0]}'; make the folder anew")
    return value


def check_file(path: Path, digest: str) -> None:
    """Raise UserError where the file is missing or its sha256 is not `digest`."""
    try:
        check_regular(path)
        found = sha256(path)
    except OSError as error:
        raise UserError(f"cannot read {path}: {reason(error)}") from None
    if found != digest:
        raise UserError(f"{path} is damaged: its sha256 is not the one in the manifest; make or copy it anew")


def check_regular(path: Path) -> None:
    """Raise UserError where `path` is a pipe or a device: reading it might never end. Raises OSError where it is missing."""
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise UserError(f"cannot read {path}: it is not a file")


def forget(path: Path) -> None:
    """Drop a file from the system's memory: what is read next comes from the disk."""
    if hasattr(os, "posix_fadvise"):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)
