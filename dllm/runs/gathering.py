"""A run whose files lie on disks that ranks do not share, brought to every disk: before it is used, and when it is done."""

from __future__ import annotations

import pathlib
import tomllib
from collections import Counter
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

from ..comm.messages import allgather
from ..comm.replicas import Domains, File
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
    if domains.shared:
        return False
    shelves = allgather(comm, _shelf(run) if domains.leads else Shelf({}, []), Shelf)
    if not any("config.toml" in shelf.sizes for shelf in shelves):
        return False
    _spread_small(comm, domains, run, shelves)
    _gather_checkpoint(comm, domains, run, _candidates(shelves, best), say)
    return True


def spread_checkpoints(comm: MPI.Comm, domains: Domains, run: storage.Path, say: Callable[[str], None]) -> None:
    """Bring the newest checkpoint and the newest best one to every disk, each whole. Collective. Raises UserError on all ranks.

    domains : of the folder
    """
    if domains.shared:
        return
    shelves = allgather(comm, _shelf(run) if domains.leads else Shelf({}, []), Shelf)
    for best in (False, True):
        _gather_checkpoint(comm, domains, run, _candidates(shelves, best), say)


def kept_checkpoints(comm: MPI.Comm, domains: Domains, run: storage.Path, copies: int) -> Kept:
    """The files of the newest checkpoint and of the newest best one, to look after. Collective. Raises UserError.

    Every disk has both manifests afterwards.
    """
    shelves = allgather(comm, _shelf(run) if domains.leads else Shelf({}, []), Shelf)
    files = dict[str, File]()
    for best in (False, True):
        for manifest, source in _candidates(shelves, best)[:1]:
            text = _manifest(comm, domains, run, manifest.step, source)
            files |= {file.name: file for file in _files(comm, run, manifest.step, text)}
    return Kept(domains, pathlib.Path(run), list(files.values()), [copies] * len(files))


def _shelf(run: storage.Path) -> Shelf:
    sizes = {name: path.stat().st_size for name in SMALL if (path := pathlib.Path(run, name)).is_file()}
    found, _ = checkpoint.available(run)
    return Shelf(sizes, [Manifest(one.step, one.manifest["seal"], bool(one.manifest["best"])) for one in found])


def _candidates(shelves: Sequence[Shelf], best: bool) -> list[tuple[Manifest, int]]:
    """(manifest, the lowest rank that has it) in the order in which checkpoints are tried.

    Of two for one step, as there are where a host was cut off and came back, the one that more disks have comes first.
    """
    counts = Counter(manifest for shelf in shelves for manifest in shelf.manifests)
    first = {one: next(rank for rank, shelf in enumerate(shelves) if one in shelf.manifests) for one in counts}
    order = sorted(counts, key=lambda one: (best and one.best, one.step, counts[one], -first[one]), reverse=True)
    return [(one, first[one]) for one in order]


def _spread_small(comm: MPI.Comm, domains: Domains, run: storage.Path, shelves: Sequence[Shelf]) -> None:
    """The files beside the checkpoints go to every disk: those of the rank whose run came furthest; the longest metrics."""
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
        with together(comm):
            if name == "config.toml" and _is_private(text):
                storage.owner_only()
            if domains.leads and comm.rank != source:
                pathlib.Path(run).mkdir(parents=True, exist_ok=True)
                if name not in shelves[comm.rank].sizes or storage.read_text(pathlib.Path(run, name), LARGEST) != text:
                    storage.write_text(pathlib.Path(run, name), text)


def _is_private(text: str) -> bool:
    try:
        return from_dict(tomllib.loads(text)).data.private
    except (ValueError, UserError):
        return True  # nobody else needs to read what cannot be read


def _gather_checkpoint(
    comm: MPI.Comm, domains: Domains, run: storage.Path, candidates: Sequence[tuple[Manifest, int]], say: Callable[[str], None]
) -> None:
    """Bring the first of the checkpoints all of whose slices are somewhere to every disk."""
    lost: list[str] = []  # what nobody has, of those that were passed over
    for manifest, source in candidates:
        text = _manifest(comm, domains, run, manifest.step, source)
        files = _files(comm, run, manifest.step, text)
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
        own = storage.read_text(path, storage.LARGEST_JSON) if domains.leads and path.is_file() else ""
    text = allgather(comm, own if comm.rank == source else "", str)[source]
    with together(comm):
        if domains.leads and own != text:
            path.parent.mkdir(parents=True, exist_ok=True)
            storage.write_text(path, text)
    return text


def _files(comm: MPI.Comm, run: storage.Path, step: int, text: str) -> list[File]:
    """What a manifest names. Raises UserError on all ranks where it is damaged."""
    with together(comm):
        found = Checkpoint.parse(checkpoint.folder_of(run, step), text)
        parts = zip(found.parts(), found.manifest["sha256"], found.sizes(), strict=True)
        return [File(str(path.relative_to(run)), digest, most) for (_, path), digest, (_, most) in parts]


def _sound(comm: MPI.Comm, domains: Domains, run: storage.Path, files: Sequence[File], say: Callable[[str], None]) -> set[str]:
    """Names of those that are whole on this rank's disk; others that are there are named. Collective."""
    sound, damaged = set[str](), list[str]()
    for file in files if domains.leads else ():
        path = pathlib.Path(run, file.name)
        if path.is_file() and not path.is_symlink():
            try:
                storage.check_file(path, file.sha256, 0, file.most)
                sound.add(file.name)
            except UserError:
                damaged.append(file.name)
    for rank, names in enumerate(allgather(comm, damaged, list[str])):
        for name in names:
            where = f"{printable(str(pathlib.Path(run, name)))} on {printable(domains.hosts[rank])}"
            say(f"{where} is damaged; another copy takes its place, if there is one")
    return sound
