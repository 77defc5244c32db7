"""Domains and copies of files between disks. Ranks with folders of their own play hosts with disks of their own."""

import hashlib
import os
import pathlib
import shutil
import tempfile
import time

import numpy as np
import pytest
from mpi4py import MPI

from dllm.comm.messages import allgather, broadcast
from dllm.comm.replicas import Domains, File, Move
from dllm.comm.transfers import NOW, PIECE, RATE, SHARE, Transfer, replicate
from dllm.errors import UserError

pytestmark = pytest.mark.mpi
LIMIT = 60  # seconds
SIZES = 0, 1, PIECE - 1, PIECE, PIECE + 1, 9 * PIECE + 7


@pytest.fixture
def comm():
    return MPI.COMM_WORLD


@pytest.fixture
def place(comm):
    """A folder that all ranks see."""
    path = broadcast(comm, tempfile.mkdtemp() if comm.rank == 0 else "", str)
    yield pathlib.Path(path)
    comm.Barrier()
    if comm.rank == 0:
        shutil.rmtree(path)


@pytest.fixture
def disk(comm, place):
    """A folder of this rank's own."""
    path = place / str(comm.rank)
    path.mkdir()
    comm.Barrier()
    return path


@pytest.fixture
def files():
    """name -> bytes, the same on all ranks."""
    random = np.random.default_rng(16)
    return {f"sub/file-{number}": random.bytes(size) for number, size in enumerate(SIZES)}


def described(files):
    return [File(name, hashlib.sha256(data).hexdigest(), len(data)) for name, data in files.items()]


def put(disk, files, names):
    for name in names:
        (disk / name).parent.mkdir(exist_ok=True)
        (disk / name).write_bytes(files[name])


def held(disk):
    return {str(path.relative_to(disk)): path.read_bytes() for path in disk.rglob("*") if path.is_file()}


def test_ranks_that_see_one_folder_are_one_domain(comm, place):
    domains = Domains.find(comm, place / "not" / "there" / "yet")
    assert domains.shared
    assert domains.of == (0,) * comm.size
    assert domains.leads == (comm.rank == 0)
    assert not list(place.iterdir())


def test_ranks_with_folders_of_their_own_are_as_many(comm, disk):
    domains = Domains.find(comm, disk)
    assert domains.of == tuple(range(comm.size))
    assert domains.leads
    assert domains.shared == (comm.size == 1)


def test_two_and_two_ranks_share_a_folder(comm, place):
    mine = place / str(comm.rank // 2)
    mine.mkdir(exist_ok=True)
    comm.Barrier()
    domains = Domains.find(comm, mine)
    assert domains.of == tuple(rank // 2 * 2 for rank in range(comm.size))
    assert domains.leaders == tuple(range(0, comm.size, 2))
    names = [f"f{number}" for number in range(50)]
    assert {leader for name in names for leader in domains.holders(name, 1)} == set(domains.leaders[:50])


def test_files_of_one_come_to_all(comm, disk, files):
    if comm.rank == comm.size - 1:
        put(disk, files, files)
    domains, names = Domains.find(comm, disk), set(files)
    have = names if comm.rank == comm.size - 1 else set()
    assert replicate(comm, domains, disk, described(files), have, names, print) == []
    assert held(disk) == files


def test_a_file_that_nobody_has_is_named_and_the_others_come(comm, disk, files):
    put(disk, files, ["sub/file-3"])
    gone = replicate(
        comm, Domains.find(comm, disk), disk, described(files), {"sub/file-3"}, {"sub/file-3", "sub/file-4"}, print
    )
    assert [file.name for file in gone] == ["sub/file-4"]
    assert set(held(disk)) == {"sub/file-3"}


def test_what_is_damaged_at_one_comes_from_another_and_is_mended_there(comm, disk, files):
    if comm.size < 3:
        return
    name, said = "sub/file-5", []
    if comm.rank < 2:
        put(disk, files, [name])
    if comm.rank == 0:
        damaged = bytearray(files[name])
        damaged[len(damaged) // 2] ^= 1
        (disk / name).write_bytes(damaged)
    have = {name} if comm.rank < 2 else set()
    assert replicate(comm, Domains.find(comm, disk), disk, described(files), have, {name}, said.append) == []
    assert held(disk) == {name: files[name]}
    said = [line.replace(str(disk), "DISK") for line in said]
    assert allgather(comm, said, list[str]) == [said] * comm.size
    assert any(name in line and "damaged" in line for line in said)


def test_what_only_a_damaged_disk_has_is_gone(comm, disk, files):
    if comm.size < 2:
        return
    name = "sub/file-4"
    if comm.rank == 0:
        put(disk, files | {name: files[name][:-1]}, [name])
    have = {name} if comm.rank == 0 else set()
    gone = replicate(comm, Domains.find(comm, disk), disk, described(files), have, {name}, lambda text: None)
    assert [file.name for file in gone] == [name]
    assert comm.rank == 0 or held(disk) == {}


def test_a_file_that_is_not_there_or_larger_than_it_may_be_is_not_taken(comm, disk, files):
    if comm.size < 2:
        return
    large = "sub/file-5"
    put(disk, files, [large] if comm.rank == 0 else [])
    moves = [Move(File(name, "0" * 64, len(files[large]) - 1), 0, 1) for name in ("missing", large)]
    transfer = Transfer(comm, disk, moves, NOW)
    transfer.run()
    assert [failure.at_target for failure in transfer.failed] == [False, False] * (comm.rank == 1)
    assert comm.rank != 1 or held(disk) == {}


def test_a_disk_that_cannot_be_written_is_told_by_all(comm, disk, files):
    if comm.size < 2:
        return
    put(disk, files, files if comm.rank == 0 else [])
    if comm.rank == comm.size - 1:
        (disk / "sub").write_text("in the way")
    names = set(files)
    with pytest.raises(UserError, match=r"cannot write .*/sub/file-\d"):
        replicate(comm, Domains.find(comm, disk), disk, described(files), names if comm.rank == 0 else set(), names, print)


def test_no_file_is_written_through_a_link(comm, disk, files):
    if comm.size < 2:
        return
    put(disk, files, files if comm.rank == 0 else [])
    if comm.rank == 1:
        (disk / "elsewhere").mkdir()
        (disk / "sub").symlink_to(disk / "elsewhere")
    names = set(files)
    with pytest.raises(UserError, match="a link"):
        replicate(comm, Domains.find(comm, disk), disk, described(files), names if comm.rank == 0 else set(), names, print)
    assert comm.rank != 1 or not any((disk / "elsewhere").iterdir())


def test_between_steps_no_more_leaves_than_their_share(comm, disk, files):
    if comm.size < 2:
        return
    name, seconds = "sub/file-5", 0.02
    put(disk, files, [name] if comm.rank == 0 else [])
    transfer = Transfer(comm, disk, [Move(described(files)[5], 0, 1)], NOW)
    steps, end = 0, time.monotonic() + LIMIT
    while not transfer.done and time.monotonic() < end:
        before, begin = transfer.moved, time.monotonic()
        while time.monotonic() < begin + 0.002:  # a step, as far as messages are concerned
            time.sleep(1e-4)
        transfer.progress(seconds)
        steps += 1
        assert comm.rank != 0 or transfer.moved - before <= max(PIECE, seconds * RATE * SHARE)
    assert transfer.done
    assert comm.rank or steps >= SIZES[5] / (seconds * RATE * SHARE)
    assert comm.rank != 1 or held(disk) == {name: files[name]}


def test_nothing_stays_behind(comm, disk, files):
    before = set(os.listdir(disk))
    Domains.find(comm, disk)
    assert set(os.listdir(disk)) == before
