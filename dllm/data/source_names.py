"""What a word on a command line names: a file, all files of a folder or a pattern, a stream, an URL."""

from __future__ import annotations

import glob
import os
import pathlib
import stat
from collections.abc import Iterable, Iterator, Sequence
from typing import IO, TYPE_CHECKING, Any

from ..comm import messages
from ..config import path_of_rank
from ..errors import UserError, reason
from ..files import storage
from ..remote.locate import is_url, local_copy
from .lines import plain_lines

if TYPE_CHECKING:
    from mpi4py import MPI

STDIN = "-"
NAMES_OF_STDIN = (STDIN, "/dev/stdin", "/dev/fd/0", "/proc/self/fd/0")


def named(words: Iterable[str]) -> list[str]:
    """The names of sources that words name, in their order, of a folder or a pattern sorted. Raises UserError."""
    return [name for word in words for name in _named(word)]


def listed(path: str, rank: int = 0) -> list[str]:
    """The words in a file, one a line. Raises UserError, which quotes no line: it may be a private text instead of a list."""
    lines = [line.strip(" \t") for line in plain_lines(storage.read_text(path, storage.LARGEST_LIST, "the list "))]
    for number, line in enumerate(lines, 1):
        word = path_of_rank(line, rank)
        if line and not ("://" in word or word in NAMES_OF_STDIN or os.path.lexists(word) or glob.glob(word, recursive=True)):
            raise UserError(f"{path} line {number} names no file that is there")
    return [line for line in lines if line]


def one(word: str) -> str:
    """The name of the one source that a word names. Raises UserError."""
    names = _named(word)
    if len(names) != 1:
        raise UserError(f"{word} names {len(names):,} files: of pairs each side is one")
    return names[0]


def _named(word: str) -> Sequence[str]:
    if word in NAMES_OF_STDIN:
        return [STDIN]
    if is_url(word):
        word = str(local_copy(word))
    if "://" in word:
        return _at_url(word)
    if os.path.isdir(word):
        return _some(sorted(_below(pathlib.Path(word))), word)
    if not os.path.lexists(word) and glob.has_magic(word):
        found = sorted(glob.glob(word, recursive=True))
        return _some([name for path in found for name in ([path] if not os.path.isdir(path) else [])], word)
    return [word]


def _below(folder: pathlib.Path) -> Iterator[str]:
    """All files of a folder, but hidden ones. Raises UserError where one below cannot be looked into."""

    def fail(error: OSError) -> None:
        raise UserError(f"cannot read {error.filename}: {reason(error)}")

    for place, folders, names in os.walk(folder, onerror=fail):
        folders[:] = [name for name in folders if not name.startswith(".")]
        yield from (os.path.join(place, name) for name in names if not name.startswith("."))


def _some(names: list[str], word: str) -> list[str]:
    if not names:
        raise UserError(f"no file is at {word}")
    return names


def _at_url(url: str) -> list[str]:
    try:
        import fsspec
    except ImportError:
        raise UserError(f"{url} is read by fsspec: pip install 'dllm[inputs]'") from None
    try:
        system, path = fsspec.core.url_to_fs(url)
        if glob.has_magic(path) and not url.startswith("http"):
            return _some([system.unstrip_protocol(name) for name in sorted(system.glob(path))], url)
        if not url.startswith("http") and system.isdir(path):
            return _some([system.unstrip_protocol(name) for name in sorted(system.find(path))], url)
    except UserError:
        raise
    except Exception as error:  # each file system has errors of its own
        raise UserError(f"cannot read {url}: {reason(error) or type(error).__name__}") from None
    return [url]


def open_url(url: str) -> IO[bytes]:
    """The bytes at an URL, by fsspec. Raises what its file systems raise."""
    import fsspec

    opened: Any = fsspec.open(url, "rb").open()
    return opened  # type: ignore[no-any-return]


def is_stream(name: str) -> bool:
    """Whether what a name names can be read once only: standard input, or a pipe."""
    if name == STDIN:
        return True
    try:
        return stat.S_ISFIFO(os.stat(name).st_mode)
    except (OSError, ValueError):
        return False


def readable_everywhere(comm: MPI.Comm, hosts: Sequence[str], names: Iterable[Any]) -> None:
    """Raise UserError on all ranks where some of them lack a file that others have. Collective."""
    files = (str(name) for name in names if str(name) != STDIN and "://" not in str(name))
    lacking = next((name for name in files if not os.access(name, os.R_OK)), None)
    everyones = messages.allgather(comm, lacking, str | None)
    rank, path = next(((rank, path) for rank, path in enumerate(everyones) if path is not None), (0, None))
    if None in everyones and path is not None:
        raise UserError.of_all(
            f"rank {rank} on {hosts[rank]} cannot read {path}, which others can: every rank reads all text, "
            "so copy the files to the same place on each host"
        )
