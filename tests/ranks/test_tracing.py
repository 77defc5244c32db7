"""comm/tracing.py on real ranks: what is recorded of messages changes no sum, and stops when it is told to; clocks of hosts."""

import time
from types import SimpleNamespace

import numpy as np
import pytest

from dllm.comm import runtime, tracing
from dllm.comm.allreduce import Allreduce
from dllm.comm.control import Control
from dllm.comm.messages import allgather
from dllm.comm.node_allreduce import NodeAllreduce
from dllm.comm.node_info import find_node
from dllm.comm.shared_memory import SharedMemory

pytestmark = pytest.mark.mpi
P, BUCKET, STEPS = 1000, 400, 3  # elements; bytes; 10 buckets of float32


@pytest.fixture
def comm():
    found = runtime.world()
    found.barrier()
    return found


def step(averaging, vector, seed, rank):
    """A step as a model would take it; the sum, copied."""
    averaging.begin(np.zeros(0, np.int64), Control())
    vector[:] = np.random.default_rng([seed, rank]).integers(0, 9, P)
    for start in range(0, P, 100):
        averaging.ready(slice(start, start + 100))
        averaging.progress()
    parts = averaging.gradient().parts
    total = np.concatenate([part for _, part in parts]).copy()
    averaging.clear()
    averaging.agreed()
    return total


def make(comm, shared):
    if not shared:
        vector = np.zeros(P, np.float32)
        return Allreduce(comm, vector, None, 1, BUCKET), vector
    memory = SharedMemory(comm, P, np.float32)
    return NodeAllreduce(comm, find_node(comm).comm, memory, None, 1, BUCKET), memory.mine


@pytest.mark.parametrize("shared", [False, True])
def test_messages_are_recorded_and_sums_stay_what_they_are(comm, shared):
    shared = shared and comm.size > 1  # one rank shares its memory with nobody
    averaging, vector = make(comm, shared)
    before = dict(vars(averaging))
    recorder = tracing.Recorder()
    recorder.watch_messages(averaging)
    begin = time.perf_counter()
    for seed in range(STEPS):
        expected = sum(np.random.default_rng([seed, rank]).integers(0, 9, P) for rank in range(comm.size))
        np.testing.assert_array_equal(step(averaging, vector, seed, comm.rank), expected)
    end, taken = time.perf_counter(), len(recorder.messages)
    marks = allgather(comm, recorder.marks, list[tuple[int, int, float]])
    recorder.end()
    assert {name for name in before if before[name] is not getattr(averaging, name)} <= {
        name for name in before if isinstance(before[name], int | float | list | slice | np.ndarray) or before[name] is None
    }
    step(averaging, vector, 9, comm.rank)
    assert len(recorder.messages) == taken  # it has stepped aside
    messages = [one for one in recorder.messages if one.size == BUCKET]
    if shared:
        names = tracing.stages(averaging)
        messages = [one for one in tracing.in_memory(marks, names)[comm.rank] if one.size == BUCKET]
        assert [one.name for one in messages[:10]] == [f"bucket {number:02d}" for number in range(10)] or comm.size == 1
    assert len(messages) == (10 * STEPS if comm.size > 1 else 0)
    assert all(begin <= one.begin <= one.end <= end + 60 for one in messages)
    averaging.end()


def test_clocks_of_one_host_are_one_and_those_of_others_are_found(comm, monkeypatch):
    offsets, doubt = tracing.clock_offsets(comm)
    assert offsets.tolist() == [0.0] * comm.size
    assert (doubt < 1).all()
    ahead = 5.0 * comm.rank
    monkeypatch.setattr(tracing, "time", SimpleNamespace(perf_counter=lambda: time.perf_counter() + ahead))
    offsets, doubt = tracing.clock_offsets(comm)
    assert (np.abs(offsets - 5.0 * np.arange(comm.size)) <= doubt).all()
    assert (doubt < 1).all()
