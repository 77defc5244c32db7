"""Files that are whole or not there: atomic writes, hashes, and the one door through which HDF5 is opened for reading.

HDF5 follows links, external files and declared sizes silently; a file from elsewhere is checked before a byte is read.
"""

import contextlib
import hashlib
import io
import json
import os
import pathlib
from dataclasses import dataclass

import h5py
import numpy as np

from .errors import UserError

FILTERS = {h5py.h5z.FILTER_DEFLATE, h5py.h5z.FILTER_SHUFFLE, h5py.h5z.FILTER_FLETCHER32}


@contextlib.contextmanager
def atomic(path):
    """A temporary path beside `path` to write to; on leaving it is flushed to disk and renamed, on error removed."""
    path = pathlib.Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        flush(temporary)
        os.replace(temporary, path)
        flush(path.parent)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def flush(path):
    """fsync a file or a folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(path, text):
    with atomic(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def sha256(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_json(path, value):
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def read_json(path, keys):
    """A JSON object that has `keys`. Raises UserError that names the file and what is wrong with it."""
    try:
        value = json.loads(pathlib.Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON ({error})") from None
    missing = [key for key in keys if not (isinstance(value, dict) and key in value)]
    if missing:
        raise UserError(f"{path} has no '{missing[0]}'; make the folder anew")
    return value


def check_file(path, digest):
    """Raise UserError where the file is missing or its sha256 is not `digest`."""
    try:
        found = sha256(path)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    if found != digest:
        raise UserError(f"{path} is damaged: its sha256 is not the one in the manifest; make or copy it anew")


@contextlib.contextmanager
def open_arrays(path):
    """A function array(name, dtype, shape) over an HDF5 file; it returns a checked dataset. Raises UserError."""
    try:
        with h5py.File(path, "r") as file:
            yield lambda name, dtype, shape: _dataset(path, file, name, dtype, shape)
    except (OSError, RuntimeError, KeyError, ValueError) as error:  # h5py raises any of them on a damaged file
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
        raise UserError(f"cannot read {path}: {reason}") from None


def _dataset(path, file, name, dtype, shape):
    """A plain dataset in the root group of just this dtype and shape, stored in this very file."""
    problem = None
    if not isinstance(file.get(name, getlink=True), h5py.HardLink):
        problem = "is missing or a link"
    elif file.get(name, getclass=True) is not h5py.Dataset:
        problem = "is not a dataset"
    else:
        dataset = file[name]
        plan = dataset.id.get_create_plist()
        filters = {plan.get_filter(i)[0] for i in range(plan.get_nfilters())}
        if dataset.external is not None or dataset.is_virtual:
            problem = "is stored in another file"
        elif dataset.dtype != dtype or dataset.shape != tuple(shape):
            problem = f"is {dataset.dtype}{list(dataset.shape or ())} where {np.dtype(dtype)}{list(shape)} is expected"
        elif not filters <= FILTERS:
            problem = "uses a foreign filter"
    if problem:
        raise UserError(f"{path}: '{name}' {problem}")
    return dataset


class _Patient(io.FileIO):
    """A file that keeps its first failure for `write_hdf5` instead of raising it: HDF5 does not recover from a full disk."""

    failure = None

    def write(self, data):
        view = memoryview(data).cast("B")
        while view and self.failure is None:
            try:
                view = view[super().write(view) :]
            except OSError as error:
                self.failure = error
        return len(data)


@contextlib.contextmanager
def write_hdf5(path):
    """An open h5py.File that becomes `path`, whole or not at all, at the end. Raises OSError where the disk is full."""
    with atomic(path) as temporary, _Patient(temporary, "x+") as raw:
        with h5py.File(raw, "w") as file:
            yield file
        if raw.failure is not None:
            raw.failure.filename = str(path)
            raise raw.failure


@dataclass(frozen=True)
class Stream:
    """A vector that comes in parts, since it need not be in memory as a whole."""

    size: int
    dtype: object
    parts: object  # of arrays, one after the other


def write_arrays(path, arrays):
    """An HDF5 file with checksums (fletcher32, a chunk each MiB) from name -> array or Stream. Returns its sha256."""
    with write_hdf5(path) as file:
        for name, array in arrays.items():
            if isinstance(array, Stream):
                chunk = (min(array.size, (1 << 20) // np.dtype(array.dtype).itemsize),) if array.size else None
                data = file.create_dataset(name, (array.size,), array.dtype, chunks=chunk, fletcher32=chunk is not None)
                start = 0
                for part in array.parts:
                    data[start : start + len(part)] = part
                    start += len(part)
                continue
            chunk = None
            if array.size:
                rows = max(1, (1 << 20) // max(1, array.nbytes // len(array)))
                chunk = (min(len(array), rows), *array.shape[1:])
            file.create_dataset(name, data=array, chunks=chunk, fletcher32=chunk is not None)
    return sha256(path)
