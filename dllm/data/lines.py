"""The lines of a file by number."""

from __future__ import annotations

import codecs
import mmap
import os

import numpy as np

from ..errors import UserError, reason
from ..files import storage
from . import text
from .text import Path, TextFile


def plain_lines(text: str) -> list[str]:
    """The lines of a text, without their ends. Only LF and CR LF end one: `str.splitlines` also takes marks within a line."""
    return [line.removesuffix("\r") for line in text.removesuffix("\n").split("\n")]


class Lines:
    """The lines of a file by number, without their ends and a byte-order mark; only where they begin is in memory."""

    def __init__(self, path: Path | TextFile) -> None:
        file_of = text.as_file(path)
        self.name, places = file_of.name, [np.zeros(1, np.int64)]
        self._bytes: mmap.mmap | bytes
        try:
            storage.check_regular(file_of.path)
            with open(file_of.path, "rb") as file:
                size, at = os.fstat(file.fileno()).st_size, 0
                while block := file.read(text.PIECE):
                    places.append(np.flatnonzero(np.frombuffer(block, np.uint8) == ord("\n")) + at + 1)
                    at += len(block)
                self._bytes = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if size else b""
        except (OSError, ValueError) as error:
            raise UserError(f"cannot read {self.name}: {reason(error)}") from None
        self._starts = np.concatenate(places)
        if self._starts[-1] != size:
            self._starts = np.append(self._starts, size)
        if self._bytes[:3] == codecs.BOM_UTF8 and len(self._starts) > 1:
            self._starts[0] = 3

    def __len__(self) -> int:
        return len(self._starts) - 1

    def __getitem__(self, number: int) -> bytes:
        """The bytes of line `number`, counted from 0; CR LF ends a line too."""
        line = self._bytes[self._starts[number] : self._starts[number + 1]]
        return line.removesuffix(b"\n").removesuffix(b"\r")

    def place(self, number: int) -> str:
        """Of a line, for messages."""
        return f"{self.name} line {number + 1}"

    @property
    def utf16(self) -> bool:
        """Whether the file begins as UTF-16 does."""
        return self._bytes[:2] in text.UTF16

    def not_utf8(self, number: int) -> str:
        """What is wrong with a line that is not UTF-8, for messages."""
        if self.utf16:
            return f"{self.name} begins with the byte-order mark of UTF-16, and is not UTF-8"
        return f"{self.place(number)} is not UTF-8"
