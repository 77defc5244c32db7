"""Edges of topologies, and the line with which one is refused."""

import pytest

from dllm.comm.topology import make_topology
from dllm.errors import UserError


def edges(found, phase=0):
    return {(rank, to) for rank in range(found.size) for to in found.receivers(phase, rank)}


def both_ways(pairs):
    return {pair for a, b in pairs if a != b for pair in ((a, b), (b, a))}


def refusal(*arguments, **options):
    """The line with which make refuses."""
    with pytest.raises(UserError) as error:
        make_topology(*arguments, **options)
    assert "\n" not in str(error.value)
    return str(error.value)
