"""Files of edges: what they mean, against networkx, and what is refused."""

import networkx as nx
import pytest
from helpers.graphs import both_ways, edges, refusal
from hypothesis import given, settings
from hypothesis import strategies as st

from dllm.comm.topology import NAMES, make_topology

FEW = settings(max_examples=60, deadline=None, derandomize=True, database=None)
EVERY_NAME = pytest.mark.parametrize("name", NAMES)
SIZES = [1, 2, 3, 4, 5, 6, 7, 8, 9, 12, 16, 30, 32]


@pytest.fixture
def file(tmp_path):
    """Writes a file of edges, returns its path."""

    def write(content):
        path = tmp_path / "edges.txt"
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return str(path)

    return write


def test_a_file_of_edges(file):
    path = file("# a path of four\n\n0 1\n 2\t1 # twice\n1 2\r\n3 2 {'weight': 7}\n3 3\n")
    found = make_topology(path, 4)
    assert edges(found) == both_ways([(0, 1), (1, 2), (2, 3)])
    assert found.name == path
    assert found.is_tree


def test_a_directed_file(file):
    for first in ("# directed", "#directed\r", "\ufeff#  Directed "):
        found = make_topology(file(f"{first}\n0 1\n1 2\n2 0\n"), 3)
        assert edges(found) == {(0, 1), (1, 2), (2, 0)}
        assert found.directed
    for elsewhere in ("# not directed\n0 1\n1 2\n", "0 1\n# directed\n1 2\n"):
        assert not make_topology(file(elsewhere), 3).directed


def test_an_empty_file_is_a_graph_of_one_rank(file):
    assert make_topology(file("# nobody\n"), 1).phases == (((),),)


@FEW
@given(st.integers(2, 12), st.integers(0, 1000), st.booleans())
def test_files_of_networkx(tmp_path_factory, size, seed, directed):
    graph = nx.gnp_random_graph(size, 0.5, seed=seed, directed=directed)
    path = tmp_path_factory.mktemp("graph") / "edges.txt"
    nx.write_edgelist(graph, path)
    if directed:
        path.write_text("# directed\n" + path.read_text())
    read = nx.read_edgelist(path, nodetype=int, create_using=nx.DiGraph if directed else nx.Graph)
    connected = len(read) and (nx.is_strongly_connected(read) if directed else nx.is_connected(read))
    if len(read) == size and connected:
        assert edges(make_topology(str(path), size)) == (set(read.edges) if directed else both_ways(read.edges))
    else:
        assert str(path) in refusal(str(path), size)


@pytest.mark.parametrize(
    ("content", "size", "message"),
    [
        ("0 1\n1\n", 2, "PATH, line 2: '1' is no edge; write two ranks, for example  0 1"),
        ("0 > 1\n", 2, "PATH, line 1: '0 > 1' is no edge; write two ranks, for example  0 1"),
        ("0,1\n", 2, "PATH, line 1: '0,1' is no edge; write two ranks, for example  0 1"),
        ("0 -1\n", 2, "PATH, line 1: '0 -1' is no edge; write two ranks, for example  0 1"),
        ("0 1.0\n", 2, "PATH, line 1: '0 1.0' is no edge; write two ranks, for example  0 1"),
        ("a b\n", 2, "PATH, line 1: 'a b' is no edge; write two ranks, for example  0 1"),
        ("0 1\n" + "9" * 5000 + " 1\n", 2, f"PATH, line 2: '{'9' * 59} is no edge; write two ranks, for example  0 1"),
        (b"\x89PNG\xff\0\n", 2, "PATH, line 1: '\ufffdPNG\ufffd\\x00' is no edge; write two ranks, for example  0 1"),
        ("", 2, "PATH is a graph of 1, but there are 2 ranks: start 1 or take another topology"),
        ("0 1\n1 2\n", 2, "PATH is a graph of 3, but there are 2 ranks: start 3 or take another topology"),
        ("0 1\n1 2\n", 4, "PATH is a graph of 3, but there are 4 ranks: start 3 or take another topology"),
        ("1 2\n2 3\n", 3, "PATH has rank 3, but not 0: number the ranks from 0 without gaps"),
        ("0 1\n1 3\n", 3, "PATH has rank 3, but not 2: number the ranks from 0 without gaps"),
        ("0 999999999\n", 2, "PATH has rank 999999999, but not 1: number the ranks from 0 without gaps"),
        ("0 1\n2 3\n", 4, "PATH is not connected: no way leads from rank 0 to rank 2; add edges"),
        ("# directed\n0 1\n1 2\n", 3, "PATH is not connected: no way leads from rank 1 to rank 0; add edges"),
        ("# directed\n1 0\n", 2, "PATH is not connected: no way leads from rank 0 to rank 1; add edges"),
    ],
)
def test_refused_files(file, content, size, message):
    path = file(content)
    assert refusal(path, size) == message.replace("PATH", path)


def test_what_is_no_file(tmp_path):
    assert refusal(str(tmp_path), 4) == f"cannot read {tmp_path}: it is not a file"
    assert refusal("/dev/zero", 4) == "cannot read /dev/zero: it is not a file"
