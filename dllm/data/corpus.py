"""A prepared corpus: manifest.json, tokenizer.json and shards of tokens in a folder.

The manifest holds: format, kind (tokenizer), vocabulary, dtype, tokenizer (sha256 of tokenizer.json), and for each split
tokens, bytes (of text) and shards, each {"name", "start", "stop", "sha256"} with its token range in the split. A split of
pairs (pairs.py) has pairs, how many, its shards too, and longest, the tokens of the longest one with <sep> and <end>. Text with
labels has content, "tags", "classes" or "transcripts", labels, their names in the order of their numbers, and records for
pairs. Where the vocabulary was made of private counts, `counts` says how (private_counts.py).
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import pathlib
import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ..comm.messages import allgather
from ..comm.replicas import Domains
from ..comm.runtime import agree, check_same, together
from ..config import StorageConfig, is_private, path_of_rank
from ..errors import UserError, shown
from ..files import storage
from ..kernels.softmax import IGNORE
from ..kernels.types import Array
from ..remote.locate import RemoteFolder, cache_folder, is_url, open_folder
from .checked_tokens import checked_labels
from .embedded import embedded_corpus
from .label_names import hash_of
from .placing import ShardFile, shard_file
from .private_counts import check_described
from .shards import FORMAT, FRAME_DTYPE, LABELLED, LABELS_FORMAT, columns, read_shard
from .tokenizer_files import load_tokenizer, tokenizer_hash

if TYPE_CHECKING:
    from mpi4py import MPI

    from ..comm.node_info import NodeInfo

MOST = 1 << 48  # tokens or bytes of a split
SMALL_FILES = ("tokenizer.json", "manifest.json")  # what each disk has of a corpus
KEYS = ("format", "kind", "vocabulary", "dtype", "tokenizer", "splits")


class Corpus:
    """A prepared folder, opened: its manifest checked and its tokenizer loaded. Raises UserError.

    The shards need not be there: supply.py brings those that a rank reads.

    Parameters
    ----------
    folder : path
    private : bool
        Of this rank alone: nothing of it is told, given to others or asked for.
    store : callable, optional
        Opens the store that the folder comes from.

    Attributes
    ----------
    content : str
        "text", "pairs", "tags", "classes" or "transcripts".
    labels : list of str
        Names of labels by number, of transcripts letters; none of text and pairs.
    features : int
        Numbers in a frame of sound; 0: records are made of tokens.
    """

    def __init__(
        self, folder: str | os.PathLike[str], private: bool = False, store: Callable[[], RemoteFolder] | None = None
    ) -> None:
        self.folder, self.private, self.store = pathlib.Path(folder), private, store
        if not self.folder.is_dir():
            raise UserError(f"there is no prepared corpus at {folder}; make one with python -m dllm.prepare")
        path = self.folder / "manifest.json"
        self.manifest: dict[str, Any] = storage.read_json(path, KEYS)
        reads = LABELS_FORMAT if "content" in self.manifest else FORMAT
        if self.manifest["format"] != reads:
            raise UserError(f"{path} has format {self.manifest['format']}, this version reads {reads}; prepare it anew")
        self.tokenizer = load_tokenizer(self.folder)
        self.content: str = self.manifest.get("content", "pairs" if self.tokenizer.pairs else "text")
        self.labels: list[str] = self.manifest.get("labels", [])
        self.features: int = self.manifest.get("features", 0)
        self._check(path)
        self.columns = columns(self.content, self.manifest["dtype"], self.features)
        self.dtype: np.dtype[Any] = np.dtype(self.manifest["dtype"])
        self.vocabulary: int = self.manifest["vocabulary"]
        self.tokenizer_hash = tokenizer_hash(self.tokenizer)
        same = self.tokenizer_hash == self.manifest["tokenizer"] and [*self.tokenizer.labels] == self.labels
        if not same or self.tokenizer.size != self.vocabulary:
            raise UserError(f"{self.folder}/tokenizer.json is not the one its manifest names; prepare the data anew")
        self.hash = hashlib.sha256(json.dumps(self.manifest, sort_keys=True).encode()).hexdigest()
        self._sound: dict[str, tuple[int, ...]] = {}  # name of a shard -> what its file looked like when it was sound

    @property
    def unit(self) -> str:
        """What the manifest calls records; "": it is running text."""
        return "" if self.content == "text" else "pairs" if self.content == "pairs" else "records"

    def _check(self, path: pathlib.Path) -> None:
        """The manifest's inner structure."""
        try:
            if "content" in self.manifest:
                _check_labels(self.content, self.labels, self.tokenizer.pairs)
            if type(self.features) is not int or self.features != self.tokenizer.bands or (self.features and not self.labels):
                raise ValueError(f"its features are {shown(self.features)}")
            if self.manifest["dtype"] not in ((FRAME_DTYPE.name,) if self.features else ("uint8", "uint16", "uint32")):
                raise ValueError(f"its dtype is {self.manifest['dtype']}")
            np.dtype(self.manifest["dtype"]).type(self.manifest["vocabulary"] - 1)
            if "counts" in self.manifest:
                check_described(self.manifest["counts"])
            if type(self.manifest["vocabulary"]) is not int:
                raise ValueError("its vocabulary is no whole number")
            for split, entry in self.manifest["splits"].items():
                shards = entry["shards"]
                _check_counts(split, entry, "tokens", "bytes", *((self.unit, "longest") if self.unit else ()))
                for part in shards:
                    _check_counts(split, part, "start", "stop", *((self.unit,) if self.unit else ()))
                starts, stops = ([part[key] for part in shards] for key in ("start", "stop"))
                if [*starts, entry["tokens"]] != [0, *stops] or entry["bytes"] < 0:
                    raise ValueError(f"split '{split}' does not add up")
                if self.unit:
                    _check_records(split, entry, self.unit)
                for part in shards:
                    plain = re.fullmatch(r"[\w-][\w.-]{,199}", part["name"]) and re.fullmatch("[0-9a-f]{64}", part["sha256"])
                    if not (plain and 0 <= part["start"] <= part["stop"]):
                        raise ValueError(f"a shard of split '{split}' is not described")
        except KeyError as error:
            raise UserError(f"{path} has no {error}; prepare the data anew") from None
        except (AttributeError, TypeError, ValueError, OverflowError) as error:
            raise UserError(f"{path} is not a manifest of dllm.prepare ({error}); prepare the data anew") from None

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
            raise UserError(
                f"the vocabulary of {self.folder} is not the one that {other} was trained with; "
                f"dllm.prepare --tokenizer-from {other} makes a corpus that has it"
            )

    def check_labels(self, labels: Sequence[str], other: str | os.PathLike[str]) -> None:
        """Raise UserError where these are not the labels that `other` was trained with."""
        if labels and [*labels] != self.labels:
            raise UserError(f"the labels of {self.folder} are not the {len(labels)} that {other} was trained with")

    def files(self, split: str | None = None, start: int = 0, stop: int = MOST) -> list[ShardFile]:
        """The shards that hold tokens [start, stop) of a split; None: those of all splits. Raises UserError."""
        splits = self.manifest["splits"] if split is None else [split]
        return [shard_file(part, self.columns) for name in splits for part in self._shards(name, start, stop)]

    def verify(self, split: str, start: int, stop: int) -> None:
        """Check every shard that holds tokens of [start, stop), as `check` does. Raises UserError."""
        for file in self.files(split, start, stop):
            self.check(file)

    def check(self, file: ShardFile) -> None:
        """Raise UserError where the file of a shard is not sound. It is hashed once, and again only if it is another then."""
        path = self.folder / file.name
        looks = _looks(path)
        if looks is None or self._sound.get(file.name) != looks:
            storage.check_file(path, file.sha256, file.least, file.most)
            self.trust(file, looks)

    def trust(self, file: ShardFile, looks: tuple[int, ...] | None = None) -> None:
        """Take the file of a shard for sound, since its hash is known to be right."""
        looks = looks or _looks(self.folder / file.name)
        if looks is not None:
            self._sound[file.name] = looks

    def read(self, split: str, start: int, stop: int) -> Array:
        """Tokens [start, stop) of a split, (n,) int64. Opens only the shards that hold them. Raises UserError."""
        tokens = self._read(split, start, stop, "tokens").astype(np.int64)
        if tokens.size and tokens.max() >= self.vocabulary:
            raise UserError(f"{self.folder}: split '{split}' has a token beyond its vocabulary of {self.vocabulary}")
        return tokens

    def read_frames(self, split: str, start: int, stop: int) -> Array:
        """Frames [start, stop) of a split, (n, features) float32. Raises UserError."""
        frames = self._read(split, start, stop, "frames").reshape(-1, self.features).astype(np.float32)
        if not np.isfinite(frames).all():
            raise UserError(f"{self.folder}: split '{split}' has frames that are no numbers")
        return frames

    def read_tags(self, split: str, start: int, stop: int) -> Array:
        """Labels of tokens [start, stop) of a split, (n,) int64, -1 for none. Raises UserError."""
        return self._checked_labels(split, self._read(split, start, stop, "labels").astype(np.int64))

    def read_records(self, split: str, shard: Mapping[str, Any]) -> tuple[Array, Array]:
        """Of the records of a shard where in the split each begins and ends, (2,n) int64, and classes, (n,) int64, else none.

        shard : as the manifest has it

        Raises UserError.
        """
        path, count = self.folder / shard["name"], shard["records"]
        ends = read_shard(path, self.columns, shard, "ends", 0, count)
        lengths = np.diff(ends, prepend=0)
        if count and not (lengths.min() > 0 and lengths.max() <= self.split(split)["longest"]):
            raise UserError(f"{path}: its records are not as long as the manifest says; prepare the data anew")
        if (ends[-1] if count else 0) != shard["stop"] - shard["start"]:
            raise UserError(f"{path}: its records do not add up; prepare the data anew")
        labels: Array = np.empty(0, np.int64)
        if self.content == "classes":
            labels = read_shard(path, self.columns, shard, "labels", 0, count).astype(np.int64)
        return np.stack([ends - lengths, ends]) + shard["start"], self._checked_labels(split, labels)

    def _checked_labels(self, split: str, labels: Array) -> Array:
        if labels.size and not (labels.min() >= IGNORE and labels.max() < len(self.labels)):
            raise UserError(f"{self.folder}: split '{split}' has a label that is none of its {len(self.labels)}")
        return labels

    def _read(self, split: str, start: int, stop: int, name: str) -> Array:
        """Rows (n, ...) of a dataset that has one for each token. Opens only the shards that hold them. Raises UserError."""
        parts = []
        for shard in self._shards(split, start, stop):
            first, last = max(start - shard["start"], 0), min(stop, shard["stop"]) - shard["start"]
            parts.append(read_shard(self.folder / shard["name"], self.columns, shard, name, first, last))
        found: Array = np.concatenate(parts) if parts else np.empty(0, self.columns[name].dtype)
        return found

    def _shards(self, split: str, start: int, stop: int) -> list[dict[str, Any]]:
        return [part for part in self.split(split)["shards"] if part["start"] < stop and part["stop"] > start]


def _check_counts(split: str, entry: dict[str, Any], *names: str) -> None:
    """Raise ValueError where a number of a manifest is none that a text has: True and 1.0 are equal to 1, but no counts."""
    for name in names:
        if type(entry[name]) is not int or not 0 <= entry[name] <= MOST:
            raise ValueError(f"{name} of split '{split:.40}' is {shown(entry[name])}")


def _check_labels(content: Any, labels: Any, pairs: bool) -> None:
    """Raise ValueError where a manifest's content and labels are none that prepare writes."""
    if content not in LABELLED or pairs:
        raise ValueError(f"its content is {shown(content)}")
    checked_labels(labels)


def _check_records(split: str, entry: dict[str, Any], unit: str) -> None:
    count = sum(part[unit] for part in entry["shards"])
    if not (entry[unit] == count > 0 and 0 < entry["longest"] <= entry["tokens"] - (unit == "pairs")):
        raise ValueError(f"the {unit} of split '{split}' do not add up")


def _looks(path: pathlib.Path) -> tuple[int, ...] | None:
    """What tells a file from the one that took its place, None where there is none."""
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino


def open_corpus(
    comm: MPI.Comm,
    node: NodeInfo,
    path: str,
    progress: Callable[[str], None],
    settings: StorageConfig | None = None,
) -> Corpus:
    """This rank's Corpus. Collective. Raises UserError on all ranks.

    Where a disk lacks the manifest and the vocabulary, it gets them from a rank that has them, or from the store.

    Parameters
    ----------
    path
        A folder; one for each rank where it has {rank}; an ipfs:// or swarm:// URL of one; or "", the embedded corpus.
    progress
        Told a line on what is being prepared.
    settings
        How stores are reached.
    """
    if is_private(path):
        corpus = agree(comm, Corpus, path_of_rank(path, comm.rank), True)
        alike = {"content": corpus.content, "labels (the sha256 of their names)": hash_of(corpus.labels)}
        check_same(comm, alike | {"features": corpus.features})  # they shape the model
        return corpus
    if not path:
        return agree(comm, Corpus, embedded_corpus(comm, node.comm, progress))
    folder, store = pathlib.Path(path), None
    if is_url(path):
        folder, store = cache_folder(path), functools.partial(open_folder, path, settings)
    _spread_manifest(comm, folder, store)
    corpus = agree(comm, Corpus, folder, False, store)
    check_same(comm, {"corpus": corpus.hash})
    return corpus


def _make_folder(folder: pathlib.Path, files: Mapping[str, str]) -> None:
    """A corpus's folder with these files, the last one last, whether there is one already or not. Raises OSError."""
    with contextlib.ExitStack() as stack:
        place = folder if folder.is_dir() else stack.enter_context(storage.atomic_folder(folder))
        for name, text in files.items():
            storage.write_text(place / name, text)


def _spread_manifest(comm: MPI.Comm, folder: pathlib.Path, store: Callable[[], RemoteFolder] | None) -> None:
    """Have each disk hold the small files: those of the lowest rank that has some, else of the store. Collective."""
    there = all(os.path.isfile(folder / name) for name in SMALL_FILES)
    has = allgather(comm, there, bool)
    if all(has) or not (any(has) or store):  # where nobody has them, opening says so
        return
    source, told = [*has, True].index(True) % comm.size, dict[str, str]()
    with together(comm):
        if comm.rank == source and there:
            Corpus(folder)  # what is not sound goes nowhere
            told = {name: storage.read_text(folder / name, storage.LARGEST_JSON) for name in SMALL_FILES}
        elif comm.rank == source and store:
            remote = store()
            told = {name: remote.read(name, storage.LARGEST_JSON).decode(errors="replace") for name in SMALL_FILES}
    everything = allgather(comm, told, dict[str, str])[source]
    files = {name: everything[name] for name in SMALL_FILES if name in everything}  # and no other, whatever a rank says
    domains = Domains.find(comm, folder)
    with together(comm):
        if domains.leads and not there:
            _make_folder(folder, files)
