"""Where a user's programs keep what they make once, on any machine and for users without a home."""

import contextlib
import os
import pathlib
import stat
import tempfile


def user_cache() -> pathlib.Path | None:
    """The folder for what this user's programs make once: XDG_CACHE_HOME, ~/.cache, or one below the temporary folder.

    The last where the user has no home; None where somebody else has made that.
    """
    named, home = os.environ.get("XDG_CACHE_HOME"), os.path.expanduser("~")
    if named:
        return pathlib.Path(named)
    return pathlib.Path(home, ".cache") if os.path.isabs(home) else temporary_cache()


def temporary_cache() -> pathlib.Path | None:
    """The same below the temporary folder, for this user alone; None where it cannot be, since what it holds is run."""
    folder = pathlib.Path(tempfile.gettempdir(), f"dllm-cache-{os.getuid()}")
    with contextlib.suppress(OSError):
        folder.mkdir(mode=0o700, exist_ok=True)
        found = folder.lstat()
        if stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid() and not found.st_mode & 0o022:
            return folder
    return None
