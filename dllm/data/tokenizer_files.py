"""tokenizer.json in the folder of a corpus, a run or a model, and the hash that names a vocabulary.

A model of labels has their names there, too, in the order of their numbers: "labels" beside what the tokenizer says of itself.
"""

from __future__ import annotations

import hashlib
import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any

from ..errors import UserError
from ..files import storage
from ..remote import locate
from . import tokenizers
from .label_files import problem_of_label
from .shards import MOST_LABELS


def save_tokenizer(folder: str | os.PathLike[str], tokenizer: tokenizers.Tokenizer) -> None:
    """Write tokenizer.json. Raises OSError; UserError where `load_tokenizer` would refuse it."""
    value = tokenizer.to_json() | ({"labels": [*tokenizer.labels]} if tokenizer.labels else {})
    storage.write_json(pathlib.Path(folder, "tokenizer.json"), value, storage.LARGEST_JSON)


def load_tokenizer(folder: str | os.PathLike[str]) -> tokenizers.Tokenizer:
    """The tokenizer of a folder, which may be an URL. Raises UserError."""
    path = locate.local_copy(locate.join(folder, "tokenizer.json"))
    return of_json(storage.read_json(path, ["kind"]), path)


def of_json(value: Mapping[str, Any], source: str | os.PathLike[str]) -> tokenizers.Tokenizer:
    """The tokenizer of what tokenizer.json holds, which `source` names, with its labels. Raises UserError."""
    tokenizer, labels = tokenizers.load(value, source), value.get("labels", [])
    if not (isinstance(labels, list) and len(labels) <= MOST_LABELS and all(isinstance(label, str) for label in labels)):
        raise UserError(f"{source} has labels that are no list of names")
    for problem in filter(None, map(problem_of_label, labels)):
        raise UserError(f"{source} has a label that {problem}")
    if len(set(labels)) < len(labels):
        raise UserError(f"{source} has a label twice")
    tokenizer.labels = labels
    return tokenizer


def tokenizer_hash(tokenizer: tokenizers.Tokenizer) -> str:
    """Names a vocabulary: equal for two corpora if and only if their tokens mean the same. Labels are not in it."""
    return hashlib.sha256(json.dumps(tokenizer.to_json(), sort_keys=True).encode()).hexdigest()
