"""Text to a prepared corpus, the work shared by all ranks; and the embedded corpus, prepared once into the user's cache.

With private text every rank prepares its own folder. Only counts of units travel between ranks, never text.
"""

import collections
import contextlib
import functools
import os
import pathlib
import shutil
import sys

from ..comm.runtime import agree, together
from ..errors import UserError
from ..files import storage
from . import pairs, shards, text
from .tokenizers import KINDS


def prepare(comm, splits, kind, size, out, private=False, progress=lambda message: None, pairing=None):
    """Write a corpus to the folder `out`. Collective. Raises UserError on all ranks; then nothing is left of the attempt.

    splits : {"train": paths, ...}; with private=True this rank's own
    kind, size : the tokenizer, and its vocabulary size (0: its default)
    pairing : {"seed", "longest"} of pairs.plan, where the paths are (source, target)
    """
    with contextlib.ExitStack() as undo:
        _prepare(comm, splits, kind, size, out, private, progress, pairing, undo)
        undo.pop_all()


def _prepare(comm, splits, kind, size, out, private, progress, pairing, undo):
    ranks, rank = (1, 0) if private else (comm.size, comm.rank)
    plan = text.plan if pairing is None else functools.partial(pairs.plan, **pairing, say=progress)
    with together(comm):
        plans = {split: plan(paths) for split, paths in splits.items()}
        empty = next((split for split, plan in plans.items() if not plan), None)
        if empty:
            raise UserError(f"the {empty} text is empty: {', '.join(map(str, splits[empty][:3]))}")
        if rank == 0:
            undo.callback(_remove, *_free_folder(out))
    with together(comm):  # after all ranks have seen what is there, so that the last to leave removes parents they share
        if rank == 0:
            _make_folder(out)
    with together(comm):
        counts, others = _count(plans, KINDS[kind], ranks, rank, progress)
    counts, others = (comm.reduce(part, op=lambda a, b: a + b) for part in (counts, others))
    tokenizer = None
    with together(comm):
        if comm.rank == 0:
            progress("building the vocabulary")
            unseen = kind != "bpe" and any(unit not in counts for unit in others)
            tokenizer = KINDS[kind].build(counts, size, unseen)
            tokenizer.pairs = pairing is not None
    value = comm.bcast(tokenizer and tokenizer.to_json())
    tokenizer = KINDS[kind].from_json(value)
    with together(comm):
        written = _write(plans, tokenizer, out, ranks, rank, progress)
    entries = [written] if private else comm.allgather(written)
    with together(comm):
        if rank == 0:
            shards.save_tokenizer(out, tokenizer)
            manifest = _manifest(plans, tokenizer, entries)
            storage.write_json(pathlib.Path(out, "manifest.json"), manifest)
            if pairing and pairing["longest"]:
                _tell_left_out(plans, manifest, pairing["longest"], progress)


def _tell_left_out(plans, manifest, longest, progress):
    for split, plan in plans.items():
        planned, kept = sum(len(block.numbers) for part in plan for block in part), manifest["splits"][split]["pairs"]
        if kept < planned:
            progress(f"{planned - kept:,} of {planned:,} {split} pairs are left out: they have more than {longest} tokens")


def _free_folder(out):
    """The folder, which is empty or not there, and those of it and its parents that are not there, innermost first."""
    folder = pathlib.Path(out)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"--out {out} exists and is not an empty folder; choose another, or remove it first")
    return folder, [path for path in (folder, *folder.parents) if not path.exists()]


def _make_folder(out):
    folder = pathlib.Path(out)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        storage.write_text(folder / "probe", "")
        (folder / "probe").unlink()
    except OSError as error:
        raise UserError(f"cannot write to --out {out}: {error.strerror}") from None


def _remove(folder, new):
    """Remove the files of a folder, and the folders that are new, as far as they are empty then."""
    with contextlib.suppress(OSError):
        for path in folder.iterdir():
            path.unlink()
    for path in new:
        with contextlib.suppress(OSError):
            path.rmdir()


def _count(plans, tokenizer, ranks, rank, progress):
    """Counts of units in this rank's part of the train text, and in that of the other splits."""
    train, others = collections.Counter(), collections.Counter()
    for split, plan in plans.items() if tokenizer.kind != "byte" else ():
        for _, pieces in _my_share(plan, ranks, rank, f"counting {split}", progress):
            for piece in pieces:
                (train if split == "train" else others).update(piece.count(tokenizer))
    return train, others


def _write(plans, tokenizer, out, ranks, rank, progress):
    """Encode and write this rank's shards. Returns {(split, number): (name, tokens, sha256, figures of pairs)}."""
    written, dtype = {}, shards.token_dtype(tokenizer.size)
    for split, plan in plans.items():
        for number, pieces in _my_share(plan, ranks, rank, f"encoding {split}", progress):
            path = pathlib.Path(out, f"{split}-{number:05d}.h5")
            figures = []
            with shards.ShardWriter(path, dtype) as shard:
                for piece in pieces:
                    tokens = piece.encode(tokenizer)
                    shard.append(tokens.astype(dtype))
                    if tokenizer.pairs:
                        figures.append(pairs.figures(tokens, tokenizer))
            written[split, number] = path.name, shard.tokens, storage.sha256(path), figures
    return written


def _my_share(plan, ranks, rank, what, progress):
    for number in range(rank, len(plan), ranks):
        progress(f"{what}: {number + 1} of {len(plan)}")
        yield number, plan[number]


def _manifest(plans, tokenizer, entries):
    """The manifest of all shards; it does not depend on who wrote which."""
    splits = {}
    for split, plan in plans.items():
        start, parts, figures = 0, [], []  # figures: of pairs
        for number in range(len(plan)):
            name, tokens, digest, found = next(part[split, number] for part in entries if (split, number) in part)
            parts.append({"name": name, "start": start, "stop": start + tokens, "sha256": digest})
            if tokenizer.pairs:
                parts[-1]["pairs"] = sum(pairs for pairs, _ in found)
                figures += found
            start += tokens
        size = sum(piece.size for pieces in plan for piece in pieces)
        splits[split] = {"tokens": start, "bytes": size, "shards": parts}
        if tokenizer.pairs:
            counts, lengths = zip(*figures, strict=True)
            if sum(counts) == 0:
                raise UserError(f"no pair of the {split} files is short enough: --longest must be larger")
            splits[split] |= {"pairs": sum(counts), "longest": max(lengths)}
    return {
        "format": shards.FORMAT, "kind": tokenizer.kind, "vocabulary": tokenizer.size,
        "dtype": shards.token_dtype(tokenizer.size).name, "tokenizer": shards.tokenizer_hash(tokenizer), "splits": splits,
    }  # fmt: skip


def open_corpus(comm, place, path, progress):
    """This rank's Corpus: the folder `path`, one for each rank where it has {rank}, or, "", the embedded one. Collective."""
    folder = path.replace("{rank}", str(comm.rank)) if path else embedded(comm, place.comm, "bpe", 2048, progress)
    return agree(comm, shards.Corpus, folder)


def embedded(comm, node_comm, kind, size, progress):
    """The folder of the embedded corpus in this user's cache, prepared first where it is not there. Collective.

    Prepared by all ranks together where they see one file system, else by the ranks of each node for themselves.
    """
    cache = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache", "dllm")
    folder = cache / f"python-{sys.version.split()[0]}-{kind}{size or ''}-{shards.FORMAT}"
    if all(comm.allgather((folder / "manifest.json").exists())):
        return folder
    with together(comm):
        building = folder.with_name(f".{folder.name}.{os.getpid()}")
        if comm.rank == 0:
            building.mkdir(parents=True)
    building = comm.bcast(building)
    group = comm if all(comm.allgather(building.exists())) else node_comm
    building = group.bcast(building.with_name(building.name + f"-{comm.rank}"))
    train, valid = text.embedded_corpus()
    prepare(group, {"train": train, "valid": valid}, kind, size, building, progress=progress)
    with together(comm):
        if group.rank == 0:
            try:
                building.rename(folder)
            except OSError:  # another job was faster
                shutil.rmtree(building, ignore_errors=True)
        if comm.rank == 0:
            shutil.rmtree(folder.with_name(f".{folder.name}.{os.getpid()}"), ignore_errors=True)
    return folder
