"""Labels that ranks agree on: the same corpus by any number of ranks, and private texts of which each knows its own labels."""

import pathlib
import shutil
import tempfile

import numpy as np
import pytest
from helpers.labels import conllu, make_corpus, sentences
from mpi4py import MPI

from dllm.comm.messages import broadcast
from dllm.data import text
from dllm.data.corpus import Corpus, open_corpus
from dllm.data.label_files import LabelledFile
from dllm.data.labelling import Classing, Tagging
from dllm.data.preparation import prepare_corpus
from dllm.data.vocabulary import Vocabulary
from dllm.errors import UserError
from dllm.files import storage

pytestmark = pytest.mark.mpi


@pytest.fixture
def place(monkeypatch):
    comm = MPI.COMM_WORLD
    monkeypatch.setattr(storage, "flush", lambda path: None)  # which takes most of the time
    monkeypatch.setattr(text, "SHARD", 2000)
    path = pathlib.Path(broadcast(comm, tempfile.mkdtemp() if comm.rank == 0 else "", str))
    yield path
    comm.Barrier()
    if comm.rank == 0:
        shutil.rmtree(path)


def test_any_number_of_ranks_makes_the_same_corpus(place):
    world, hashes = MPI.COMM_WORLD, set()
    if world.rank == 0:
        examples = sentences(np.random.default_rng(3), 80)
        (place / "tags").write_text(conllu(examples))
        (place / "classes").write_text("".join(f"{tags[0]}\t{' '.join(words)}\n" for words, tags in examples))
    world.Barrier()
    for ranks in sorted({1, world.size}):
        comm = world.Split(0 if world.rank < ranks else MPI.UNDEFINED)
        if comm == MPI.COMM_NULL:
            continue
        for drawing, name in ((Tagging, "tags"), (Classing, "classes")):
            out = place / f"out-{name}-{ranks}"
            corpus = make_corpus(out, drawing(1, 9, {"valid": 0.2}), {"train": [place / name]}, "bpe", 270, comm)
            assert name == "classes" or len(corpus.split("train")["shards"]) > 1
            hashes.add(corpus.hash)
            comm.Barrier()
        comm.Free()
    assert len(hashes) == 2


def test_private_sites_that_know_other_labels_agree_on_all(place):
    comm = MPI.COMM_WORLD
    own, out = place / f"own{comm.rank}", place / f"out{comm.rank}"
    own.write_text(f"l{comm.rank}\tabc\nall\tcab\n")
    prepare_corpus(comm, {"train": [LabelledFile(own)]}, Vocabulary("byte"), out, private=True, drawing=Classing(1))
    labels = ["all", *(f"l{rank}" for rank in range(comm.size))]
    corpus = Corpus(out)
    assert corpus.labels == [*corpus.tokenizer.labels] == labels
    (_, classes) = corpus.read_records("train", corpus.split("train")["shards"][0])
    assert sorted(classes) == [0, 1 + comm.rank]


def test_what_one_rank_finds_wrong_ends_all_and_leaves_nothing(place):
    comm = MPI.COMM_WORLD
    own, out = place / f"own{comm.rank}", place / f"out{comm.rank}"
    own.write_text("a\tone\nb two\n" if comm.rank == comm.size - 1 else "a\tone\nb\ttwo\n")
    with pytest.raises(UserError, match=f"own{comm.size - 1} line 2 has no tab"):
        prepare_corpus(comm, {"train": [LabelledFile(own)]}, Vocabulary("byte"), out, private=True, drawing=Classing(1))
    assert not out.exists()


def test_ranks_with_other_labels_are_refused_and_told_none_of_them(place):
    comm = MPI.COMM_WORLD
    if comm.size == 1:
        pytest.skip("of several ranks")
    own, out = place / f"own{comm.rank}", place / f"out{comm.rank}"
    own.write_text(f"secret{comm.rank}\tabc\nall\tcab\n")
    files, wanted = {"train": [LabelledFile(own)]}, Vocabulary("byte")
    with pytest.raises(UserError, match="do not agree on the labels") as error:
        prepare_corpus(comm, files, wanted, out, private=True, drawing=Classing(1, names=("all", f"secret{comm.rank}")))
    assert "secret" not in str(error.value)
    prepare_corpus(MPI.COMM_SELF, files, wanted, out, private=True, drawing=Classing(1))
    comm.Barrier()
    with pytest.raises(UserError, match="do not agree on the labels") as error:
        open_corpus(comm, None, str(place / "out{rank}"), print)
    assert "secret" not in str(error.value)
