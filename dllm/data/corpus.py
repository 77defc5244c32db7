"""A prepared corpus: manifest.json, tokenizer.json and shards of tokens in a folder.

The manifest holds: format, kind (tokenizer), vocabulary, dtype, tokenizer (sha256 of tokenizer.json), and for each split
tokens, bytes (of text) and shards, each {"name", "start", "stop", "sha256"} with its token range in the split. A split of
pairs (pairs.py) has pairs, how many, its shards too, and longest, the tokens of the longest one with <sep> and <end>. Where the
vocabulary was made of private counts, `counts` says how (private_counts.py).
"""

from __future__ import annotations

import hashlib
import json
import os
import pathlib
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from ..comm.runtime import agree
from ..config import path_of_rank
from ..errors import UserError, shown
from ..files import hdf5, storage
from ..kernels.types import Array
from .embedded import embedded_corpus
from .private_counts import check_described
from .shards import FORMAT, read_shard
from .tokenizer_files import load_tokenizer, tokenizer_hash

if TYPE_CHECKING:
    from mpi4py import MPI

    from ..comm.node_info import NodeInfo

MOST = 1 << 48  # tokens or bytes of a split
KEYS = ("format", "kind", "vocabulary", "dtype", "tokenizer", "splits")


class Corpus:
    """A prepared folder, opened: its manifest checked and its tokenizer loaded. Raises UserError."""

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = pathlib.Path(folder)
        if not self.folder.is_dir():
            raise UserError(f"there is no prepared corpus at {folder}; make one with python -m dllm.prepare")
        path = self.folder / "manifest.json"
        self.manifest: dict[str, Any] = storage.read_json(path, KEYS)
        if self.manifest["format"] != FORMAT:
            raise UserError(f"{path} has format {self.manifest['format']}, this version reads {FORMAT}; prepare it anew")
        self.tokenizer = load_tokenizer(self.folder)
        self._check(path, self.tokenizer.pairs)
        self.dtype: np.dtype[Any] = np.dtype(self.manifest["dtype"])
        self.vocabulary: int = self.manifest["vocabulary"]
        self.tokenizer_hash = tokenizer_hash(self.tokenizer)
        if self.tokenizer_hash != self.manifest["tokenizer"] or self.tokenizer.size != self.vocabulary:
            raise UserError(f"{self.folder}/tokenizer.json is not the one its manifest names; prepare the data anew")
        self.hash = hashlib.sha256(json.dumps(self.manifest, sort_keys=True).encode()).hexdigest()

    def _check(self, path: pathlib.Path, pairs: bool) -> None:
        """The manifest's inner structure; pairs: it is one of pairs."""
        try:
            if self.manifest["dtype"] not in ("uint8", "uint16", "uint32"):
                raise ValueError(f"its dtype is {self.manifest['dtype']}")
            np.dtype(self.manifest["dtype"]).type(self.manifest["vocabulary"] - 1)
            if "counts" in self.manifest:
                check_described(self.manifest["counts"])
            if type(self.manifest["vocabulary"]) is not int:
                raise ValueError("its vocabulary is no whole number")
            for split, entry in self.manifest["splits"].items():
                shards = entry["shards"]
                _check_counts(split, entry, "tokens", "bytes", *(("pairs", "longest") if pairs else ()))
                for part in shards:
                    _check_counts(split, part, "start", "stop", *(("pairs",) if pairs else ()))
                starts, stops = ([part[key] for part in shards] for key in ("start", "stop"))
                if [*starts, entry["tokens"]] != [0, *stops] or entry["bytes"] < 0:
                    raise ValueError(f"split '{split}' does not add up")
                if pairs:
                    self._check_pairs(split, entry)
                for part in shards:
                    plain = re.fullmatch(r"[\w-][\w.-]{,199}", part["name"]) and re.fullmatch("[0-9a-f]{64}", part["sha256"])
                    if not (plain and 0 <= part["start"] <= part["stop"]):
                        raise ValueError(f"a shard of split '{split}' is not described")
        except KeyError as error:
            raise UserError(f"{path} has no {error}; prepare the data anew") from None
        except (AttributeError, TypeError, ValueError, OverflowError) as error:
            raise UserError(f"{path} is not a manifest of dllm.prepare ({error}); prepare the data anew") from None

    @staticmethod
    def _check_pairs(split: str, entry: dict[str, Any]) -> None:
        count = sum(part["pairs"] for part in entry["shards"])
        if not (entry["pairs"] == count > 0 and 0 < entry["longest"] < entry["tokens"]):
            raise ValueError(f"the pairs of split '{split}' do not add up")

    def split(self, name: str) -> dict[str, Any]:
        """The manifest's entry of a split. Raises UserError where there is none."""
        if name not in self.manifest["splits"]:
            there = ", ".join(self.manifest["splits"])
            raise UserError(f"{self.folder} has no split '{name}'; it has {there}")
        entry: dict[str, Any] = self.manifest["splits"][name]
        return entry

    def check_vocabulary(self, digest: str, other: str | os.PathLike[str]) -> None:
        """Raise UserError where this is not the vocabulary of hash `digest`, which `other` was trained with."""
        if self.tokenizer_hash != digest:
            raise UserError(f"the vocabulary of {self.folder} is not the one that {other} was trained with")

    def verify(self, split: str, start: int, stop: int) -> None:
        """Check the sha256 of every shard that holds tokens of [start, stop). Raises UserError."""
        for shard in self._shards(split, start, stop):
            tokens = shard["stop"] - shard["start"]
            storage.check_file(self.folder / shard["name"], shard["sha256"], hdf5.most_bytes(tokens * self.dtype.itemsize))

    def read(self, split: str, start: int, stop: int) -> Array:
        """Tokens [start, stop) of a split, (n,) int64. Opens only the shards that hold them. Raises UserError."""
        parts = []
        for shard in self._shards(split, start, stop):
            length = shard["stop"] - shard["start"]
            first, last = max(start - shard["start"], 0), min(stop, shard["stop"]) - shard["start"]
            parts.append(read_shard(self.folder / shard["name"], self.dtype, length, first, last))
        tokens: Array = np.concatenate(parts).astype(np.int64) if parts else np.empty(0, np.int64)
        if tokens.size and tokens.max() >= self.vocabulary:
            raise UserError(f"{self.folder}: split '{split}' has a token beyond its vocabulary of {self.vocabulary}")
        return tokens

    def _shards(self, split: str, start: int, stop: int) -> list[dict[str, Any]]:
        return [part for part in self.split(split)["shards"] if part["start"] < stop and part["stop"] > start]


def _check_counts(split: str, entry: dict[str, Any], *names: str) -> None:
    """Raise ValueError where a number of a manifest is none that a text has: True and 1.0 are equal to 1, but no counts."""
    for name in names:
        if type(entry[name]) is not int or not 0 <= entry[name] <= MOST:
            raise ValueError(f"{name} of split '{split:.40}' is {shown(entry[name])}")


def open_corpus(comm: MPI.Comm, node: NodeInfo, path: str, progress: Callable[[str], None]) -> Corpus:
    """This rank's Corpus: the folder `path`, one for each rank where it has {rank}, or, "", the embedded one. Collective.

    progress : told a line on what is being prepared

    Raises UserError on all ranks.
    """
    folder = path_of_rank(path, comm.rank) if path else embedded_corpus(comm, node.comm, progress)
    corpus: Corpus = agree(comm, Corpus, folder)
    return corpus
