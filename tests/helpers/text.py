"""Text that every machine has."""

import pathlib
import sysconfig

PACKAGES = (
    "asyncio", "collections", "concurrent", "email", "http", "importlib", "json", "logging", "unittest", "urllib", "xml",
)  # fmt: skip


def standard_library(size):
    """So many bytes of ASCII: sources of packages of the standard library, in the order of their files' names.

    The order mixes the packages, so that the beginning and the end are alike.
    """
    root = pathlib.Path(sysconfig.get_paths()["stdlib"])
    files = [path for package in PACKAGES for path in (root / package).rglob("*.py") if path.parent.name != "test"]
    sources = (path.read_bytes() for path in sorted(files, key=lambda path: (path.name, path)))
    found = b"\n".join(source for source in sources if source.isascii())
    assert len(found) >= size, f"the standard library in {root} has only {len(found)} bytes in {', '.join(PACKAGES)}"
    return found[:size]
