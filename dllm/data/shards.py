"""A prepared corpus on disk: manifest.json, tokenizer.json and HDF5 shards of tokens.

The manifest holds: format, kind (tokenizer), vocabulary, dtype, tokenizer (sha256 of tokenizer.json), and for each split
tokens, bytes (of text) and shards, each {"name", "start", "stop", "sha256"} with its token range in the split. A split of
pairs (pairs.py) has pairs, how many, its shards too, and longest, the tokens of the longest one with <sep> and <end>.
"""

import hashlib
import json
import pathlib

import numpy as np

from ..errors import UserError
from ..files import hdf5, storage
from . import tokenizers

FORMAT = 1
KEYS = ("format", "kind", "vocabulary", "dtype", "tokenizer", "splits")


class ShardWriter:
    """Appends tokens to one shard file; `with` it, and it is whole under its name or not there."""

    def __init__(self, path, dtype):
        self.path, self.dtype, self.tokens = path, np.dtype(dtype), 0

    def __enter__(self):
        self._whole = hdf5.write_hdf5(self.path)
        options = {"chunks": (1 << 16,), "maxshape": (None,), "fletcher32": True}
        self._data = self._whole.__enter__().create_dataset("tokens", (0,), self.dtype, **options)
        return self

    def append(self, tokens):
        start, self.tokens = self.tokens, self.tokens + len(tokens)
        self._data.resize((self.tokens,))
        self._data[start:] = tokens

    def __exit__(self, *error):
        return self._whole.__exit__(*error)


def token_dtype(vocabulary):
    """The smallest unsigned dtype that holds the vocabulary."""
    return next(np.dtype(kind) for kind in ("u1", "u2", "u4") if vocabulary <= 1 << 8 * np.dtype(kind).itemsize)


def save_tokenizer(folder, tokenizer):
    storage.write_json(pathlib.Path(folder, "tokenizer.json"), tokenizer.to_json())


def load_tokenizer(folder):
    path = pathlib.Path(folder, "tokenizer.json")
    return tokenizers.load(storage.read_json(path, ["kind"]), path)


def tokenizer_hash(tokenizer):
    """Names a vocabulary: equal for two corpora if and only if their tokens mean the same."""
    return hashlib.sha256(json.dumps(tokenizer.to_json(), sort_keys=True).encode()).hexdigest()


class Corpus:
    """A prepared folder, opened: its manifest checked and its tokenizer loaded. Raises UserError."""

    def __init__(self, folder):
        self.folder = pathlib.Path(folder)
        if not self.folder.is_dir():
            raise UserError(f"there is no prepared corpus at {folder}; make one with python -m dllm.prepare")
        path = self.folder / "manifest.json"
        self.manifest = storage.read_json(path, KEYS)
        if self.manifest["format"] != FORMAT:
            raise UserError(f"{path} has format {self.manifest['format']}, this version reads {FORMAT}; prepare it anew")
        self.tokenizer = load_tokenizer(self.folder)
        self._check(path, self.tokenizer.pairs)
        self.dtype, self.vocabulary = np.dtype(self.manifest["dtype"]), self.manifest["vocabulary"]
        self.tokenizer_hash = tokenizer_hash(self.tokenizer)
        if self.tokenizer_hash != self.manifest["tokenizer"] or self.tokenizer.size != self.vocabulary:
            raise UserError(f"{self.folder}/tokenizer.json is not the one its manifest names; prepare the data anew")
        self.hash = hashlib.sha256(json.dumps(self.manifest, sort_keys=True).encode()).hexdigest()

    def _check(self, path, pairs):
        """The manifest's inner structure; pairs: it is one of pairs."""
        try:
            if self.manifest["dtype"] not in ("uint8", "uint16", "uint32"):
                raise ValueError(f"its dtype is {self.manifest['dtype']}")
            np.dtype(self.manifest["dtype"]).type(self.manifest["vocabulary"] - 1)
            for split, entry in self.manifest["splits"].items():
                shards = entry["shards"]
                starts, stops = ([part[key] for part in shards] for key in ("start", "stop"))
                if [*starts, entry["tokens"]] != [0, *stops] or entry["bytes"] < 0:
                    raise ValueError(f"split '{split}' does not add up")
                if pairs:
                    self._check_pairs(split, entry)
                for part in shards:
                    plain = pathlib.Path(part["name"]).name == part["name"] and len(part["sha256"]) == 64
                    if not (plain and 0 <= part["start"] <= part["stop"]):
                        raise ValueError(f"a shard of split '{split}' is not described")
        except KeyError as error:
            raise UserError(f"{path} has no {error}; prepare the data anew") from None
        except (AttributeError, TypeError, ValueError, OverflowError) as error:
            raise UserError(f"{path} is not a manifest of dllm.prepare ({error}); prepare the data anew") from None

    @staticmethod
    def _check_pairs(split, entry):
        count = sum(part["pairs"] for part in entry["shards"])
        if not (entry["pairs"] == count > 0 and 0 < entry["longest"] < entry["tokens"]):
            raise ValueError(f"the pairs of split '{split}' do not add up")

    def split(self, name):
        """The manifest's entry of a split. Raises UserError where there is none."""
        if name not in self.manifest["splits"]:
            there = ", ".join(self.manifest["splits"])
            raise UserError(f"{self.folder} has no split '{name}'; it has {there}")
        return self.manifest["splits"][name]

    def check_vocabulary(self, digest, other):
        """Raise UserError where this is not the vocabulary of hash `digest`, which `other` was trained with."""
        if self.tokenizer_hash != digest:
            raise UserError(f"the vocabulary of {self.folder} is not the one that {other} was trained with")

    def verify(self, split, start, stop):
        """Check the sha256 of every shard that holds tokens of [start, stop). Raises UserError."""
        for shard in self._shards(split, start, stop):
            storage.check_file(self.folder / shard["name"], shard["sha256"])

    def read(self, split, start, stop):
        """Tokens [start, stop) of a split, int64. Opens only the shards that hold them. Raises UserError."""
        parts = []
        for shard in self._shards(split, start, stop):
            length = shard["stop"] - shard["start"]
            inside = slice(max(start - shard["start"], 0), min(stop, shard["stop"]) - shard["start"])
            with hdf5.open_arrays(self.folder / shard["name"], ["tokens"]) as array:
                parts.append(array("tokens", self.dtype, (length,))[inside])
        tokens = np.concatenate(parts).astype(np.int64) if parts else np.empty(0, np.int64)
        if tokens.size and tokens.max() >= self.vocabulary:
            raise UserError(f"{self.folder}: split '{split}' has a token beyond its vocabulary of {self.vocabulary}")
        return tokens

    def _shards(self, split, start, stop):
        return [part for part in self.split(split)["shards"] if part["start"] < stop and part["stop"] > start]
