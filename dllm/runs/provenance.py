"""What a model was trained on, one text after the other, as it stands in the manifest of a checkpoint."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any, TypeAlias

import msgspec
import numpy as np

from ..comm.messages import total
from ..errors import UserError

if TYPE_CHECKING:
    from mpi4py import MPI

    from ..data.corpus import Corpus

MOST = 1000  # texts of one model

Digest: TypeAlias = Annotated[str, msgspec.Meta(pattern="^([0-9a-f]{64})?$")]
Count: TypeAlias = Annotated[int, msgspec.Meta(ge=0, le=2**53)]


class Text(msgspec.Struct, frozen=True):
    """A corpus that a model was trained on."""

    corpus: Digest  # sha256 of its manifest; "": unknown, or not to be told
    train: Digest = ""  # names the text for training: an epoch of another one begins anew
    valid: Digest = ""  # names the text for validation, to which the best loss belongs; "": there is none
    tokens: Count = 0  # of all ranks, that training has predicted


def text_of(comm: MPI.Comm, corpus: Corpus) -> Text:
    """The Text of a corpus, of which nothing was read yet. Collective.

    Private texts are named by the sum of their sizes, which all ranks know; others by the hashes of their shards.
    """
    entries = [corpus.manifest["splits"].get(split, {"tokens": 0, "shards": []}) for split in ("train", "valid")]
    names: list[Any] = [[part["sha256"] for part in entry["shards"]] for entry in entries]
    if corpus.private:
        names = total(comm, np.array([entry["tokens"] for entry in entries])).tolist()
    train, valid = (_digest([corpus.tokenizer_hash, name]) if name else "" for name in names)
    return Text("" if corpus.private else corpus.hash, train, valid)


def is_same(text: Text, other: Text) -> bool:
    """Whether both are one corpus, whatever was read of it."""
    return text == msgspec.structs.replace(other, tokens=text.tokens)


def with_text(before: Sequence[Text], text: Text) -> list[Text]:
    """What a model was trained on, and `text` that it is trained on now; how much of it the scalars of its State say."""
    return [*before[1 - MOST :], text]


def _digest(facts: Any) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def parse(values: Any) -> list[Text]:
    """The texts that a file names, the newest last. Raises UserError."""
    try:
        found: list[Text] = msgspec.convert(values, Annotated[list[Text], msgspec.Meta(max_length=MOST)])
    except (ValueError, RecursionError):
        raise UserError("does not say what the model was trained on") from None
    return found


def plain(texts: Sequence[Text]) -> list[dict[str, Any]]:
    """What `parse` reads."""
    found: list[dict[str, Any]] = msgspec.to_builtins(texts)
    return found
