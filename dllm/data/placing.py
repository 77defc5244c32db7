"""Which disk holds which shards of a corpus, where ranks do not share one."""

from __future__ import annotations

import pathlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from ..comm.replicas import Domains, File
from ..comm.upkeep import Kept
from ..files import hdf5

SMALL = 64 << 20  # bytes of tokens: a split of no more lies on every disk, so that a host alone can go on and measure


class Store(Protocol):
    """Files of a folder elsewhere, checked as they come in."""

    def read(self, name: str, most: int) -> bytes:
        """The bytes of a file of at most `most` bytes. Raises UserError."""

    def fetch(self, name: str, target: pathlib.Path, most: int | None = None) -> None:
        """Make the file `target` of one of at most `most` bytes, whole or not at all. Raises UserError."""


@dataclass(frozen=True)
class ShardFile(File):
    """The file of a shard."""

    least: int  # bytes that it has at least


def shard_file(part: Mapping[str, Any], dtype: str) -> ShardFile:
    """That of a shard as a manifest describes it; its tokens have `dtype`."""
    size = _bytes([part], dtype)
    return ShardFile(part["name"], part["sha256"], hdf5.most_bytes(size), size)


def wanted_here(manifest: Mapping[str, Any], domains: Domains, copies: int) -> set[str]:
    """Names of the shards that this rank's disk shall hold.

    Small splits lie on every disk; of others each shard lies on `copies` disks. No copies: 0.
    """
    wanted, here = set[str](), domains.of[domains.rank]
    for entry in manifest["splits"].values() if copies else ():
        small = _bytes(entry["shards"], manifest["dtype"]) <= SMALL
        names = (part["name"] for part in entry["shards"])
        wanted.update(name for name in names if small or here in domains.holders(name, copies))
    return wanted


def kept_shards(folder: pathlib.Path, manifest: Mapping[str, Any], domains: Domains, copies: int) -> Kept:
    """The shards of a corpus, to look after. domains : of its folder"""
    files, wanted = list[File](), list[int]()
    for entry in manifest["splits"].values():
        small = _bytes(entry["shards"], manifest["dtype"]) <= SMALL
        files += [shard_file(part, manifest["dtype"]) for part in entry["shards"]]
        wanted += [len(domains.leaders) if small else copies] * len(entry["shards"])
    return Kept(domains, folder, files, wanted)


def _bytes(parts: Iterable[Mapping[str, Any]], dtype: str) -> int:
    tokens: int = sum(part["stop"] - part["start"] for part in parts)
    return tokens * np.dtype(dtype).itemsize
