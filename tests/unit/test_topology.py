"""Topologies against networkx, their weights against sums, spectral gaps against closed forms, and what is refused."""

import functools
import math
import os
import subprocess
import sys
import time

import networkx as nx
import numpy as np
import pytest
from helpers.graphs import both_ways, edges, refusal
from hypothesis import given, settings
from hypothesis import strategies as st

from dllm.comm import topology
from dllm.comm.topology import NAMES, Topology, make_topology, spectral_gap, weights
from dllm.errors import UserError

FEW = settings(max_examples=60, deadline=None, derandomize=True, database=None)
EVERY_NAME = pytest.mark.parametrize("name", NAMES)
SIZES = [1, 2, 3, 4, 5, 6, 7, 8, 9, 12, 16, 30, 32]


def possible(name, size):
    """A topology of that name and size, with a degree that it can have; None where there is none."""
    if name == "hypercube" and size & (size - 1):
        return None
    degree = {"erdos-renyi": 6.5, "random-regular": 2 + (size > 4) * (1 + size % 2)}.get(name, 3)
    return make_topology(name, size, degree)


def everything(sizes):
    """Every topology of these sizes."""
    return [found for name in NAMES for size in sizes if (found := possible(name, size))]


def expected(name, n):
    """The edges that networkx makes for a topology without chance."""
    if name == "torus":
        a = max(a for a in range(1, n) if n % a == 0 and a * a <= n)
        if a > 1:
            graph = nx.grid_2d_graph(a, n // a, periodic=True)
            return [[r * (n // a) + c for r, c in edge] for edge in graph.edges]
        name = "ring"
    if name == "hypercube":
        graph = nx.hypercube_graph(n.bit_length() - 1)
        return [[int("".join(map(str, node)), 2) for node in edge] for edge in graph.edges]
    makers = {
        "ring": nx.cycle_graph,
        "complete": nx.complete_graph,
        "star": lambda n: nx.star_graph(n - 1),
        "tree": lambda n: nx.full_rary_tree(2, n),
    }
    return makers[name](n).edges


@pytest.mark.parametrize("size", [3, 4, 6, 7, 8, 9, 12, 16, 30, 64])
@pytest.mark.parametrize("name", ["ring", "torus", "hypercube", "complete", "star", "tree"])
def test_fixed_topologies_are_those_of_networkx(name, size):
    found = possible(name, size)
    if found:
        assert edges(found) == both_ways(expected(name, size))
        assert len(found.phases) == 1
        assert not found.directed


@pytest.mark.parametrize(
    ("name", "size", "degrees"),
    [
        ("ring", 8, {2}),
        ("torus", 36, {4}),
        ("torus", 10, {3}),  # 2 x 5: the way up is the way down
        ("torus", 7, {2}),
        ("hypercube", 16, {4}),
        ("exponential", 16, {4}),
        ("exponential", 17, {5}),
        ("one-peer-exponential", 16, {1}),
        ("complete", 9, {8}),
        ("star", 9, {1, 8}),
        ("tree", 15, {1, 2, 3}),
        ("random-regular", 16, {3}),
    ],
)
def test_degrees(name, size, degrees):
    found = make_topology(name, size)
    for phase in range(len(found.phases)):
        assert {len(found.receivers(phase, rank)) for rank in range(size)} == degrees
        assert {len(found.senders(phase, rank)) for rank in range(size)} == degrees


@pytest.mark.parametrize("size", [2, 3, 5, 8, 11, 16])
def test_exponential_graphs_of_one_peer_and_of_all(size):
    """Ying et al. 2021: i sends to i + 2^k, of all k at once or of one after the other."""
    static, one = make_topology("exponential", size), make_topology("one-peer-exponential", size)
    hops = math.ceil(math.log2(size))
    assert len(one.phases) == hops
    for k in range(hops):
        assert edges(one, k) == {(i, (i + 2**k) % size) for i in range(size)}
    assert edges(static) == set().union(*(edges(one, k) for k in range(hops)))
    assert [one.phase(step) for step in range(2 * hops)] == [*range(hops), *range(hops)]
    assert static.directed is (size > 3)
    assert one.directed is (size > 2)


@FEW
@given(st.integers(3, 40), st.data())
def test_random_regular_graphs_are_regular_and_connected(size, data):
    degree = data.draw(st.sampled_from(range(2, size, 1 + size % 2)))
    found = make_topology("random-regular", size, degree, seed=data.draw(st.integers(0, 99)))
    graph = nx.Graph(edges(found))
    assert dict(graph.degree) == dict.fromkeys(range(size), degree)
    assert nx.is_connected(graph)
    assert not found.directed


def test_random_graphs_have_the_degree_asked_for_and_differ_by_seed():
    found = [make_topology("erdos-renyi", 200, degree=12, seed=100 * seed) for seed in range(20)]
    mean = np.mean([len(edges(graph)) / 200 for graph in found])
    assert mean == pytest.approx(12, abs=0.3)  # 5 standard deviations: each has one of 12 / sqrt(1200)
    for name in ("erdos-renyi", "random-regular"):
        assert len({make_topology(name, 32, degree=6, seed=100 * seed).phases for seed in range(10)}) == 10


@pytest.mark.parametrize("found", everything(SIZES), ids=lambda found: f"{found.name}-{found.size}")
def test_what_holds_for_every_topology(found):
    union = nx.DiGraph()
    union.add_nodes_from(range(found.size))
    directed = False
    for phase in range(len(found.phases)):
        graph = nx.DiGraph()
        graph.add_nodes_from(range(found.size))
        graph.add_edges_from(edges(found, phase))
        for rank in range(found.size):
            assert found.receivers(phase, rank) == tuple(sorted(set(graph.successors(rank)) - {rank}))
            assert found.senders(phase, rank) == tuple(sorted(graph.predecessors(rank)))
        directed = directed or any(not graph.has_edge(b, a) for a, b in graph.edges)
        union.update(graph)
    assert found.directed is directed
    assert found.strongly_connected
    assert nx.is_strongly_connected(union)
    assert found.is_tree is (not directed and len(found.phases) == 1 and nx.is_tree(union.to_undirected()))
    for matrix in weights(found, "column"):
        np.testing.assert_allclose(matrix.sum(0), 1)
    for matrix in weights(found, "uniform"):
        np.testing.assert_allclose(matrix.sum(1), 1)
    if not directed:
        (matrix,) = weights(found, "metropolis")
        np.testing.assert_array_equal(matrix, matrix.T)
        assert topology.is_doubly_stochastic(matrix)
        assert 0 < spectral_gap([matrix]) <= 1


@EVERY_NAME
def test_one_rank_and_two_ranks(name):
    alone, pair = make_topology(name, 1), make_topology(name, 2)
    assert alone.phases == (((),),)
    assert pair.phases == (((1,), (0,)),)
    for found in (alone, pair):
        assert found.strongly_connected
        assert found.is_tree
        for kind in topology.WEIGHTS:
            (matrix,) = weights(found, kind)
            np.testing.assert_array_equal(matrix, np.full((found.size, found.size), 1 / found.size))
            assert spectral_gap([matrix]) == 1


def test_what_is_no_tree():
    assert not make_topology("ring", 3).is_tree
    assert not make_topology("exponential", 5).is_tree
    forest = Topology("forest", 4, (((1,), (0,), (3,), (2,)),))
    assert not forest.is_tree
    assert not forest.strongly_connected
    assert spectral_gap(weights(forest, "metropolis")) == pytest.approx(0, abs=1e-12)
    assert not Topology("one way", 2, (((1,), ()),)).is_tree


def test_phases_are_connected_together_though_none_is_by_itself():
    found = Topology("two", 4, (((1,), (0,), (3,), (2,)), ((3,), (2,), (1,), (0,))))
    assert found.strongly_connected
    assert not found.directed
    assert not found.is_tree
    assert spectral_gap(weights(found, "metropolis")) == 1


def test_the_entry_of_a_weight_is_receiver_then_sender():
    found = Topology("path", 3, (((1,), (2,), ()),))  # 0 > 1 > 2
    (uniform,), (column,) = weights(found, "uniform"), weights(found, "column")
    np.testing.assert_array_equal(uniform, [[1, 0, 0], [0.5, 0.5, 0], [0, 0.5, 0.5]])
    np.testing.assert_array_equal(column, [[0.5, 0, 0], [0.5, 0.5, 0], [0, 0.5, 1]])
    (star,) = weights(make_topology("star", 3), "metropolis")
    np.testing.assert_allclose(star, np.array([[1, 1, 1], [1, 2, 0], [1, 0, 2]]) / 3)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(
    "name", ["ring", "torus", "hypercube", "exponential", "one-peer-exponential", "complete", "random-regular"]
)
def test_uniform_weights_are_doubly_stochastic_where_degrees_are_equal(name, size):
    found = possible(name, size)
    if found:
        for one, other in zip(weights(found, "uniform"), weights(found, "column"), strict=True):
            assert topology.is_doubly_stochastic(one)
            np.testing.assert_allclose(one, other)


def test_what_is_stochastic():
    rows = np.array([[0.5, 0.5], [0.25, 0.75]])
    assert topology.is_row_stochastic(rows)
    assert not topology.is_column_stochastic(rows)
    assert topology.is_column_stochastic(rows.T)
    assert not topology.is_doubly_stochastic(rows)
    assert not topology.is_row_stochastic(np.array([[2.0, -1.0], [0.0, 1.0]]))
    assert not topology.is_row_stochastic(np.eye(2) * (1 - 1e-9))
    (star,) = weights(make_topology("star", 5), "uniform")
    assert topology.is_row_stochastic(star)
    assert not topology.is_column_stochastic(star)


@pytest.mark.parametrize("size", [3, 4, 5, 8, 17, 64])
def test_gap_of_a_ring(size):
    for kind in topology.WEIGHTS:
        gap = spectral_gap(weights(make_topology("ring", size), kind))
        assert gap == pytest.approx(1 - (1 + 2 * math.cos(2 * math.pi / size)) / 3, abs=1e-12)


@pytest.mark.parametrize(("a", "b"), [(3, 3), (3, 4), (4, 4), (5, 7), (8, 8)])
def test_gap_of_a_torus(a, b):
    gap = spectral_gap(weights(make_topology("torus", a * b), "uniform"))
    assert gap == pytest.approx(2 * (1 - math.cos(2 * math.pi / b)) / 5, abs=1e-12)


@pytest.mark.parametrize("log2", range(1, 7))
def test_gaps_of_powers_of_two(log2):
    size = 2**log2
    assert spectral_gap(weights(make_topology("hypercube", size), "uniform")) == pytest.approx(2 / (1 + log2), abs=1e-12)
    assert spectral_gap(weights(make_topology("complete", size), "uniform")) == 1
    matrices = weights(make_topology("one-peer-exponential", size), "uniform")
    assert len(matrices) == log2
    for order in (matrices, matrices[::-1], matrices[1:] + matrices[:1]):  # circulants commute
        product = functools.reduce(np.matmul, order)
        np.testing.assert_array_equal(product, np.full((size, size), 1 / size))
    assert spectral_gap(matrices) == 1


@pytest.mark.parametrize("size", [4, 6, 10, 12, 16, 22, 64, 100])
def test_gap_of_exponential_graphs(size):
    """Ying et al. 2021, proposition 1, for even n."""
    gap = spectral_gap(weights(make_topology("exponential", size), "uniform"))
    assert gap == pytest.approx(2 / (1 + math.ceil(math.log2(size))), abs=1e-9)


@pytest.mark.parametrize("degree", [3, 6, 12])
def test_gap_of_large_random_regular_graphs(degree):
    """Friedman 2003: |lambda_2| of the adjacency matrix is at most 2 sqrt(d - 1) + epsilon; Alon, Boppana: nor much less."""
    (matrix,) = weights(make_topology("random-regular", 512, degree), "uniform")
    assert spectral_gap([matrix]) == pytest.approx((degree - 2 * math.sqrt(degree - 1)) / (1 + degree), abs=0.03)


@pytest.mark.parametrize("size", [3, 5, 6, 12, 23])
def test_gap_of_several_phases_is_a_rate_per_step(size):
    """The phases are circulants: eigenvalue m of their product is that of (1 + w^(m 2^k)) / 2, w the root of unity."""
    hops = (size - 1).bit_length()
    roots = np.exp(2j * np.pi * np.outer(np.arange(1, size), 2 ** np.arange(hops)) / size)
    second = abs(np.prod((1 + roots) / 2, axis=1)).max()
    matrices = weights(make_topology("one-peer-exponential", size), "uniform")
    assert spectral_gap(matrices) == pytest.approx(1 - second ** (1 / hops), abs=1e-9)
    twice = spectral_gap(matrices * 2)
    assert twice == pytest.approx(spectral_gap(matrices), abs=1e-9)


def test_the_gap_is_how_fast_a_difference_shrinks():
    (matrix,) = weights(make_topology("tree", 12), "metropolis")
    x = np.random.default_rng(0).normal(size=12)
    far = [np.linalg.norm(np.linalg.matrix_power(matrix, steps) @ (x - x.mean())) for steps in (400, 401)]
    assert far[1] / far[0] == pytest.approx(1 - spectral_gap([matrix]), rel=1e-9)


@EVERY_NAME
def test_the_same_in_every_process(name):
    """Sets are walked through in an order that PYTHONHASHSEED may change."""
    source = f"from dllm.comm.topology import make_topology; print(make_topology({name!r}, 64, 8, 3).phases)"
    found = {str(make_topology(name, 64, 8, 3).phases)}
    for seed in ("1", "2") if name in ("random-regular", "erdos-renyi") else ():
        environment = os.environ | {"PYTHONHASHSEED": seed}
        run = subprocess.run([sys.executable, "-c", source], env=environment, capture_output=True, text=True, check=True)
        found.add(run.stdout.strip())
    assert found == {str(make_topology(name, 64, 8, 3).phases)}
    assert make_topology(name, 64, 8, 3) == make_topology(name, 64, 8, 3)


@EVERY_NAME
def test_many_ranks_take_little_time(name):
    begin = time.process_time()
    found = make_topology(name, 4096, degree=12)
    assert time.process_time() - begin < 3
    assert found.size == len(found.phases[0]) == 4096


def test_a_random_graph_that_falls_apart_does_so_in_bounded_time():
    begin = time.process_time()
    assert "100 graphs of 2048 ranks with degree 3 fell apart; take 9 or more" in refusal("erdos-renyi", 2048)
    assert time.process_time() - begin < 20
    assert make_topology("erdos-renyi", 2048, degree=9).strongly_connected


def test_refused_names():
    assert refusal("rnig", 4).startswith("topology 'rnig' is neither a file nor one of ring, torus, hypercube, exponential,")
    assert refusal("rnig", 4).endswith("; did you mean 'ring'?")
    assert refusal("Hyper-cube", 4).endswith("erdos-renyi; did you mean 'hypercube'?")
    for name in ("", "xyzzy", "no/such\nfile", "x" * 5000, "nul\0"):
        assert refusal(name, 4).endswith("one of " + ", ".join(NAMES))


@pytest.mark.parametrize(
    ("name", "size", "degree", "message"),
    [
        ("hypercube", 6, 3, "topology hypercube takes a power of two ranks, 4 or 8, not 6"),
        ("hypercube", 3, 3, "topology hypercube takes a power of two ranks, 2 or 4, not 3"),
        ("hypercube", 1000, 3, "topology hypercube takes a power of two ranks, 512 or 1024, not 1000"),
        ("random-regular", 7, 3, "topology random-regular of 7 ranks cannot have degree 3: take 4"),
        ("random-regular", 8, 8, "topology random-regular of 8 ranks cannot have degree 8: take 7"),
        ("random-regular", 9, 50, "topology random-regular of 9 ranks cannot have degree 50: take 8"),
        ("random-regular", 8, 1, "topology random-regular of 8 ranks cannot have degree 1: take 2"),
        ("random-regular", 3, -1, "topology random-regular of 3 ranks cannot have degree -1: take 2"),
        ("erdos-renyi", 300, 1, "topology erdos-renyi: 100 graphs of 300 ranks with degree 1 fell apart; take 7 or more"),
        ("erdos-renyi", 9, 0, "topology erdos-renyi: 100 graphs of 9 ranks with degree 0 fell apart; take 4 or more"),
    ],
)
def test_refused_sizes_and_degrees(name, size, degree, message):
    assert refusal(name, size, degree) == message
    if name != "hypercube":
        make_topology(name, size, int(message.split("take ")[1].split()[0]))
    else:
        assert {make_topology(name, int(word)).size for word in message.split("ranks, ")[1].split(", not")[0].split(" or ")}


@pytest.mark.parametrize("name", ["exponential", "one-peer-exponential"])
def test_refused_weights(name):
    message = f"topology {name} has edges of one way, metropolis weights need both: take uniform"
    with pytest.raises(UserError, match=f"^{message}$"):
        weights(make_topology(name, 8), "metropolis")
    with pytest.raises(UserError, match=r"^weights 'metro': they are one of metropolis, uniform, column$"):
        weights(make_topology(name, 8), "metro")
