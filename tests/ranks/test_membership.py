"""Gossip with a rank that says what is no report."""

import json
import time
from typing import Annotated, TypedDict

import msgspec
import numpy as np
import pytest
from mpi4py import MPI

from dllm.comm.membership import ENTRY, TAG, Membership
from dllm.comm.messages import pack

pytestmark = pytest.mark.mpi

LIMIT = 20  # seconds


class Report(TypedDict):
    slots: Annotated[int, msgspec.Meta(ge=0, le=100)]
    host: Annotated[str, msgspec.Meta(max_length=8)]


def report(rank, **changes):
    return {"slots": rank, "host": "here", **changes}


def malformed(size):
    """Messages of the last rank about the others and itself."""
    last, fine = size - 1, report(size - 1)
    yield from (b"", b"{}", b"\xff" * 50, b"null", json.dumps({last: [1, fine]}).encode(), b"[" * (ENTRY - 20))
    values = (
        [], {}, 1, None, {last: 1}, {last: []}, {last: [1]}, {last: ["1", fine]}, {last: [-1, fine]}, {last: [2**60, fine]},
        {last: [1, {}]}, {last: [1, []]}, {last: [1, report(1, slots=-1)]}, {last: [1, report(1, slots=10**300)]},
        {last: [1, report(1, slots=True)]}, {last: [1, report(1, slots=None)]}, {last: [1, report(1, host="x" * 100)]},
        {last: [1, report(1, host=["a"])]}, {"x": [1, fine]}, {size: [1, fine]}, {-1: [1, fine]}, {10**30: [1, fine]},
        {0: [1, report(1, slots=None)]}, {"0": [1, fine], "x": [1, fine]},
    )  # fmt: skip
    yield from (json_message(value) for value in values)


def json_message(value):
    text = json.dumps(value).encode()
    return len(text).to_bytes(8, "little") + text


def until(condition):
    end = time.monotonic() + LIMIT
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_a_rank_that_sends_noise_is_as_if_it_were_silent_and_the_others_go_on():
    comm = MPI.COMM_WORLD
    last = comm.size - 1
    gossip = Membership(comm, lambda: report(comm.rank), Report)
    comm.Barrier()
    if comm.rank == last:
        requests = []
        for message in malformed(comm.size):
            data = np.frombuffer(message, np.uint8)
            requests += [(gossip.comm.Isend(data, rank, TAG), data) for rank in range(last)]
        for request, _ in requests:
            request.Wait()
    gossip.start()
    try:
        until(lambda: len(gossip.table()) == comm.size)
        begun = {rank: count for rank, (count, _) in gossip.known.items()}
        until(lambda: all(gossip.known[rank][0] > begun[rank] + 5 for rank in begun))
        assert gossip.is_alive()
        assert {rank: known[1] for rank, known in gossip.known.items()} == {rank: report(rank) for rank in range(comm.size)}
        assert not gossip.dead
        time.sleep(1.0)  # all have looked before any ends
    finally:
        gossip.end()


def test_nobody_tells_a_rank_of_itself():
    comm = MPI.COMM_WORLD
    gossip = Membership(comm, lambda: report(comm.rank), Report)
    gossip.take(pack({comm.rank: (5, report(99)), 1 - min(comm.rank, 1): (7, report(3))}))
    assert comm.rank not in gossip.known
    assert gossip.known == ({1 - min(comm.rank, 1): (7, report(3))} if comm.size > 1 else {})
    gossip.comm.Free()
