"""Text, pairs of texts, or texts with labels, to a prepared corpus, the work shared by all ranks.

Every rank reads all text and writes its shards to the disk that it sees. Where ranks do not share one, the leader of each disk
makes the folder there, shards are copied, and in the end each disk has the manifest and the vocabulary.

With private text every rank prepares its own folder, and nothing is copied. What travels for the vocabulary stands in
vocabulary.py; text never does.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import os
import pathlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from ..comm import messages
from ..comm.replicas import Domains
from ..comm.runtime import agree, check_same, together
from ..comm.transfers import replicate
from ..config import StorageConfig
from ..errors import UserError
from ..files import storage
from . import shards, vocabulary
from .drawing import Drawing
from .label_files import LabelledFile
from .labelling import LabelledPiece, Labelling
from .new_folder import NewFolder
from .pairs import Pairing, PairPiece
from .placing import shard_files, wanted_here
from .private_counts import PrivateCounting
from .source_names import readable_everywhere
from .text import Path, Span, TextFile, TextPiece, as_file, examples_of_text, plan_text
from .tokenizer_files import save_tokenizer, tokenizer_hash
from .tokenizers import KINDS, Tokenizer
from .vocabulary import Vocabulary

if TYPE_CHECKING:
    from mpi4py import MPI

Pieces = list[TextPiece] | list[PairPiece] | list[LabelledPiece]  # of a shard
Plan = list[list[TextPiece]] | list[list[PairPiece]] | list[list[LabelledPiece]]  # of a split


def prepare_corpus(
    comm: MPI.Comm,
    splits: Mapping[str, Sequence[Any]],
    wanted: Vocabulary,
    out: str | os.PathLike[str],
    private: bool = False,
    progress: Callable[[str], None] = lambda message: None,
    drawing: Drawing | None = None,
    copies: int = StorageConfig.copies,
) -> None:
    """Write a corpus to the folder `out`, on every disk. Collective. Raises UserError on all ranks; then nothing is left of it.

    Parameters
    ----------
    splits : dict
        split -> paths, TextFiles or Spans; of pairs (source, target) paths or TextFiles, of labels LabelledFiles; with
        private=True this rank's own.
    wanted
        Where the vocabulary comes from.
    out
        A folder that is empty or not there, on each disk; with private=True this rank's own.
    progress : callable
        Told a line on what is being done.
    drawing
        Of pairs, or of texts with labels.
    copies
        Disks that have each shard, where ranks do not share one; of a small split all have. 0: no copies.
    """
    domains = Domains(0, (0,), ("",)) if private else Domains.find(comm, os.path.realpath(out))
    token = os.urandom(8).hex() if private else messages.broadcast(comm, os.urandom(8).hex(), str)
    if not private:
        readable_everywhere(comm, domains.hosts, (file for paths in splits.values() for file in _paths(paths)))
    if drawing:
        splits = {**splits, **dict.fromkeys(drawing.held_out, splits["train"])}
    with contextlib.ExitStack() as undo:
        with together(comm):
            folder = NewFolder(pathlib.Path(out), token)
            work = _Preparation(comm, domains, folder.place, 0 if private else copies, progress, drawing)
            plans = {split: work.plan(split, paths) for split, paths in splits.items()}
            empty = next((split for split, plan in plans.items() if not plan), None)
            if empty:
                raise UserError(_nothing(empty, splits[empty]))
            if domains.leads:
                undo.callback(folder.undo)
        if not private:
            check_same(comm, {f"{split} text": _described(plan) for split, plan in plans.items()})
        with together(comm):  # after all ranks have seen what is there, so that the last to leave removes parents they share
            if domains.leads:
                folder.make()
        facts = work.facts(plans, wanted, private)
        tokenizer = work.tokenizer(plans, wanted)
        with together(comm):
            tokenizer.labels = tuple(facts.get("labels", ()))  # not those of the folder that it may be taken from
            written = work.write_shards(plans, tokenizer)
        everyones = [written] if private else messages.allgather(comm, written, list[_Shard])
        with together(comm):
            manifest = work.manifest(plans, tokenizer, list(itertools.chain(*everyones)), facts)
        if not domains.shared:
            work.copy(manifest, {shard.name for shard in written})
        with together(comm):
            if domains.leads:
                save_tokenizer(work.out, tokenizer)
                storage.write_json(work.out / "manifest.json", manifest)
        for first in (True, False):  # whoever is first on the disk of rank 0 is it on all
            with together(comm):
                if domains.leads and first == (domains.rank == 0):
                    folder.finish()
        undo.pop_all()


class _Shard(NamedTuple):
    """One that was written."""

    split: str
    number: int
    name: str
    tokens: int
    sha256: str
    bytes: int  # of text
    figures: list[tuple[int, int]]  # of each piece of records: how many, tokens of the longest
    left_out: list[list[int]]  # of each piece of records the places of those that are too long


class _Preparation:
    """What this rank does for a corpus: its share of the shards.

    domains : of the ranks that write one folder, be it on one disk or on several
    """

    def __init__(
        self,
        comm: MPI.Comm,
        domains: Domains,
        out: pathlib.Path,
        copies: int,
        say: Callable[[str], None],
        drawing: Drawing | None,
    ) -> None:
        self.comm, self.domains, self.out, self.copies, self.say, self.drawing = comm, domains, out, copies, say, drawing

    def plan(self, split: str, paths: Sequence[Any]) -> Plan:
        """Of a split, the same on every rank. Raises UserError."""
        return plan_text(paths) if self.drawing is None else self.drawing.plan(paths, split, self.say)

    def facts(self, plans: dict[str, Plan], wanted: Vocabulary, private: bool) -> dict[str, Any]:
        """What the manifest says of labels and of private counts. Collective. Raises UserError."""
        example = self.drawing.unit if self.drawing else "line"
        facts = {"counts": wanted.counting.described(example)} if wanted.counting else {}
        if not isinstance(self.drawing, Labelling):
            return facts
        mine: Iterator[Any] = (piece for _, pieces in self._my_share("train", plans["train"], "labels of") for piece in pieces)
        return facts | {"content": self.drawing.content, "labels": self.drawing.agree(self.comm, mine, private)}

    def tokenizer(self, plans: dict[str, Plan], wanted: Vocabulary) -> Tokenizer:
        """The tokenizer of all ranks. Collective. Raises UserError."""
        pairs = isinstance(self.drawing, Pairing)
        if wanted.folder:
            tokenizer = vocabulary.take(self.comm, wanted.folder, pairs, self.say)
            self._warm_up(type(tokenizer))
            return tokenizer
        self._warm_up(KINDS[wanted.kind])
        if KINDS[wanted.kind].fixed:
            return agree(self.comm, wanted.of_counts, {}, pairs)
        with together(self.comm):
            kind, counting = KINDS[wanted.kind], wanted.counting
            counts = self._count_privately(plans["train"], kind, counting) if counting else self._count(plans, kind)
        return vocabulary.build(self.comm, wanted, counts, pairs, self.say)

    def _warm_up(self, kind: type[Tokenizer]) -> None:
        for first in (True, False):  # one on each disk compiles, the others find it done
            with together(self.comm):
                if first == self.domains.leads:
                    kind.warm_up()

    def _count(self, plans: dict[str, Plan], kind: type[Tokenizer]) -> dict[str, int]:
        """Counts of units in this rank's part of the train text; 0 for those that only its other splits have."""
        counts: Counter[str] = Counter()
        for split, plan in plans.items():
            for _, pieces in self._my_share(split, plan, "counting"):
                for piece in pieces:
                    found = piece.count(kind)
                    counts.update(found if split == "train" else dict.fromkeys(found, 0))
        return counts

    def _count_privately(self, plan: Plan, kind: type[Tokenizer], counting: PrivateCounting) -> dict[str, int]:
        """What this rank may tell of the units of its train text. Its other splits are not looked at."""
        examples = examples_of_text if self.drawing is None else self.drawing.examples
        pieces: Iterator[Any] = (piece for _, pieces in self._my_share("train", plan, "counting") for piece in pieces)
        return counting.release(counting.count(examples(pieces, kind)))

    def write_shards(self, plans: dict[str, Plan], tokenizer: Tokenizer) -> list[_Shard]:
        """Encode and write this rank's shards. Raises UserError, OSError."""
        written, dtype = [], shards.dtype_of(tokenizer)
        for split, plan in plans.items():
            for number, pieces in self._my_share(split, plan, "encoding"):
                path, found, left_out, size = self.out / _name(split, number), [], [], 0
                content = self.drawing.content if self.drawing else "text"
                with shards.ShardWriter(path, dtype, content, tokenizer.bands) as shard:
                    for piece in pieces:
                        encoded = piece.encode(tokenizer)
                        size += encoded.size
                        shard.append(encoded.tokens.astype(dtype), encoded.ends, encoded.labels)
                        if self.drawing:
                            found.append(encoded.figures)
                            left_out.append([*encoded.left_out])
                written.append(_Shard(split, number, path.name, shard.tokens, storage.sha256(path), size, found, left_out))
        return written

    def _my_share(self, split: str, plan: Plan, doing: str) -> Iterator[tuple[int, Pieces]]:
        for number, rank in enumerate(self._writers(split, len(plan))):
            if rank == self.domains.rank:
                self.say(f"{doing} {split}: {number + 1} of {len(plan)}")
                yield number, plan[number]

    def _writers(self, split: str, count: int) -> list[int]:
        """For each shard the rank that makes it: one whose disk shall hold it, so that one copy less must travel."""
        load, writers, of = [0] * len(self.domains.of), list[int](), self.domains.of
        for number in range(count):
            anywhere = self.domains.shared or not self.copies
            homes = of if anywhere else self.domains.holders(_name(split, number), self.copies)
            writers.append(min((rank for rank in range(len(of)) if of[rank] in homes), key=lambda rank: (load[rank], rank)))
            load[writers[-1]] += 1
        return writers

    def copy(self, manifest: dict[str, Any], written: set[str]) -> None:
        """Bring the shards to all disks that shall hold them. Collective. Raises UserError on all ranks.

        written : names of those that this rank has made
        """
        files = [file for file, _ in shard_files(manifest)]
        want = wanted_here(manifest, self.domains, self.copies)
        gone = replicate(self.comm, self.domains, self.out, files, written, want, self.say)
        if gone:
            raise UserError.of_all(f"{self.out / gone[0].name} cannot be read again: its disk has lost what was written")
        disks = len(self.domains.leaders)
        kept = f"each shard is on {min(self.copies, disks)}, those of small splits on all" if self.copies else "no copies"
        self.say(f"{disks} disks: {kept}")

    def manifest(
        self, plans: dict[str, Plan], tokenizer: Tokenizer, shards_of_all: list[_Shard], facts: dict[str, Any]
    ) -> dict[str, Any]:
        """What names the shards of all ranks; it does not depend on who wrote which. Raises UserError.

        facts : what the manifest says beside that
        """
        written = {(shard.split, shard.number): shard for shard in shards_of_all}
        splits = {}
        for split, plan in plans.items():
            start, parts = 0, []
            for number in range(len(plan)):
                shard = written[split, number]
                stop = start + shard.tokens
                parts.append({"name": shard.name, "start": start, "stop": stop, "sha256": shard.sha256})
                start = stop
            size = sum(written[split, number].bytes for number in range(len(plan)))
            splits[split] = {"tokens": start, "bytes": size, "shards": parts}
            if self.drawing:
                found = [written[split, number].figures for number in range(len(plan))]
                for part, numbers in zip(parts, found, strict=True):
                    part[self.drawing.counted] = sum(records for records, _ in numbers)
                splits[split] |= _figures_of_split(split, [both for numbers in found for both in numbers], self.drawing)
                long = [places for number in range(len(plan)) for places in written[split, number].left_out]
                splits[split] |= self.drawing.facts(plan, long, split)
                self._tell_left_out(split, plan, sum(map(len, long)), self.drawing)
        return {
            "format": shards.LABELS_FORMAT if "labels" in facts else shards.FORMAT,
            "kind": tokenizer.kind,
            "vocabulary": tokenizer.size,
            "dtype": shards.dtype_of(tokenizer).name,
            "tokenizer": tokenizer_hash(tokenizer),
            **({"features": tokenizer.bands} if tokenizer.bands else {}),
            **facts,
            "splits": splits,
        }

    def _tell_left_out(self, split: str, plan: Plan, left_out: int, drawing: Drawing) -> None:
        planned = sum(len(piece.numbers) for pieces in plan for piece in pieces if not isinstance(piece, TextPiece))
        if left_out:
            self.say(f"{left_out:,} of {planned:,} {split} {drawing.unit}s are left out: they have {drawing.wrong_size}")


def _name(split: str, number: int) -> str:
    """Of a shard's file."""
    return f"{split}-{number:05d}.h5"


def _paths(parts: Iterable[Any]) -> Iterator[Path]:
    """Where the files of text lie, be they paths, TextFiles, Spans, pairs or LabelledFiles."""
    for part in parts:
        file = part.file if isinstance(part, Span | LabelledFile) else part
        yield from [as_file(file).path] if isinstance(file, str | os.PathLike | TextFile) else _paths(file)


def _nothing(split: str, parts: Sequence[Any]) -> str:
    files = [part.file if isinstance(part, Span | LabelledFile) else part for part in parts[:3]]
    return f"the {split} text is empty: {', '.join(as_file(file).name for file in files)}"


def _described(plan: Plan) -> str:
    """What all ranks must have found alike in the text of a split: its size, and where it is cut."""
    sizes = [piece.size for pieces in plan for piece in pieces]
    return f"{sum(sizes):,} bytes in {len(sizes):,} pieces ({hashlib.sha256(str(sizes).encode()).hexdigest()[:8]})"


def _figures_of_split(split: str, found: list[tuple[int, int]], drawing: Drawing) -> dict[str, int]:
    """What the manifest says of a split's records. Raises UserError where there are none."""
    counts, lengths = zip(*found, strict=True)
    if sum(counts) == 0:
        raise UserError(f"no {drawing.unit} of the {split} files is short enough: --longest must be larger")
    return {drawing.counted: sum(counts), "longest": max(lengths)}
