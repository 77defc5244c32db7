"""A run whose files lie on disks that ranks do not share, brought to every disk: before it is used, and when it is done."""

from __future__ import annotations

import os
import pathlib
import tomllib
from collections import Counter
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

from ..comm.messages import allgather
from ..comm.replicas import Domains, File, is_sound
from ..comm.runtime import together
from ..comm.transfers import replicate
from ..comm.upkeep import Kept
from ..config import from_dict
from ..errors import UserError, printable
from ..files import storage
from . import checkpoint
from .checkpoint import MANIFEST, Checkpoint

if TYPE_CHECKING:
    from mpi4py import MPI

METRICS = "metrics.jsonl"
SMALL = ("config.toml", "tokenizer.json", METRICS)  # that lie beside the checkpoints
LARGEST = 1 << 26  # bytes of each that travel; a longer record of metrics stays where it is


class Manifest(NamedTuple):
    """What a disk has of a checkpoint."""

    step: int
    seal: str
    best: bool
    valid: str  # names the text for validation


class Shelf(NamedTuple):
    """What a disk has of a run."""

    sizes: dict[str, int]  # of SMALL
    manifests: list[Manifest]


def gather_run(comm: MPI.Comm, run: storage.Path, say: Callable[[str], None], best: bool) -> bool:
    """Bring what it takes to use the run `run` to every disk: a whole checkpoint and what lies beside it. Collective.

    Parameters
    ----------
    comm : MPI.Comm
    run : path
        The same on every rank; where no disk has such a run, or all ranks see one, nothing is done.
    say : callable
        Told what is passed over, damaged or takes long, by all ranks alike.
    best : bool
        The newest best checkpoint, else the newest.

    Returns whether it did something. Raises UserError on all ranks where there is a run, but nobody has all of a checkpoint.
    """
    domains = Domains.find(comm, run)
    if domains.shared or not domains.writable:
        return False
    shelves = _shelves(comm, domains, run)
    if not any("config.toml" in shelf.sizes for shelf in shelves):
        return False
    private = _spread_small(comm, domains, run, shelves)
    _gather_checkpoint(comm, domains, run, _candidates(shelves, best), say, private)
    return True


def spread_checkpoints(comm: MPI.Comm, domains: Domains, run: storage.Path, say: Callable[[str], None]) -> None:
    """Bring the newest checkpoint and the newest best one to every disk, each whole. Collective. Raises UserError on all ranks.

    domains : of the folder
    """
    if domains.shared:
        return
    shelves = _shelves(comm, domains, run)
    for best in (False, True):
        _gather_checkpoint(comm, domains, run, _candidates(shelves, best), say)


def kept_checkpoints(comm: MPI.Comm, domains: Domains, run: storage.Path, copies: int) -> Kept:
    """The files of the newest checkpoint and of the newest best one, to look after. Collective. Raises UserError.

    Every disk has both manifests afterwards.
    """
    shelves = _shelves(comm, domains, run)
    files = dict[str, File]()
    for best in (False, True):
        for manifest, source in _candidates(shelves, best)[:1]:
            text = _manifest(comm, domains, run, manifest.step, source)
            files |= {file.name: file for file in _files(comm, run, manifest.step, text, False)}
    return Kept(domains, pathlib.Path(run), list(files.values()), [copies] * len(files))


def _shelves(comm: MPI.Comm, domains: Domains, run: storage.Path) -> list[Shelf]:
    """By rank, what those that lead a domain have. Collective."""
    with together(comm):
        own = _shelf(run) if domains.leads else Shelf({}, [])
    return allgather(comm, own, Shelf)


def _shelf(run: storage.Path) -> Shelf:
    sizes = {name: os.path.getsize(path) for name in SMALL if os.path.isfile(path := pathlib.Path(run, name))}
    found, _ = checkpoint.available(run)
    kept = [Manifest(one.step, one.manifest["seal"], bool(one.manifest["best"]), one.texts[-1].valid) for one in found]
    return Shelf(sizes, kept)


def _candidates(shelves: Sequence[Shelf], best: bool) -> list[tuple[Manifest, int]]:
    """(manifest, the lowest rank that has it), the newest first; best: first those that checkpoint.best_ones would name.

    Of two for one step, as there are where a host was cut off and came back, the one that more disks have comes first.
    """
    counts = Counter(manifest for shelf in shelves for manifest in shelf.manifests)
    first = {one: next(rank for rank, shelf in enumerate(shelves) if one in shelf.manifests) for one in counts}
    order = sorted(counts, key=lambda one: (one.step, counts[one], -first[one]), reverse=True)
    if best and order:
        text = order[0].valid
        order.sort(key=lambda one: one.best and one.valid == text, reverse=True)
    return [(one, first[one]) for one in order]


def _spread_small(comm: MPI.Comm, domains: Domains, run: storage.Path, shelves: Sequence[Shelf]) -> bool:
    """Bring the files beside the checkpoints to disks that lack them, and the longest metrics to all.

    What says which text is read, and as what, is never replaced by what another rank says: a disk that has other settings is
    refused. Returns whether the run is a private one.
    """
    private = True
    newest = [max((one.step for one in shelf.manifests), default=-1) for shelf in shelves]
    for name in SMALL:
        having = [rank for rank, shelf in enumerate(shelves) if shelf.sizes.get(name, LARGEST + 1) <= LARGEST]
        if not having:
            continue
        weights = [shelf.sizes.get(name, 0) * (name == METRICS) for shelf in shelves]
        source = max(having, key=lambda rank: (newest[rank], weights[rank], -rank))
        with together(comm):
            own = storage.read_text(pathlib.Path(run, name), LARGEST) if comm.rank == source else ""
        text = allgather(comm, own, str)[source]
        if name == "config.toml":
            private = _is_private(text)
            if private:
                storage.owner_only()
        with together(comm):
            if domains.leads and comm.rank != source:
                path = pathlib.Path(run, name)
                path.parent.mkdir(parents=True, exist_ok=True)
                if name not in shelves[comm.rank].sizes:
                    storage.write_text(path, text)
                elif name == METRICS:
                    _replace_metrics(path, text)
                elif storage.read_text(path, LARGEST) != text:
                    there = domains.hosts[source]
                    raise UserError(
                        f"{path} on {domains.hosts[comm.rank]} is not that on {there}: remove {run} where it is older"
                    )
    return private


def _replace_metrics(path: pathlib.Path, text: str) -> None:
    if storage.read_text(path, LARGEST) != text:
        storage.write_text(path, text)


def _is_private(text: str) -> bool:
    try:
        return from_dict(tomllib.loads(text)).data.private
    except (ValueError, UserError):
        return True  # nobody else needs to read what cannot be read


def _gather_checkpoint(
    comm: MPI.Comm,
    domains: Domains,
    run: storage.Path,
    candidates: Sequence[tuple[Manifest, int]],
    say: Callable[[str], None],
    private: bool = False,
) -> None:
    """Bring the first of the checkpoints all of whose slices are somewhere to every disk. private: the run is one."""
    lost: list[str] = []  # what nobody has, of those that were passed over
    for manifest, source in candidates:
        text = _manifest(comm, domains, run, manifest.step, source)
        files = _files(comm, run, manifest.step, text, private)
        have = _sound(comm, domains, run, files, say)
        gone = replicate(comm, domains, run, files, have, {file.name for file in files}, say)
        if gone:
            lost.append(f"{gone[0].name}{f' and {len(gone) - 1} more' if len(gone) > 1 else ''}")
            continue
        if lost:
            say(f"nobody here has {lost[0]} of {run}; step {manifest.step} takes its place")
        return
    if lost:
        raise UserError.of_all(f"nobody here has {lost[0]} of {run}: start with a host that has it")


def _manifest(comm: MPI.Comm, domains: Domains, run: storage.Path, step: int, source: int) -> str:
    """The manifest of the checkpoint that rank `source` has of a step, which all disks have then. Collective."""
    path = checkpoint.folder_of(run, step) / MANIFEST
    with together(comm):
        own = storage.read_text(path, storage.LARGEST_JSON) if domains.leads and os.path.isfile(path) else ""
    text = allgather(comm, own if comm.rank == source else "", str)[source]
    with together(comm):
        if domains.leads and own != text:
            path.parent.mkdir(parents=True, exist_ok=True)
            storage.write_text(path, text)
    return text


def _files(comm: MPI.Comm, run: storage.Path, step: int, text: str, private: bool) -> list[File]:
    """What a manifest names. Raises UserError on all ranks where it is damaged, or has what private text has made of lanes."""
    with together(comm):
        found = Checkpoint.parse(checkpoint.folder_of(run, step), text)
        if private and found.manifest.get("states", True):
            raise UserError(f"{found.folder} has states of private text, which stay on its disk: go on where all hosts see it")
        parts = zip(found.parts(), found.manifest["sha256"], found.sizes(), strict=True)
        return [File(str(path.relative_to(run)), digest, most) for (_, path), digest, (_, most) in parts]


def _sound(comm: MPI.Comm, domains: Domains, run: storage.Path, files: Sequence[File], say: Callable[[str], None]) -> set[str]:
    """Names of those that are whole on this rank's disk; others that are there are named. Collective."""
    sound, damaged = set[str](), list[str]()
    with together(comm):
        for file in files if domains.leads else ():
            found = is_sound(run, file)
            if found:
                sound.add(file.name)
            elif found is False:
                damaged.append(file.name)
    for rank, names in enumerate(allgather(comm, damaged, list[str])):
        for name in names:
            where = f"{printable(str(pathlib.Path(run, name)))} on {printable(domains.hosts[rank])}"
            say(f"{where} is damaged; another copy takes its place, if there is one")
    return sound
