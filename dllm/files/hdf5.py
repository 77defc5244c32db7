"""The one door through which HDF5 is opened, and how it is written.

HDF5 follows links, external files and declared sizes silently; a file from elsewhere is checked before a byte is read. Only
what the writers here make is let in: plain numbers in this very file, in chunks that are all there, each with a fletcher32.
No file is locked, which not every file system can: what has its name is whole, and never changes.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import xxhash

from ..errors import UserError, reason
from ..kernels.types import Array, DType
from . import storage
from .storage import Path

os.environ["HDF5_PLUGIN_PRELOAD"] = "::"  # no file makes HDF5 load a plugin; read when h5py is imported
os.environ.pop("HDF5_USE_FILE_LOCKING", None)  # which would overrule what is asked for a file
import h5py

CHUNK = 1 << 20  # bytes of a chunk, about; a row that is longer is a chunk of its own
LEAST = 1 << 12  # no dataset is cut into chunks of fewer bytes than this
SPARE = 1 << 21  # bytes that a file of ours may have beside its data and their checksums
Spans: TypeAlias = dict[str, list[tuple[int, int]]]  # name -> bytes (start, stop) that its chunks take in the file
Opener: TypeAlias = Callable[[str, DType, Iterable[int]], h5py.Dataset]  # name, dtype, shape


@contextlib.contextmanager
def open_arrays(path: Path, names: Iterable[str] | None = None) -> Iterator[Opener]:
    """A function array(name, dtype, shape) over an HDF5 file; it returns a dataset that was checked, nothing of it read.

    names : iterable of str, optional
        The file must hold these and nothing else.

    Raises UserError, for what a dataset turns out to be when it is read too. HDF5 itself may crash on a file that was made
    to harm it: for a file from elsewhere `check_file` comes first.
    """
    spans: Spans = {}
    try:
        storage.check_regular(path)
        with h5py.File(path, "r", locking=False) as file:
            if names is not None:
                _check_names(path, file, set(names))
            yield lambda name, dtype, shape: _dataset(path, file, name, np.dtype(dtype), tuple(shape), spans)
    except (OSError, RuntimeError, KeyError, ValueError, TypeError) as error:  # h5py raises any of them on a damaged file
        raise UserError(f"cannot read {path}: {reason(error) or 'it is damaged'}") from None


def most_bytes(size: int) -> int:
    """The most that a file of ours has whose datasets take `size` bytes: the last chunk of each is stored whole."""
    return size + size // 64 + 16 * CHUNK + SPARE


def _check_names(path: Path, file: h5py.Group, names: set[str]) -> None:
    """Raise UserError where the root group does not hold just `names`."""
    if len(file) > len(names):
        raise UserError(f"{path}: it holds {len(file)} datasets where {len(names)} are expected")
    missing = sorted(names - set(file))
    if missing:
        raise UserError(f"{path}: '{missing[0]}' is missing")


def _dataset(
    path: Path, file: h5py.Group, name: str, dtype: np.dtype[Any], shape: tuple[int, ...], spans: Spans
) -> h5py.Dataset:
    """The dataset `name` where it is plain and whole; raises UserError. spans: name -> bytes (start, stop) taken by others."""
    dataset = _walk(file, name)
    problem: str | None
    if dataset is None:
        problem = "is missing or a link"
    elif not isinstance(dataset, h5py.Dataset):
        problem = "is not a dataset"
    else:
        problem = _foreign(dataset, dtype, shape)
        if problem is None and dataset.size:
            problem = _misplaced(dataset, name, spans)
    if problem:
        raise UserError(f"{path}: '{name}' {problem}")
    return dataset


def _walk(file: h5py.Group, name: str) -> Any:
    """The object at `name`, or None where any component of its path is missing or not a hard link.

    Asked for a whole path, h5py looks at the last link only and follows those before it, even into a pipe.
    """
    here = file
    for component in name.split("/"):
        if not (isinstance(here, h5py.Group) and isinstance(here.get(component, getlink=True), h5py.HardLink)):
            return None
        here = here[component]
    return here


def _foreign(dataset: h5py.Dataset, dtype: np.dtype[Any], shape: tuple[int, ...]) -> str | None:
    """What a dataset is that it should not be, in words, or None: by its header alone."""
    plan, kind = dataset.id.get_create_plist(), dataset.id.get_type()
    filters = [plan.get_filter(number)[0] for number in range(plan.get_nfilters())]
    if dataset.external is not None or dataset.is_virtual:
        return "is stored in another file"
    if kind.get_class() not in (h5py.h5t.INTEGER, h5py.h5t.FLOAT):
        return f"is not of numbers where {dtype} is expected"
    if dataset.shape != shape or not kind.equal(h5py.h5t.py_create(dtype)):
        return f"is {dataset.dtype}{list(dataset.shape or ())} where {dtype}{list(shape)} is expected"
    if not set(filters) <= {h5py.h5z.FILTER_FLETCHER32}:
        return "uses a foreign filter"
    if dataset.size and not filters:
        return "has no checksum"
    return None


def _misplaced(dataset: h5py.Dataset, name: str, spans: Spans) -> str | None:
    """How the chunks of a dataset are not those a writer makes, in words, or None. Enters their bytes in `spans`.

    A chunk that is missing would read as zeros, one whose filter is masked without its checksum, one listed in another's
    place as that one.
    """
    size = math.prod(dataset.chunks) * dataset.dtype.itemsize
    if not 0 < size <= max(CHUNK, dataset.nbytes):
        return f"has chunks of {size} bytes"
    grid = [range(0, total, step) for total, step in zip(dataset.shape, dataset.chunks, strict=True)]
    count, found = math.prod(map(len, grid)), list[Any]()
    if count > dataset.nbytes // LEAST + 1:
        return f"is cut into {count} chunks"

    def collect(chunk: Any) -> bool | None:
        """Goes on until it returns anything but None."""
        found.append(chunk)
        return len(found) > count or None

    dataset.id.chunk_iter(collect)
    if any(chunk.filter_mask or chunk.size != size + 4 for chunk in found):  # 4 bytes of checksum
        return "has a chunk without its checksum"
    if sorted(chunk.chunk_offset for chunk in found) != list(itertools.product(*grid)):
        return "lacks a chunk"
    if not all(_reachable(dataset, chunk.chunk_offset) for chunk in found):
        return "has a chunk that cannot be reached"
    spans[name] = [(chunk.byte_offset, chunk.byte_offset + chunk.size) for chunk in found]
    if any(first[1] > second[0] for first, second in itertools.pairwise(sorted(itertools.chain(*spans.values())))):
        return "has a chunk that is another's too"
    return None


def _reachable(dataset: h5py.Dataset, offset: tuple[int, ...]) -> bool:
    """Whether reading finds a chunk that is listed: in the older format a damaged key hides it, and it reads as zeros."""
    try:
        dataset.id.read_direct_chunk(offset, out=bytearray(1))
    except ValueError:  # found, and one byte is too few for it: nothing was read
        return True
    except RuntimeError:
        return False
    return False


class _Patient(io.FileIO):
    """A file that keeps its first failure for `write_hdf5` instead of raising it: HDF5 does not recover from a full disk."""

    failure: OSError | None = None

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        while view and self.failure is None:
            try:
                view = view[super().write(view) :]
            except OSError as error:
                self.failure = error
        return len(data)


@contextlib.contextmanager
def write_hdf5(path: Path) -> Iterator[h5py.Group]:
    """An open h5py.File that becomes `path`, whole or not at all, at the end. Raises OSError where the disk is full.

    HDF5 1.10's format, unlike h5py's default of 1.0, has checksums in what says where the data lie: in the old one a damaged
    address that led to empty space read as zeros, whose fletcher32 is zero too.
    """
    with storage.atomic(path) as temporary, _Patient(temporary, "x+") as raw:
        with h5py.File(raw, "w", libver=("v110", "v110")) as file:
            yield file
        if raw.failure is not None:
            raw.failure.filename = str(path)
            raise raw.failure


def pack_plain(arrays: Mapping[str, Array], groups: Iterable[str]) -> bytes:
    """An HDF5 file as other programs write it, without checksums and in HDF5 1.0's format, of path -> array and of `groups`."""
    packed = io.BytesIO()
    with h5py.File(packed, "w") as file:
        for name in groups:
            file.require_group(name)
        for name, array in arrays.items():
            file.create_dataset(name, data=np.ascontiguousarray(array))
    return packed.getvalue()


@dataclass(frozen=True)
class Stream:
    """A vector that comes in parts, since it need not be in memory as a whole."""

    size: int
    dtype: DType
    parts: Iterable[Array]  # one after the other

    @property
    def shape(self) -> tuple[int]:
        """(length,), as an array has it."""
        return (self.size,)


def write_arrays(path: Path, arrays: Mapping[str, Array | Stream], rest: Callable[[], object] = lambda: None) -> str:
    """An HDF5 file with checksums (fletcher32, a chunk each MiB) from name -> array or Stream. Returns its sha256.

    What is on the disk then is read once and compared. rest() is called after each MiB or so of work.

    Raises OSError where the disk is full, or gives back something else.
    """
    written, shapes = dict[str, bytes](), dict[str, tuple[np.dtype[Any], tuple[int, ...]]]()
    with write_hdf5(path) as file:
        for name, array in arrays.items():
            shapes[name], digest = (np.dtype(array.dtype), array.shape), xxhash.xxh3_64()
            data = file.create_dataset(name, array.shape, array.dtype, **_chunks(array))
            start = 0
            for part in array.parts if isinstance(array, Stream) else _pieces(array):
                data[start : start + len(part)] = part
                start += len(part)
                digest.update(np.ascontiguousarray(part).data)
                rest()
            written[name] = digest.digest()
    storage.forget(path)
    try:
        if _digests(path, shapes, rest) != written:
            raise OSError(f"{path} is not what was written")
    except UserError as error:
        raise OSError(str(error)) from None
    return storage.sha256(path, rest)


def _chunks(array: Array | Stream) -> dict[str, Any]:
    """How a dataset lies in its file."""
    if not math.prod(array.shape):
        return {}
    row = math.prod(array.shape[1:]) * np.dtype(array.dtype).itemsize
    return {"chunks": (min(array.shape[0], max(1, CHUNK // row)), *array.shape[1:]), "fletcher32": True}


def _pieces(array: Array | h5py.Dataset) -> Iterator[Array]:
    """An array or dataset in parts of about CHUNK bytes, one after the other along the first axis."""
    rows = max(1, CHUNK * len(array) // max(1, array.nbytes)) if len(array) else 1
    return (array[start : start + rows] for start in range(0, len(array), rows))


def _digests(
    path: Path, shapes: Mapping[str, tuple[np.dtype[Any], tuple[int, ...]]], rest: Callable[[], object]
) -> dict[str, bytes]:
    """name -> xxh3 of the bytes of each dataset; shapes: name -> (dtype, shape)."""
    found = {}
    with open_arrays(path, shapes) as array:
        for name, (dtype, shape) in shapes.items():
            digest = xxhash.xxh3_64()
            for part in _pieces(array(name, dtype, shape)):
                digest.update(np.ascontiguousarray(part).data)
                rest()
            found[name] = digest.digest()
    return found
