"""One text in many forms, read by one, two or all ranks: always the same corpus."""

import gzip
import json
import os
import pathlib
import shutil
import tempfile
import threading

import pytest
from mpi4py import MPI

from dllm.comm.messages import broadcast
from dllm.comm.runtime import together
from dllm.data import text
from dllm.data.corpus import Corpus
from dllm.data.preparation import prepare_corpus
from dllm.data.source_names import named
from dllm.data.sources import Reading, plain_files
from dllm.data.vocabulary import Vocabulary
from dllm.errors import UserError
from dllm.files import storage

pytestmark = pytest.mark.mpi
LINES = [f"line {number} says wört {number * 7919 % 1000}" for number in range(1500)]
HELD_OUT = {"valid": 0.1}


@pytest.fixture
def place(monkeypatch):
    comm = MPI.COMM_WORLD
    monkeypatch.setattr(storage, "flush", lambda path: None)  # which takes most of the time
    monkeypatch.setattr(text, "SHARD", 9000)
    monkeypatch.setattr(text, "PIECE", 1000)
    path = pathlib.Path(broadcast(comm, tempfile.mkdtemp() if comm.rank == 0 else "", str))
    if comm.rank == 0:
        _write(path, "one", LINES[:1000])
        _write(path, "two", LINES[1000:])
    comm.Barrier()
    yield path
    comm.Barrier()
    if comm.rank == 0:
        shutil.rmtree(path)


def _write(place, name, lines):
    """The lines in many forms; cut: where no line end is between the two."""
    plain = "".join(f"{line}\n" for line in lines).encode()
    (place / f"{name}.plain").write_bytes(plain)
    (place / f"{name}.gz").write_bytes(gzip.compress(plain[:500]) + gzip.compress(plain[500:]))
    (place / f"{name}.jsonl").write_text("".join(json.dumps({"a": [1], "text": line}) + "\n" for line in lines))
    (place / f"{name}.cut").write_bytes(plain.removesuffix(b"\n") if name == "one" else plain)
    os.mkfifo(place / f"{name}.pipe")
    try:
        import pyarrow
        from backports import zstd
        from pyarrow import parquet
    except ImportError:
        return
    (place / f"{name}.zst").write_bytes(zstd.compress(plain))
    (place / f"{name}.packed").write_bytes(zstd.compress((place / f"{name}.jsonl").read_bytes()))
    parquet.write_table(pyarrow.table({"text": lines}), place / f"{name}.parquet", row_group_size=300)


def prepare(comm, place, form, out, kind="word", held_out=None):
    """The hash of a corpus that these ranks make."""
    names = named([f"{place}/*.{form}"])
    if form == "pipe" and comm.rank == 0:
        for name in names:
            data = pathlib.Path(name).with_suffix(".plain").read_bytes()
            threading.Thread(target=pathlib.Path(name).write_bytes, args=(data,), daemon=True).start()
    field = "text" if form in ("jsonl", "packed", "parquet") else ""
    reading = Reading(field, False, held_out or {}, 1)
    with plain_files(comm, {"train": names}, place, reading, False, lambda line: None) as files:
        prepare_corpus(comm, files, Vocabulary(kind, 300 if kind == "bpe" else 0), out)
    found = Corpus(out).hash
    comm.Barrier()
    return found


def test_one_text_in_any_form_by_any_ranks_is_one_corpus(place):
    world, hashes = MPI.COMM_WORLD, {}
    forms = ["plain", "gz", "jsonl", "cut", "pipe", *(["zst", "packed", "parquet"] if list(place.glob("*.zst")) else [])]
    for ranks in {1, min(2, world.size), world.size}:
        comm = world.Split(0 if world.rank < ranks else MPI.UNDEFINED)
        if comm == MPI.COMM_NULL:
            continue
        for form in {1: ["plain"], world.size: forms}.get(ranks, ["plain", "gz", "jsonl"]):
            hashes[ranks, form] = prepare(comm, place, form, place / f"out-{ranks}-{form}")
        held = "plain" if ranks == 1 else "jsonl"
        hashes[ranks, "held out"] = prepare(comm, place, held, place / f"held-{ranks}", held_out=HELD_OUT)
        comm.Free()
    world.Barrier()
    if world.rank == 0:
        assert len(set(hashes.values())) == 2, hashes
        assert not [path for path in place.iterdir() if path.name.startswith(".")]


def test_a_source_that_one_rank_cannot_read_ends_all_and_leaves_nothing(place):
    comm = MPI.COMM_WORLD
    if comm.rank == 0:
        (place / "two.gz").write_bytes((place / "two.gz").read_bytes()[:-30])
    comm.Barrier()
    with pytest.raises(UserError, match=r"cannot read .*/two.gz: Compressed file ended"):
        prepare(comm, place, "gz", place / "new" / "out")
    comm.Barrier()
    assert not (place / "new").exists()
    with together(comm):
        assert not [path for path in place.iterdir() if path.name.startswith(".")]
    comm.Barrier()


def test_of_two_groups_of_ranks_that_prepare_one_folder_one_succeeds(place):
    world = MPI.COMM_WORLD
    comm = world.Split(world.rank % 2)
    try:
        prepare(comm, place, "plain", place / "out")
        succeeded = True
    except UserError as error:
        assert "--out" in str(error)  # noqa: PT017, either may fail
        succeeded = False
    by_rank = world.allgather((world.rank % 2, succeeded))
    assert {group for group, done in by_rank if done} in ({0}, {1})
    assert len(set(by_rank)) == min(world.size, 2)
    Corpus(place / "out")
    comm.Free()
