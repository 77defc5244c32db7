"""Corpora on disks that ranks do not share: what prepare leaves where, and how shards come to those that read them.

Ranks with working folders of their own play hosts with disks of their own.
"""

import contextlib
import itertools
import json
import pathlib
import shutil
import socket
import tempfile

import numpy as np
import pytest
from helpers.gateway import Gateway
from helpers.run_files import flip
from mpi4py import MPI

from dllm.comm.messages import allgather, broadcast
from dllm.comm.replicas import Domains
from dllm.config import StorageConfig
from dllm.data import placing, text
from dllm.data.corpus import Corpus, open_corpus
from dllm.data.lane_kinds import lane_files, read_lanes
from dllm.data.lanes import deal
from dllm.data.pairs import Pairing
from dllm.data.preparation import prepare_corpus
from dllm.data.supply import supply
from dllm.data.vocabulary import Vocabulary
from dllm.errors import UserError
from dllm.files import storage

pytestmark = pytest.mark.mpi
ONE_EACH = pytest.mark.parametrize("disk", [1], indirect=True)
OF_TEXT = pytest.mark.parametrize("reference", [False], indirect=True)
SMALL = {"manifest.json", "tokenizer.json"}
LINES = [f"line {number} says {number * 7919 % 1000}" for number in range(1500)]
WINDOW = 64
OUT = pathlib.Path("data/x")


@pytest.fixture
def comm():
    return MPI.COMM_WORLD


@pytest.fixture
def place(comm):
    """A folder that all ranks see, with text for them: about 30 kB, the longest shard 2 kB."""
    path = pathlib.Path(broadcast(comm, tempfile.mkdtemp() if comm.rank == 0 else "", str))
    if comm.rank == 0:
        for name, lines in ("train", LINES), ("valid", LINES[::40]):
            for side in "src", "tgt":
                (path / f"{name}.{side}").write_text("".join(f"{line} {side}\n" for line in lines))
    comm.Barrier()
    yield path
    comm.Barrier()
    if comm.rank == 0:
        shutil.rmtree(path)


@pytest.fixture(params=[1, 2], ids="ranks a disk: {}".format)
def disk(comm, place, monkeypatch, request):
    """The disk of this rank, which works there; and small shards."""
    path = place / f"disk{comm.rank // request.param}"
    path.mkdir(exist_ok=True)
    monkeypatch.chdir(path)
    monkeypatch.setattr(storage, "flush", lambda path: None)  # which takes most of the time
    monkeypatch.setattr(text, "SHARD", 3000)
    monkeypatch.setattr(text, "PIECE", 1000)
    monkeypatch.setattr(placing, "SMALL", 5000)
    comm.Barrier()
    return path


def prepare(comm, place, out=OUT, pairs=False, copies=2):
    names = {split: place / f"{split}.src" for split in ("train", "valid")}
    splits = {split: [(path, path.with_suffix(".tgt")) if pairs else path] for split, path in names.items()}
    prepare_corpus(comm, splits, Vocabulary("byte"), out, drawing=Pairing(1) if pairs else None, copies=copies)


@pytest.fixture(params=[False, True], ids=["text", "pairs"])
def reference(comm, place, disk, request):
    """The corpus as one process makes it, in a folder that all ranks see."""
    if comm.rank == 0:
        prepare(MPI.COMM_SELF, place, place / "reference", request.param)
    comm.Barrier()
    return Corpus(place / "reference")


def held(folder):
    return {path.name for path in folder.iterdir()} if folder.is_dir() else set()


def of_disks(comm, disk, value, kind):
    """value of one rank of each disk."""
    return [*dict(allgather(comm, (str(disk), value), tuple[str, kind])).values()]


def shards(corpus, split=None):
    return [file.name for file in corpus.files(split)]


def open_here(comm):
    return open_corpus(comm, None, str(OUT), print)


@pytest.mark.parametrize(("reference", "copies"), [(False, 0), (True, 2), (False, 2)], indirect=["reference"])
def test_prepare_leaves_on_every_disk_what_it_shall_hold(comm, place, disk, reference, copies):
    prepare(comm, place, pairs=reference.tokenizer.pairs, copies=copies)
    for name in SMALL:
        assert (OUT / name).read_bytes() == (reference.folder / name).read_bytes()
    corpus = Corpus(OUT)
    for file in corpus.files():
        if file.name in held(OUT):
            corpus.check(file)
    assert len(shards(corpus, "train")) > 8
    domains = Domains.find(comm, OUT)
    everyones = of_disks(comm, disk, sorted(held(OUT)), list[str])
    disks, written = len(everyones), [*itertools.chain(*everyones)]
    if copies:
        assert placing.wanted_here(corpus.manifest, domains, copies) | SMALL == held(OUT)
    for name in shards(corpus, "train"):
        assert written.count(name) == min(copies or 1, disks)
    for name in shards(corpus, "valid"):
        assert written.count(name) == (disks if copies else 1)


@ONE_EACH
@pytest.mark.parametrize(
    ("harm", "complaint"),
    [
        ("folder is taken", r"--out data/x exists and is not an empty folder"),
        ("cannot be made", r"cannot write to --out data/x|--out data/x"),
        ("text is missing", r"rank {last} on {host} cannot read own.txt, which others can: every rank reads all text"),
        (
            "text is another",
            r"the ranks do not agree on the train text: rank 0 has 33,222 bytes in 33 pieces \(.*rank {last} has 6 bytes",
        ),
        ("text is not UTF-8", r"own.txt is not UTF-8 at byte 2999"),
    ],
)
def test_where_one_disk_is_at_fault_nothing_is_left_on_any(comm, place, disk, harm, complaint):
    last, own = comm.rank == comm.size - 1, disk / "own.txt"
    shutil.copy(place / "train.src", own)
    if last and harm == "folder is taken":
        (disk / OUT).mkdir(parents=True)
        (disk / OUT / "mine").touch()
    elif last and harm == "cannot be made":
        (disk / "data").touch()
    elif last and harm == "text is missing":
        own.unlink()
    elif last and harm == "text is another":
        own.write_text("short\n")
    elif harm == "text is not UTF-8":
        data = bytearray(own.read_bytes())
        data[2999] = 255
        own.write_bytes(data)
    before = sorted(disk.rglob("*"))
    if comm.size == 1 and harm.startswith("text is") and "UTF" not in harm:
        return
    complaint = complaint.format(last=comm.size - 1, host=socket.gethostname())
    with pytest.raises(UserError, match=complaint) as error:
        prepare_corpus(comm, {"train": ["own.txt"]}, Vocabulary("char"), OUT)
    assert error.value.shared
    assert sorted(disk.rglob("*")) == before


def lanes_of(comm, corpus, split, count, ranks=None):
    ranks = comm.size if ranks is None else ranks
    return (deal(count, ranks, comm.rank) if comm.rank < ranks else range(0)), count


def windows(corpus, split, lanes, of):
    reader = read_lanes(corpus, split, lanes, of, WINDOW)
    return [reader.window(number, WINDOW)[:2] for number in range(12)]


def read_as_reference(comm, corpus, reference, split="train", count=None):
    lanes, of = lanes_of(comm, corpus, split, count or 2 * comm.size)
    files = lane_files(corpus, split, lanes, of)
    supply(comm, corpus, files, print)
    np.testing.assert_array_equal(windows(corpus, split, lanes, of), windows(reference, split, lanes, of))
    return {file.name for file in files}


def test_a_disk_gets_just_the_shards_that_its_ranks_read_and_hashes_them_once(comm, disk, reference, monkeypatch):
    if comm.rank == 0:
        shutil.copytree(reference.folder, OUT)
    comm.Barrier()
    hashed, real = [], storage.sha256
    monkeypatch.setattr(storage, "sha256", lambda path, *rest: hashed.append(path.name) or real(path, *rest))
    corpus = open_here(comm)
    if held(OUT) != held(reference.folder):
        assert held(OUT) == SMALL
    comm.Barrier()
    names = read_as_reference(comm, corpus, reference)
    of_disk = {
        name
        for other, found in allgather(comm, (str(disk), sorted(names)), tuple[str, list[str]])
        if other == str(disk)
        for name in found
    }
    everything = held(OUT) == held(reference.folder)
    assert everything or held(OUT) == of_disk | SMALL
    assert sorted(hashed) == (sorted(names) if everything else [])  # what comes in is hashed on its way
    supply(comm, corpus, corpus.files("train")[:1], print)
    fewer = comm.Split(comm.rank < comm.size - 1)
    if comm.rank < comm.size - 1:
        read_as_reference(fewer, corpus, reference, count=2 * comm.size)  # as after a death
    assert len(hashed) == len(set(hashed))


def everywhere(comm, disk, reference):
    """The corpus on all disks."""
    if disk.name not in {str(number) for number in range(comm.rank)} and not (disk / OUT).exists():
        shutil.copytree(reference.folder, disk / OUT, dirs_exist_ok=True)
    comm.Barrier()
    return open_here(comm)


@ONE_EACH
def test_a_damaged_shard_is_named_and_mended(comm, disk, reference):
    corpus, said = everywhere(comm, disk, reference), []
    name = lane_files(corpus, "train", *lanes_of(comm, corpus, "train", comm.size))[-1].name
    damaged = broadcast(comm, "", str) or allgather(comm, name, str)[-1]
    path, host = OUT / damaged, socket.gethostname()
    harmed = {comm.size - 1, 0}  # one that reads it, and the first that it would be asked of
    if comm.rank in harmed:
        flip(path, path.stat().st_size // 2)
    comm.Barrier()
    mine = lane_files(corpus, "train", *lanes_of(comm, corpus, "train", comm.size))
    if comm.size < 3:
        with pytest.raises(UserError, match=rf"{path} is damaged.*nobody has a sound copy$") as error:
            supply(comm, corpus, mine, said.append)
        assert error.value.shared
        return
    supply(comm, corpus, mine, said.append)
    assert said == 2 * [f"{path} on {host} was damaged; it is mended from {host}"]
    assert path.read_bytes() == (reference.folder / damaged).read_bytes()
    said.clear()
    supply(comm, Corpus(OUT), mine, said.append)
    assert not said


@ONE_EACH
@OF_TEXT
def test_a_source_that_is_damaged_is_left_out_and_mended_too(comm, disk, reference):
    if comm.size < 3:
        return
    corpus, said = everywhere(comm, disk, reference), []
    lanes, of = lanes_of(comm, corpus, "train", 1, 1)
    name = corpus.files("train")[0].name
    if comm.rank == 1:
        flip(OUT / name, 3000)
    elif comm.rank != 2:
        (OUT / name).unlink()
    comm.Barrier()
    supply(comm, corpus, lane_files(corpus, "train", lanes, of), said.append)
    assert len(said) == 1
    assert f"{name} on {socket.gethostname()}: it is damaged there" in said[0]
    assert comm.rank > 2 or (OUT / name).read_bytes() == (reference.folder / name).read_bytes()


@ONE_EACH
@OF_TEXT
def test_what_nobody_has_is_named_on_all_ranks_and_nothing_else_is_lost(comm, disk, reference):
    corpus = everywhere(comm, disk, reference)
    first, second = (corpus.files("train")[-place] for place in (3, 2))
    for file in first, second:
        (OUT / file.name).unlink()
    comm.Barrier()
    before = held(OUT)
    files = corpus.files("train") if comm.rank == comm.size - 1 else []
    where = rf" \(rank {comm.size - 1} on {socket.gethostname()}\)" if comm.size > 1 else ""
    text = (
        rf"^{OUT / first.name} is not there{where}, and nobody has a copy, nor of 1 other: start with the hosts that have them"
    )
    with pytest.raises(UserError, match=text) as error:
        supply(comm, corpus, files, print)
    assert error.value.shared
    assert held(OUT) == before


@pytest.fixture
def gateway(comm, reference, disk, monkeypatch):
    """What serves the corpus's blocks, on rank 0, and settings that name it; each disk has a cache of its own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(disk / "cache"))
    with contextlib.ExitStack() as stack:
        gateway = Gateway.of({path.name: path for path in reference.folder.iterdir()})
        if comm.rank == 0:
            stack.enter_context(gateway)
        gateway.url = broadcast(comm, gateway.url if comm.rank == 0 else "", str)
        yield gateway
        comm.Barrier()


@OF_TEXT
def test_what_no_rank_has_comes_from_the_store_once(comm, disk, reference, gateway):
    url, settings = f"ipfs://{gateway.root}", StorageConfig(gateways=gateway.url)
    corpus = open_corpus(comm, None, url, print, settings)
    assert corpus.folder.is_relative_to(disk)
    assert held(corpus.folder) == SMALL
    comm.Barrier()
    names = read_as_reference(comm, corpus, reference) | read_as_reference(comm, corpus, reference, "valid", 1)
    together = allgather(comm, (str(disk), sorted(names)), tuple[str, list[str]])
    of_disk = {name for other, found in together if other == str(disk) for name in found}
    assert held(corpus.folder) == of_disk | SMALL
    if comm.rank == 0:
        asked = [
            path for _, path, _ in gateway.asked if gateway.root not in path
        ]  # the list of the folder is read by each rank
        files = set().union(*(found for _, found in together)) | SMALL
        assert len(asked) == len(set(asked)) == len(files)  # each is one block
    again = open_corpus(comm, None, url, print, settings)
    before = len(gateway.asked)
    read_as_reference(comm, again, reference)
    assert len(gateway.asked) == before
    comm.Barrier()  # all have read
    for path in corpus.folder.glob("train-00003.h5"):
        path.unlink(missing_ok=True)
    gateway.blocks = {name: block for name, block in gateway.blocks.items() if name == gateway.root}
    comm.Barrier()
    with pytest.raises(UserError, match=r"no rank has .*/train-00003.h5, and it does not come from the store: .*404") as error:
        read_as_reference(comm, again, reference)
    assert error.value.shared


@ONE_EACH
@OF_TEXT
def test_nothing_of_a_private_corpus_is_copied(comm, disk, reference):
    for rank in range(comm.size):  # others have what a rank lacks, at the same place
        shutil.copytree(reference.folder, f"site{rank}")
    comm.Barrier()
    corpus = open_corpus(comm, None, "site{rank}", print)
    last, name = comm.rank == comm.size - 1, corpus.files("train")[0].name
    if last:
        (corpus.folder / name).unlink()
    before = sorted(disk.rglob("*"))
    with pytest.raises(UserError, match=rf"cannot read site{comm.size - 1}/{name}: No such file"):
        supply(comm, corpus, corpus.files("train"), print)
    if last:
        shutil.rmtree(f"site{comm.rank}")
    with pytest.raises(UserError, match=f"there is no prepared corpus at site{comm.size - 1}"):
        open_corpus(comm, None, "site{rank}", print)
    assert last or sorted(disk.rglob("*")) == before
    assert not last or f"site{comm.rank}" not in held(disk)


@ONE_EACH
@OF_TEXT
def test_an_empty_disk_gets_the_small_files_and_a_foreign_corpus_is_refused(comm, disk, reference):
    if comm.size == 1:
        return
    if comm.rank == 1:
        shutil.copytree(reference.folder, OUT)
    comm.Barrier()
    corpus = open_here(comm)
    assert corpus.hash == reference.hash
    if comm.rank == 0:
        manifest = json.loads((OUT / "manifest.json").read_text())
        manifest["splits"].pop("valid")
        (OUT / "manifest.json").write_text(json.dumps(manifest))
    comm.Barrier()
    with pytest.raises(UserError, match="the ranks do not agree on the corpus: rank 0 has"):
        open_here(comm)


def test_a_rank_that_names_further_files_writes_none_of_them(comm, place, disk, reference, monkeypatch):
    if comm.size == 1:
        return
    if comm.rank == 0:
        shutil.copytree(reference.folder, OUT)
        (OUT.parent / "evil").write_text("mine")
        monkeypatch.setattr("dllm.data.corpus.SMALL_FILES", ("tokenizer.json", "manifest.json", "../evil"))
    comm.Barrier()
    assert open_here(comm).hash == reference.hash
    shared = Domains.find(comm, OUT).of[comm.rank] == 0
    assert shared or {path.name for path in OUT.parent.rglob("*")} == {OUT.name, *SMALL}


def test_where_no_disk_has_a_corpus_that_is_said(comm, disk):
    with pytest.raises(UserError, match=f"there is no prepared corpus at {OUT}"):
        open_corpus(comm, None, str(OUT), print, StorageConfig())
    comm.Barrier()
    assert held(disk) == set()
