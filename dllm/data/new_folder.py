"""A folder that is made aside and then appears whole under its name, so that of several that make it exactly one succeeds."""

from __future__ import annotations

import contextlib
import errno
import glob
import os
import pathlib
import shutil
import time

from ..errors import UserError, reason
from ..files import storage

SUFFIX = ".tmp"
OLD = 24 * 3600  # seconds; whoever makes a folder writes to it now and then


def left_over(out: pathlib.Path, near: pathlib.Path) -> list[pathlib.Path]:
    """Folders that a crash has left: made for `out`, or for texts in `near`, and nothing in them is younger than `OLD`."""
    out, old = pathlib.Path(os.path.realpath(out)), []
    mine, texts = f".{glob.escape(out.name[:100])}.*{SUFFIX}", f".text-*{SUFFIX}"
    places = (out, mine), (out.parent, mine), (near, texts)
    found = {path for folder, name in places for path in glob.glob(f"{glob.escape(str(folder))}/{name}")}
    for path in map(pathlib.Path, sorted(found)):
        with contextlib.suppress(OSError):
            if max(os.stat(one).st_mtime for one in (path, *path.iterdir())) < time.time() - OLD:
                old.append(path)
    return old


class NewFolder:
    """The folder `out`, empty or not there yet, made at `place`. Raises UserError where it is not free.

    It is made beside `out` and renamed. Where `out` is there, it is made inside, and its files are moved: `out` may be the root
    of a mounted disk, somebody may be in it, and maybe nobody may write beside it. What a crash leaves, beside or inside, is in
    nobody's way.

    token : names `place`, the same for all who make it together
    """

    def __init__(self, out: pathlib.Path, token: str) -> None:
        self.name, out = out, pathlib.Path(os.path.realpath(out))  # a link stays, and what it names is made
        self.out = out
        found = os.listdir(out) if os.path.isdir(out) else []
        other = os.path.lexists(out) and not os.path.isdir(out)
        if other or not all(name.startswith(".") and name.endswith(SUFFIX) for name in found):
            raise UserError(f"--out {self.name} exists and is not an empty folder; choose another, or remove it first")
        self.inside = os.path.isdir(out)
        self.place = (out if self.inside else out.parent) / f".{out.name[:100]}.{token}{SUFFIX}"
        self._new = [path for path in (out, *out.parents) if not os.path.exists(path)]
        self._taken: list[pathlib.Path] = []  # files of `out` that are this one's
        self._done = False

    def make(self) -> None:
        """Make `place`, and look whether it can be written to. Raises UserError."""
        try:
            self.place.mkdir(parents=True)
            storage.write_text(self.place / "probe", "")
            (self.place / "probe").unlink()
        except OSError as error:
            raise UserError(f"cannot write to --out {self.name}: {reason(error)}") from None

    def finish(self) -> None:
        """Let `out` be what was made, unless another is there by now. Raises UserError."""
        try:
            if self.inside:
                self._move()
            else:
                os.rename(self.place, self.out)
                storage.flush(self.out.parent)
        except OSError as error:
            if error.errno in (errno.EEXIST, errno.ENOTEMPTY):
                raise UserError(f"another prepare has made --out {self.name} meanwhile; this one is dropped") from None
            raise UserError(f"cannot write to --out {self.name}: {reason(error)}") from None
        self._done = True

    def _move(self) -> None:
        """Move the files; the manifest, which says that all is there, comes last.

        Each other name is taken before, if it is free, by all in one order. So the first name that two have in common decides
        between them: that of the tokenizer at the latest.
        """
        *names, manifest = sorted(os.listdir(self.place), key=lambda name: (name == "manifest.json", name))
        for name in names:
            os.close(os.open(self.out / name, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
            self._taken.append(self.out / name)
            os.rename(self.place / name, self.out / name)
        self._taken.append(self.out / manifest)
        os.rename(self.place / manifest, self.out / manifest)
        storage.flush(self.out)
        shutil.rmtree(self.place, ignore_errors=True)

    def undo(self) -> None:
        """Remove what was made, and the folders above that are new, as far as they are empty then."""
        for path in reversed(self._taken):  # the manifest first: what is left is no corpus
            with contextlib.suppress(OSError):
                path.unlink()
        if self._done and not self.inside:
            shutil.rmtree(self.out, ignore_errors=True)
        shutil.rmtree(self.place, ignore_errors=True)
        for path in self._new:
            with contextlib.suppress(OSError):
                path.rmdir()
