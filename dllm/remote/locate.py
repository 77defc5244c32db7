"""Where a path or an URL is on this disk: what ipfs:// and swarm:// name is fetched into the user's cache, checked, once.

A whole copy lies in the cache beside a list of its files' sizes and sha256, and is compared with it each time it is used: a
disk may damage what came in well. Processes of one cache fetch it one after the other, so all but the first find it there.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import importlib
import os
import pathlib
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol, TextIO

from ..config import StorageConfig
from ..errors import LONGEST_LINE, UserError, printable, reason, shown
from ..files import storage
from ..kernels.caches import user_cache
from .progress import Progress

LONGEST = 4096  # characters of an URL
LOOK_EVERY = 0.2  # seconds between looks at what another process fetches


class RemoteFolder(Protocol):
    """Files of a store below an URL."""

    @property
    def names(self) -> Sequence[str]:
        """Of all files, such as a/b for one in a folder; [""] where the URL names a file."""

    @property
    def size(self) -> int:
        """Bytes of all, about; 0: unknown."""

    def read(self, name: str, most: int) -> bytes:
        """The bytes of a file of at most `most` bytes. Raises UserError."""

    def fetch(
        self, name: str, target: pathlib.Path, most: int | None = None, moved: Callable[[int], object] = lambda size: None
    ) -> None:
        """Make the file `target` of one of at most `most` bytes (None: as the disk has room), whole or not. Raises UserError.

        moved : told the bytes of each piece
        """


# Scheme -> file of this folder and its function open(url, settings). Loaded for an URL only: HTTP takes long to import.
STORES = {"ipfs": ("ipfs", "open_tree"), "swarm": ("swarm", "open_files")}


def variables() -> tuple[str, ...]:
    """Names of the variables by which ranks on all hosts find the stores."""
    from . import ipfs, swarm

    return ipfs.RPC, ipfs.TOKEN, ipfs.GATEWAYS, swarm.BEE


def is_url(path: str | os.PathLike[str]) -> bool:
    """Whether a path names something in a store."""
    return isinstance(path, str) and path.startswith(tuple(f"{scheme}://" for scheme in STORES))


def join(path: str | os.PathLike[str], name: str) -> str:
    """The path or URL of a file in a folder."""
    return f"{str(path).rstrip('/')}/{name}" if is_url(path) else os.path.join(path, name)


def open_folder(url: str, settings: StorageConfig | None = None) -> RemoteFolder:
    """The files that an URL names; the folder's list is read at once, files when they are asked for. Raises UserError."""
    scheme = _check(url)
    module, name = STORES[scheme]
    opened: RemoteFolder = getattr(importlib.import_module(f".{module}", __package__), name)(url, settings or StorageConfig())
    return opened


def _check(url: str) -> str:
    """The scheme of an URL. Raises UserError where it is none that names something."""
    scheme, _, rest = url.partition("://")
    root = rest.partition("/")[0]
    if scheme not in STORES or not root or len(url) > LONGEST or not url.isprintable() or set(url) & set("?#"):
        raise UserError(f"{shown(url, 200)} is no URL of a file or folder: ipfs://CID, swarm://REFERENCE, and a path behind it")
    return scheme


def cache_folder(url: str) -> pathlib.Path:
    """The folder in the user's cache for what single files of an URL are kept; it may not be there yet."""
    return _place(url, "parts")


def local_copy(path: str | os.PathLike[str], settings: StorageConfig | None = None) -> pathlib.Path:
    """Where a file or folder lies on this disk: a plain path as it is; all of what an URL names, fetched where it is not there.

    Raises
    ------
    UserError
        Where it cannot be had.
    """
    if not is_url(path):
        return pathlib.Path(path)
    url, settings = str(path), settings or StorageConfig()
    place = _place(url, "whole")
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        if not _is_whole(place):
            with _alone(place, 10 * settings.timeout) as alive:
                if not _is_whole(place):
                    _remove(place)
                    for left in place.parent.glob(f".{place.name}.*.tmp"):  # by a process that was killed
                        _remove(left)
                    _fill(place, open_folder(url, settings), url, alive)
    except OSError as error:
        if _is_whole(place):  # a file system without locks, where another process was faster
            return place
        raise UserError(f"cannot keep {shown(url, 200)} at {place}: {reason(error)}") from None
    return place


def fetch_all(folder: RemoteFolder, out: pathlib.Path, moved: Callable[[int], object]) -> None:
    """Make the file or folder `out` of all files, whole or not at all. Raises UserError, OSError."""
    if list(folder.names) == [""]:
        out.parent.mkdir(parents=True, exist_ok=True)
        folder.fetch("", out, moved=moved)
        return
    with storage.atomic_folder(out) as temporary:
        for name in folder.names:
            target = temporary.joinpath(*name.split("/"))
            target.parent.mkdir(parents=True, exist_ok=True)
            folder.fetch(name, target, moved=moved)


def _place(url: str, kind: str) -> pathlib.Path:
    """In the cache, for an URL: named by its CID or reference, and by a hash of the path behind it."""
    scheme = _check(url)
    root, _, path = url.partition("://")[2].partition("/")
    path = path.strip("/")
    name = root[:150] + (f"-{hashlib.sha256(path.encode(errors='replace')).hexdigest()[:16]}" if path else "")
    cache = user_cache()
    if cache is None:
        raise UserError(f"there is no folder to keep {url} in: XDG_CACHE_HOME may name one")
    return cache / "dllm" / scheme / kind / "".join(letter if letter.isalnum() or letter == "-" else "_" for letter in name)


def _fill(place: pathlib.Path, folder: RemoteFolder, url: str, alive: Callable[[], None]) -> None:
    progress = Progress(f"fetching {url}", folder.size)

    def moved(size: int) -> None:
        progress(size)
        alive()

    fetch_all(folder, place, moved)
    files = [place] if place.is_file() else [path for path in sorted(place.rglob("*")) if path.is_file()]
    sums = {str(path.relative_to(place)): [path.stat().st_size, storage.sha256(path, alive)] for path in files}
    storage.write_json(_list_of(place), sums)


def _list_of(place: pathlib.Path) -> pathlib.Path:
    """Where the sizes and sha256 of its files stand."""
    return place.with_name(f"{place.name}.json")


def _is_whole(place: pathlib.Path) -> bool:
    """Whether a copy is what came in."""
    try:
        if not place.exists():
            return False
        return all(
            (place / name).stat().st_size == size and storage.sha256(place / name) == digest
            for name, (size, digest) in storage.read_json(_list_of(place), ()).items()
        )
    except (UserError, OSError, ValueError, TypeError, AttributeError):
        return False


def _remove(path: pathlib.Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


@contextlib.contextmanager
def _alone(place: pathlib.Path, limit: float) -> Iterator[Callable[[], None]]:
    """While it lasts, no other process fetches to the same place; gives what tells others that this one is alive.

    Where it ends by a UserError, those that wait raise the same: each would wait for the same silent node, one after the other.

    limit : seconds of silence of another process after which it is not waited for any longer
    """
    path = place.with_name(f"{place.name}.lock")
    with open(path, "a+", encoding="utf-8") as lock:
        if _wait(lock, path, limit):
            lock.seek(0)
            if why := lock.read(LONGEST_LINE):
                raise UserError(why)
        lock.truncate(0)
        shown_alive = 0.0

        def alive() -> None:
            nonlocal shown_alive
            if time.monotonic() - shown_alive > 1:
                shown_alive = time.monotonic()
                os.utime(path)

        try:
            yield alive
        except UserError as error:
            lock.write(printable(str(error)))
            raise


def _wait(lock: TextIO, path: pathlib.Path, limit: float) -> bool:
    """Lock a file as soon as nobody else has it. Returns whether somebody had. Raises UserError where that one is silent."""
    waited, last = False, time.monotonic()
    seen = os.stat(path).st_mtime_ns
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return waited
        except BlockingIOError:
            waited = True
            time.sleep(LOOK_EVERY)
        except OSError:  # a file system without locks: renames keep what is there whole
            return waited
        if (now := os.stat(path).st_mtime_ns) != seen:
            seen, last = now, time.monotonic()
        if time.monotonic() - last > limit:
            raise UserError(f"another process that fetches what goes to {path.stem} is silent for {limit:g} s: end it")
