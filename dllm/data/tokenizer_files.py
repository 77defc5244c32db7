"""tokenizer.json in the folder of a corpus, a run or a model, and the hash that names a vocabulary."""

from __future__ import annotations

import hashlib
import json
import os
import pathlib

from ..files import storage
from ..remote import locate
from . import tokenizers


def save_tokenizer(folder: str | os.PathLike[str], tokenizer: tokenizers.Tokenizer) -> None:
    """Write tokenizer.json. Raises OSError; UserError where `load_tokenizer` would refuse it."""
    storage.write_json(pathlib.Path(folder, "tokenizer.json"), tokenizer.to_json(), storage.LARGEST_JSON)


def load_tokenizer(folder: str | os.PathLike[str]) -> tokenizers.Tokenizer:
    """The tokenizer of a folder, which may be an URL. Raises UserError."""
    path = locate.local_copy(locate.join(folder, "tokenizer.json"))
    return tokenizers.load(storage.read_json(path, ["kind"]), path)


def tokenizer_hash(tokenizer: tokenizers.Tokenizer) -> str:
    """Names a vocabulary: equal for two corpora if and only if their tokens mean the same, whatever labels they have."""
    value = tokenizer.to_json()
    value.pop("labels", None)
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
