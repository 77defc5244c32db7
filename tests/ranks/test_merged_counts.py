"""Counts of all ranks come together on rank 0, a block at a time, and nowhere else; all ranks get the tokenizer."""

import collections

import pytest
from mpi4py import MPI

from dllm.data import vocabulary
from dllm.data.vocabulary import Vocabulary
from dllm.errors import UserError

pytestmark = pytest.mark.mpi


@pytest.mark.parametrize("block", [1, 60, 1 << 20])
def test_counts_are_added_up_on_rank_0_alone(block, monkeypatch):
    comm = MPI.COMM_WORLD
    monkeypatch.setattr(vocabulary, "BLOCK", block)
    of_rank = [
        {f"wörd\n{number % (7 + rank)}": 1 + number for number in range(5 * rank)} | {"of all": 1, "seen": 0}
        for rank in range(comm.size)
    ]
    expected = collections.Counter()
    for counts in of_rank:
        for unit, count in counts.items():
            expected[unit] += count
    merged = vocabulary.merge(comm, of_rank[comm.rank])
    assert dict(merged) == (dict(expected) if comm.rank == 0 else {})


def test_all_ranks_get_the_tokenizer_of_all_counts():
    comm = MPI.COMM_WORLD
    tokenizer = vocabulary.build(comm, Vocabulary("word"), {f"of {comm.rank}": 1, "all": 2}, False, print)
    assert tokenizer.units == ["all", *(f"of {rank}" for rank in range(comm.size))]


def test_a_count_below_nothing_is_refused():
    """Counts of one rank cannot take away from those of another."""
    comm = MPI.COMM_WORLD
    if comm.size == 1:
        return
    counts = {"word": -5 if comm.rank == comm.size - 1 else 9}
    if comm.rank == 0:
        with pytest.raises(UserError, match=f"rank {comm.size - 1} sent"):
            vocabulary.merge(comm, counts)
    else:
        assert not vocabulary.merge(comm, counts)
