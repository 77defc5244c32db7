"""Members of zip files: of one from elsewhere they are bounded before anything is read, and checked by their CRC."""

from __future__ import annotations

import io
import os
import zipfile
import zlib
from collections.abc import Mapping

from ..errors import UserError, reason
from . import storage
from .safetensors import check_memory
from .storage import Path

DIRECTORY = 1 << 20  # bytes of a list of members, of which Python makes twenty times as much
DAMAGE = (OSError, EOFError, ValueError, RuntimeError, NotImplementedError, zipfile.BadZipFile, zlib.error)
PACKED = {zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED}
DATE = 1980, 1, 1, 0, 0, 0  # of every member that is written: the same model makes the same bytes


class _Bounded(io.FileIO):
    """A file of which one read takes at most `most` bytes: the list of members has a size of its own saying."""

    most = DIRECTORY

    def read(self, size: int | None = -1, /) -> bytes:
        wanted = os.fstat(self.fileno()).st_size - self.tell() if size is None or size < 0 else size
        if wanted > self.most:
            raise ValueError("it says of itself that it is larger than it is")
        return super().read(wanted) or b""


def read_members(path: Path, wanted: Mapping[str, int | None]) -> dict[str, bytes]:
    """Name -> bytes of the members `wanted`, name -> most bytes; None: as many as the file has, and not compressed.

    Raises UserError where the file is no zip file, lacks one of them, or one is larger.
    """
    try:
        storage.check_regular(path)
        check_memory(path)
        with _Bounded(path, "r") as raw, zipfile.ZipFile(raw) as archive:
            raw.most = os.fstat(raw.fileno()).st_size
            return {name: _member(archive, path, name, most) for name, most in wanted.items()}
    except DAMAGE as error:
        raise UserError(f"cannot read {path}: {reason(error) or 'it is damaged'}") from None
    except MemoryError:
        raise UserError(f"{path} does not fit into memory") from None


def _member(archive: zipfile.ZipFile, path: Path, name: str, most: int | None) -> bytes:
    try:
        member = archive.getinfo(name)
    except KeyError:
        raise UserError(f"{path} has no {name}") from None
    if member.flag_bits & 1 or member.compress_type not in PACKED:
        raise UserError(f"{path}: {name} is encrypted, or compressed in a way that is not known here")
    if most is None and (member.compress_type != zipfile.ZIP_STORED or member.file_size != member.compress_size):
        raise UserError(f"{path}: {name} is compressed; save the model anew")
    if most is not None and member.file_size > most:
        raise UserError(f"{path}: {name} has {member.file_size:,} bytes, at most {most:,} are read")
    with archive.open(member) as file:
        data = file.read(member.file_size)  # whose CRC is compared at its end
    if len(data) != member.file_size:
        raise UserError(f"{path}: {name} is cut off")
    return data


def pack_members(members: Mapping[str, bytes]) -> bytes:
    """A zip file of name -> bytes, not compressed."""
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        for name, data in members.items():
            archive.writestr(zipfile.ZipInfo(name, DATE), data)
    return packed.getvalue()
