"""comm/: averaging is a plain sum whatever the buckets; all ranks agree on errors. Written for any number of ranks."""

import mmap
import os
import pathlib
import time
from types import SimpleNamespace

import numpy as np
import pytest
from helpers.counting_comm import Counting

from dllm.comm import runtime
from dllm.comm.allreduce import Allreduce
from dllm.comm.control import Control
from dllm.comm.neighbours import mean
from dllm.comm.node_allreduce import NodeAllreduce
from dllm.comm.node_info import find_node, leader_first
from dllm.comm.shared_memory import SharedMemory, share
from dllm.errors import UserError
from dllm.files import starter

pytestmark = pytest.mark.mpi
SEEDS = range(2 if max(starter.launched_sizes(), default=1) > 4 else 5)  # on many ranks a case takes half a second
NOTHING = Control()
EVERYWHERE = pytest.mark.parametrize("nodes", [0, 1, 2])


@pytest.fixture
def comm():
    return runtime.world()


@pytest.fixture(autouse=True)
def _in_step(comm):
    """Ranks begin each test together."""
    comm.barrier()


class Case:
    """Random gradients and how they are announced: the same shape on all ranks, the order of calls differs.

    whole : the values are whole numbers, so that their sum does not depend on the order in which it is formed
    nodes : how many nodes the ranks pretend to be on, each with shared memory; 0: messages alone
    """

    def __init__(self, comm, seed, dtype, whole, sparse=None, scattered=True, nodes=0):
        everyone, own = np.random.default_rng(seed), np.random.default_rng([seed, comm.rank])
        self.comm, self.own, self.dtype, self.whole = comm, own, dtype, whole
        self.V, self.E, self.dense = (int(everyone.integers(1, high)) for high in (60, 9, 5000))
        self.n = int(everyone.integers(1, 12))
        if sparse is not None:  # fewer tokens than half of the rows, or not
            self.V = 2 * self.n * comm.size + 2 + int(everyone.integers(0, 9)) if sparse else self.n * comm.size
        self.P = self.dense + self.V * self.E
        self.gradient = np.zeros(self.P, dtype)
        bucket = int(everyone.integers(1, 4 * self.P))
        table = SimpleNamespace(start=self.dense, shape=(self.V, self.E)) if scattered else None
        memory = None
        if nodes:
            node = comm.Split(comm.rank * nodes // comm.size, comm.rank)
            memory = share(comm, node, self.P, dtype)
            if memory is not None:
                self.gradient = memory.mine
        arguments = table, self.n, bucket, everyone.random() < 0.5
        if memory is None:
            self.averaging = Allreduce(comm, self.gradient, *arguments)
        else:
            self.averaging = NodeAllreduce(comm, node, memory, *arguments)
        assert isinstance(self.averaging, NodeAllreduce) == (nodes > 0 and comm.size % nodes == 0 and comm.size > nodes)
        self.averaging.comm = self.counting = Counting(self.averaging.comm)
        self.scattered = scattered

    def draw(self):
        """This rank's next gradient (P,) and the embedding rows it uses."""
        mine = self.own.integers(-99, 99, self.P) if self.whole else self.own.normal(size=self.P)
        tokens = self.own.integers(0, self.V, int(self.own.integers(0, self.n + 1)))
        mine = mine.astype(self.dtype)
        if self.scattered:
            unused = np.ones(self.V, bool)
            unused[tokens] = False
            mine[self.dense :].reshape(self.V, self.E)[unused] = 0
        return mine, tokens

    def step(self, mine, tokens, control=NOTHING):
        """A training step's calls; like a backward, it writes a part of the gradient just before it announces it."""
        averaging, own, P = self.averaging, self.own, self.P
        averaging.begin(tokens, control)
        cuts = sorted({P, self.dense, *own.integers(1, P + 1, int(own.integers(0, 9))).tolist()})
        start = 0
        for stop in cuts:
            if self.scattered and start >= self.dense:
                self.gradient[start:stop] += mine[start:stop]
            else:
                self.gradient[start:stop] = mine[start:stop]
            averaging.ready(slice(start, stop))
            for _ in range(own.integers(0, 3)):
                averaging.progress()
            start = stop
        found = averaging.gradient()
        self.squares, parts, rows = found.squares, found.parts, found.rows
        assert [first for first, _ in parts] == [0, *np.cumsum([len(part) for _, part in parts])[:-1]]
        return np.concatenate([part for _, part in parts]), rows

    def plain_sum(self, mine):
        total = np.empty_like(mine)
        self.comm.Allreduce(mine, total)
        return total

    def check(self, sparse):
        """Three steps against the plain sum. Before each the dense part is rubbish: only what is final may be sent."""
        for _ in range(3):
            self.gradient[: self.dense if self.scattered else self.P] = np.nan
            mine, tokens = self.draw()
            gradient, rows = self.step(mine, tokens)
            expected = self.plain_sum(mine)
            union = sorted(set(np.concatenate(self.comm.allgather(tokens)).astype(int).tolist()))
            assert (rows is None) != sparse
            if sparse:
                assert rows.tolist() == union
            if self.whole or self.comm.size == 1:
                assert np.array_equal(gradient, expected)
            else:
                limit = 4 * self.comm.size * np.finfo(self.dtype).eps
                assert np.abs(gradient - expected).max() <= limit * np.abs(mine).max() * self.comm.size
            assert len(set(self.comm.allgather(gradient.tobytes()))) == 1
            squares = self.squares
            if squares is not None:
                assert squares == pytest.approx(
                    (gradient[: self.dense if sparse else None].astype(np.float64) ** 2).sum(), rel=1e-5
                )
                assert len(set(self.comm.allgather(float(squares)))) == 1
            self.averaging.clear()
            if self.scattered:
                assert not self.gradient[self.dense :].any()


@EVERYWHERE
@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("seed", SEEDS)
def test_scattered_rows_are_summed_over_the_union_of_rows_and_the_others_stay_zero(comm, seed, dtype, whole, nodes):
    Case(comm, seed, dtype, whole, nodes=nodes, sparse=True).check(sparse=True)


@EVERYWHERE
@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("seed", SEEDS)
def test_a_scattered_embedding_with_few_rows_is_summed_whole(comm, seed, dtype, whole, nodes):
    Case(comm, seed, dtype, whole, nodes=nodes, sparse=False).check(sparse=False)


@EVERYWHERE
@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("seed", SEEDS)
def test_a_tied_embedding_is_overwritten_and_summed_whole(comm, seed, dtype, whole, nodes):
    Case(comm, seed, dtype, whole, nodes=nodes, scattered=False).check(sparse=False)


@EVERYWHERE
@pytest.mark.parametrize("sparse", [True, False])
def test_the_same_gradients_are_summed_to_the_same_bits_again(comm, sparse, nodes):
    results = []
    for _ in range(2):
        case = Case(comm, 3, np.float32, whole=False, sparse=sparse, nodes=nodes)
        for _ in range(4):
            mine, tokens = case.draw()
            results.append(case.step(mine, tokens)[0].tobytes())
            case.averaging.clear()
    assert results[:4] == results[4:]


def test_control_values_are_combined_by_maximum(comm):
    case = Case(comm, 5, np.float32, whole=True)
    for step in range(5):
        case.step(*case.draw(), control=Control(stop=comm.rank == step % comm.size, unsound=comm.rank + step))
        assert case.averaging.agreed() == Control(stop=True, unsound=comm.size - 1 + step)
        case.averaging.clear()


@pytest.mark.parametrize("sparse", [True, False])
def test_the_bytes_counted_are_those_that_mpi_has_to_send_and_none_on_one_rank(comm, sparse):
    case = Case(comm, 7, np.float32, whole=True, sparse=sparse)
    for _ in range(3):
        case.step(*case.draw())
        case.averaging.clear()
    assert case.averaging.bytes_sent == case.counting.sent
    if comm.size > 1:
        assert case.averaging.bytes_sent >= 3 * 4 * case.dense
        assert 0 < case.averaging.exposed_seconds < 60
        assert 0 < case.averaging.flight_seconds < 60


@pytest.mark.parametrize("length", [1, 100, 5000, 100_001])
def test_the_mean_of_long_vectors_in_short_messages_is_that_of_numpy(comm, length):
    everyone = np.random.default_rng(length).standard_normal((comm.size, length))
    for bucket_bytes in (4096, 1 << 22):
        out = np.empty(length)
        mean(comm, everyone[comm.rank], out, bucket_bytes)
        np.testing.assert_allclose(out, everyone.mean(axis=0), rtol=0, atol=1e-14)
        own = everyone[comm.rank].copy()
        mean(comm, own, own, bucket_bytes)
        np.testing.assert_array_equal(own, out)


def test_shared_memory_is_read_by_all_ranks_of_a_node_and_leaves_nothing_behind(comm):
    before = set(pathlib.Path("/dev/shm").iterdir())
    memory = SharedMemory(comm, 1000, np.float32)
    assert memory.mine.shape == (1000,)
    assert not memory.vectors.any()
    comm.barrier()
    memory.mine[:] = comm.rank + 1
    comm.barrier()
    np.testing.assert_array_equal(memory.vectors[:, 7], np.arange(comm.size) + 1)
    comm.barrier()
    assert set(pathlib.Path("/dev/shm").iterdir()) <= before


def test_where_one_rank_has_no_shared_memory_all_do_without(comm, monkeypatch):
    if comm.rank == comm.size - 1:
        monkeypatch.setattr(mmap, "mmap", lambda *_: (_ for _ in ()).throw(OSError("no room")))
    assert share(comm, comm, 100, np.float32) is None


def test_together_raises_the_error_of_the_lowest_rank_that_failed_on_all_ranks(comm):
    def work(failing):
        if comm.rank >= failing:
            raise UserError(f"nothing at place {comm.rank}")

    for failing in {0, comm.size - 1, comm.size // 2}:
        with pytest.raises(UserError) as caught:
            runtime.agree(comm, work, failing)
        assert caught.value.shared
        suffix = f" (rank {failing})" if failing else ""
        assert str(caught.value) == f"nothing at place {failing}{suffix}"


def test_together_turns_an_error_of_the_system_into_one_line(comm):
    path = pathlib.Path("/nowhere/at/all" if comm.rank == comm.size - 1 else __file__)
    with pytest.raises(UserError, match=r"FileNotFoundError.*nowhere") as caught:
        runtime.agree(comm, path.read_bytes)
    assert "\n" not in str(caught.value)


def test_together_is_silent_where_nobody_fails(comm):
    with runtime.together(comm):
        pass
    assert runtime.agree(comm, lambda number: number + comm.rank, 5) == 5 + comm.rank


def test_check_same_names_the_fact_and_the_rank_that_differs(comm):
    runtime.check_same(comm, {"lr": 0.1, "code": "abc"})
    last = comm.size - 1
    facts = {"lr": 0.1, "code": "changed" if comm.rank == last else "abc"}
    if last == 0:
        runtime.check_same(comm, facts)
        return
    with pytest.raises(UserError, match=f"the code: rank 0 has abc, rank {last} has changed") as caught:
        runtime.check_same(comm, facts)
    assert caught.value.shared
    assert "lr" not in str(caught.value)


@pytest.mark.parametrize("more", [{"new": 1}, {"new": 1, "newer": "\udcff"}])
def test_check_same_ends_where_ranks_have_different_facts(comm, more):
    last = comm.size - 1
    for facts in ({"lr": 0.1, **more}, {**more, "lr": 0.1}):
        if last:
            with pytest.raises(UserError, match="the ranks do not agree on the ") as caught:
                runtime.check_same(comm, facts if comm.rank == last else {"lr": 0.1})
            assert caught.value.shared


def test_one_rank_of_a_node_goes_first(comm):
    place = find_node(comm)
    with leader_first(place) as leads:
        entered = time.monotonic()
        if leads:
            time.sleep(0.2)
        left = time.monotonic()
    assert leads == (place.rank == 0)
    times = place.comm.allgather((leads, entered, left))
    assert [leads for leads, _, _ in times].count(True) == 1
    assert all(entered >= times[0][2] for leads, entered, _ in times if not leads)


def test_as_many_ranks_go_first_as_there_are_cores_for(comm):
    place = find_node(comm)
    with leader_first(place, 2) as leads:
        entered = time.monotonic()
        if leads:
            time.sleep(0.2)
        left = time.monotonic()
    assert leads == (place.rank < min(2, place.cores))
    times = place.comm.allgather((leads, entered, left))
    assert all(entered >= max(left for first, _, left in times if first) for leads, entered, _ in times if not leads)


def test_a_leader_that_fails_does_not_keep_the_others_waiting(comm):
    place = find_node(comm)

    def work():
        with leader_first(place) as leads:
            if leads:
                raise UserError("no compiler")

    with pytest.raises(UserError, match="no compiler"):
        runtime.agree(comm, work)


def test_a_node_numbers_its_ranks_and_shares_out_its_cores(comm):
    place = find_node(comm)
    assert place.comm.allgather(place.rank) == list(range(place.ranks))
    assert place.ranks == place.comm.size <= comm.size
    assert place.cores >= 1
    assert place.threads == max(1, place.cores // place.ranks)
    assert len(set(place.comm.allgather(place.cores))) == 1
    assert place.oversubscribed == (comm.size > min(place.cores, os.cpu_count()))  # one machine


def test_the_name_of_the_library_is_one_line(comm):
    assert runtime.mpi_library().startswith(("MPICH", "Open MPI"))
    assert "\n" not in runtime.mpi_library()


def test_all_ranks_leave_together(comm):
    if comm.rank == 0:
        time.sleep(0.1)
    before = time.monotonic()
    runtime.finish(comm)
    assert comm.size == 1 or max(comm.allgather(time.monotonic() - before)) > 0.03
