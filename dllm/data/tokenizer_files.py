"""tokenizer.json in the folder of a corpus or a run, and the hash that names a vocabulary.

In a model folder it is dllm_tokenizer.json, for other programs know tokenizer.json in another form (exchange/hugging_face.py).
Older model folders have no such file.
"""

from __future__ import annotations

import hashlib
import json
import os
import pathlib

from ..errors import UserError
from ..files import storage
from ..remote import locate
from . import tokenizers

TOKENIZER, OF_MODEL = "tokenizer.json", "dllm_tokenizer.json"


def save_tokenizer(folder: str | os.PathLike[str], tokenizer: tokenizers.Tokenizer, name: str = TOKENIZER) -> None:
    """Write tokenizer.json, or OF_MODEL. Raises OSError; UserError where `load_tokenizer` would refuse it."""
    storage.write_json(pathlib.Path(folder, name), tokenizer.to_json(), storage.LARGEST_JSON)


def tokenizer_file(folder: str | os.PathLike[str]) -> pathlib.Path:
    """The file that holds the tokenizer of a folder, which may be an URL; it may not be there. Raises UserError."""
    if not locate.is_url(folder):
        return pathlib.Path(folder, OF_MODEL if os.path.lexists(os.path.join(folder, OF_MODEL)) else TOKENIZER)
    try:  # corpora and runs have this one alone, and nothing else is to be asked for
        path = locate.local_copy(locate.join(folder, TOKENIZER))
        storage.read_json(path, ["kind"])
        return path
    except UserError as error:
        try:
            return locate.local_copy(locate.join(folder, OF_MODEL))
        except UserError:
            raise error from None


def load_tokenizer(folder: str | os.PathLike[str]) -> tokenizers.Tokenizer:
    """The tokenizer of a folder, which may be an URL. Raises UserError."""
    path = tokenizer_file(folder)
    return tokenizers.load(storage.read_json(path, ["kind"]), path)


def tokenizer_hash(tokenizer: tokenizers.Tokenizer) -> str:
    """Names a vocabulary: equal for two corpora if and only if their tokens mean the same, whatever labels they have."""
    value = tokenizer.to_json()
    value.pop("labels", None)
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
