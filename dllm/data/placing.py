"""Which disk holds which shards of a corpus, where ranks do not share one."""

from __future__ import annotations

import pathlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ..comm.replicas import Domains, File
from ..comm.upkeep import Kept
from ..files import hdf5
from .shards import Column, columns, rows

SMALL = 64 << 20  # bytes of tokens: a split of no more lies on every disk, so that a host alone can go on and measure


@dataclass(frozen=True)
class ShardFile(File):
    """The file of a shard."""

    least: int  # bytes that it has at least


def shard_file(part: Mapping[str, Any], table: Mapping[str, Column]) -> ShardFile:
    """That of a shard as a manifest describes it. table : its datasets"""
    size = _bytes([part], table)
    return ShardFile(part["name"], part["sha256"], hdf5.most_bytes(size), size)


def shard_files(manifest: Mapping[str, Any]) -> Iterator[tuple[ShardFile, bool]]:
    """Those of a corpus, and of each whether it belongs on every disk, as those of small splits do."""
    table = columns(manifest.get("content", "text"), manifest["dtype"], manifest.get("features", 0))
    for entry in manifest["splits"].values():
        small = _bytes(entry["shards"], table) <= SMALL
        yield from ((shard_file(part, table), small) for part in entry["shards"])


def wanted_here(manifest: Mapping[str, Any], domains: Domains, copies: int) -> set[str]:
    """Names of the shards that this rank's disk shall hold: of large splits each lies on `copies` disks. No copies: 0."""
    here, files = domains.of[domains.rank], shard_files(manifest) if copies else ()
    return {file.name for file, everywhere in files if everywhere or here in domains.holders(file.name, copies)}


def kept_shards(folder: pathlib.Path, manifest: Mapping[str, Any], domains: Domains, copies: int) -> Kept:
    """The shards of a corpus, to look after. domains : of its folder"""
    files, everywhere = zip(*shard_files(manifest), strict=True)
    return Kept(domains, folder, files, [len(domains.leaders) if every else copies for every in everywhere])


def _bytes(parts: Iterable[Mapping[str, Any]], table: Mapping[str, Column]) -> int:
    return sum(rows(part, column) * column.dtype.itemsize * max(1, column.width) for part in parts for column in table.values())
