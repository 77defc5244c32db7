"""Which ranks talk to which where there is no Allreduce: topologies, their mixing weights, and how fast these average.

One step of gossip is x <- W x: rank i takes the sum over j of W[i,j] x_j. The ranks come to agree where W is row-stochastic
(every row sums to 1) and everybody is reached from everybody; on the average where its columns sum to 1 as well. How fast:
the distance shrinks by |lambda_2| a step, the second largest modulus of W's eigenvalues; 1 - |lambda_2| is the spectral gap.

    name                    edges of n ranks                               gap with uniform weights
    ring                    i with i+1                                     1 - (1 + 2 cos(2 pi / n)) / 3
    torus                   a x b = n, most square; prime n: a ring        2 (1 - cos(2 pi / b)) / 5 for 3 <= a <= b
    hypercube               i with i xor 2^k; n a power of two             2 / (1 + log2 n)
    exponential             i to i + 2^k mod n, for all 2^k < n            2 / (1 + ceil(log2 n)) for even n [1]
    one-peer-exponential    i to i + 2^k mod n, k = step mod ceil(log2 n)  1 for powers of two [1]
    complete                all with all                                   1
    star, tree              0 with all; i with 2i+1 and 2i+2               (take metropolis weights)
    random-regular          by chance, each with d = `degree` others       about (d - 2 sqrt(d - 1)) / (1 + d) if n is large [2]
    erdos-renyi             each pair with the same probability [3]        (take metropolis weights)

Any other name is a file of edges. Between two ranks there is one edge at most each way: two ranks are joined by a single one.

[1] Ying et al. 2021, Exponential graph is provably efficient for decentralized deep training, NeurIPS (arXiv:2110.13363).
[2] Friedman 2003, A proof of Alon's second eigenvalue conjecture, STOC; the graphs by Steger, Wormald 1999.
[3] Erdos, Renyi 1959; Gilbert 1959.

To add a topology: its name and edges in FIXED and _fixed, or, where they are drawn at random, in NAMES and _random.
"""

import difflib
import functools
import itertools
import math
import os
import random
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np

from ..errors import UserError
from ..files.storage import LARGEST_LIST, read_text
from ..kernels.types import Array

# networkx is imported where it is needed: that takes half a second, and most runs do without.

FIXED = ("ring", "torus", "hypercube", "exponential", "one-peer-exponential", "complete", "star", "tree")
NAMES = (*FIXED, "random-regular", "erdos-renyi")
WEIGHTS = ("metropolis", "uniform", "column")
TRIES = 100  # random graphs, until one is connected
TOLERANCE = 1e-12  # of sums of weights
EDGE = re.compile(r"\s*([0-9]{1,9})\s+([0-9]{1,9})(\s.*)?", re.DOTALL)


Phase: TypeAlias = tuple[tuple[int, ...], ...]  # of each rank the ranks it sends to, ascending
Edges: TypeAlias = Iterable[tuple[int, int]]


@dataclass(frozen=True)
class Topology:
    """Who sends to whom; the same on all ranks for the same name, size, degree and seed."""

    name: str
    size: int  # ranks n
    phases: tuple[Phase, ...]  # one or more that follow each other from step to step

    def phase(self, step: int) -> int:
        """Which of the phases `step` has."""
        return step % len(self.phases)

    def receivers(self, phase: int, rank: int) -> tuple[int, ...]:
        """The ranks to which `rank` sends, ascending, without itself."""
        return self.phases[phase][rank]

    def senders(self, phase: int, rank: int) -> tuple[int, ...]:
        """The ranks from which `rank` receives, ascending."""
        return self._senders[phase][rank]

    @functools.cached_property
    def directed(self) -> bool:
        """Whether some edge has no way back in its phase."""
        return self.phases != self._senders

    @functools.cached_property
    def strongly_connected(self) -> bool:
        """Whether everybody is reached from everybody, by all phases together."""
        return self.apart() is None

    @functools.cached_property
    def is_tree(self) -> bool:
        """Whether there is exactly one way from everybody to everybody."""
        edges = sum(map(len, self.phases[0])) // 2
        return len(self.phases) == 1 and not self.directed and self.strongly_connected and edges == self.size - 1

    def apart(self) -> tuple[int, int] | None:
        """Two ranks (a, b) with no way from a to b, or None."""
        for phases, forwards in ((self.phases, True), (self._senders, False)):
            found: set[int] = set()
            new = {0}
            while new:
                found |= new
                new = set().union(*(phase[rank] for phase in phases for rank in new)) - found
            if len(found) < self.size:
                other = min(set(range(self.size)) - found)
                return (0, other) if forwards else (other, 0)
        return None

    @functools.cached_property
    def _senders(self) -> tuple[Phase, ...]:
        return tuple(_reverse(phase) for phase in self.phases)


def make_topology(name: str, size: int, degree: int = 3, seed: int = 1) -> Topology:
    """The Topology of `size` ranks that is called `name`, or that the file `name` describes. Raises UserError.

    Parameters
    ----------
    degree : int
        Of random-regular; the expected one of erdos-renyi.
    seed : int
        Of these two. The seeds that follow are tried where the graph falls apart.
    """
    if name in FIXED:
        return Topology(name, size, _fixed(name, size))
    if name in NAMES:
        return Topology(name, size, (_random(name, size, degree, seed),))
    if os.path.exists(name):
        return _read(name, size)
    near = difflib.get_close_matches(name, NAMES, n=1)
    hint = f"; did you mean '{near[0]}'?" if near else ""
    raise UserError(f"topology {name!r} is neither a file nor one of {', '.join(NAMES)}{hint}")


def _phase(n: int, edges: Edges, directed: bool = False) -> Phase:
    """Of each rank the ranks it sends to. edges: pairs of ranks; those of a rank with itself are left out."""
    receivers: list[set[int]] = [set() for _ in range(n)]
    for a, b in edges:
        if a != b:
            receivers[a].add(b)
            if not directed:
                receivers[b].add(a)
    return tuple(tuple(sorted(found)) for found in receivers)


def _reverse(phase: Phase) -> Phase:
    """Of each rank the ranks that send to it, ascending."""
    senders: list[list[int]] = [[] for _ in phase]
    for rank, receivers in enumerate(phase):
        for receiver in receivers:
            senders[receiver].append(rank)
    return tuple(map(tuple, senders))


def _fixed(name: str, n: int) -> tuple[Phase, ...]:
    """The phases of a topology without chance."""
    ranks, powers = range(n), [1 << k for k in range((n - 1).bit_length())]
    if name == "ring":
        return (_phase(n, ((i, (i + 1) % n) for i in ranks)),)
    if name == "torus":
        width = n // max(a for a in range(1, math.isqrt(n) + 1) if n % a == 0)
        across = ((i, i // width * width + (i + 1) % width) for i in ranks)
        return (_phase(n, itertools.chain(across, ((i, (i + width) % n) for i in ranks))),)
    if name == "hypercube":
        if n & (n - 1):
            raise UserError(f"topology hypercube takes a power of two ranks, {powers[-1]} or {2 * powers[-1]}, not {n}")
        return (_phase(n, ((i, i ^ power) for i in ranks for power in powers)),)
    if name == "exponential":
        return (_phase(n, ((i, (i + power) % n) for i in ranks for power in powers), directed=True),)
    if name == "one-peer-exponential":
        return tuple(_phase(n, ((i, (i + power) % n) for i in ranks), directed=True) for power in powers or [1])
    if name == "star":
        return (_phase(n, ((0, i) for i in ranks)),)
    if name == "tree":
        return (_phase(n, (((i - 1) // 2, i) for i in ranks[1:])),)
    if name == "complete":
        everybody = tuple(ranks)  # slices are quick, n^2 pairs are not
        return (tuple(everybody[:i] + everybody[i + 1 :] for i in ranks),)
    raise ValueError(name)


def _random(name: str, n: int, degree: int, seed: int) -> Phase:
    """The phase of a random graph that is connected."""
    if n <= 2:
        return _fixed("complete", n)[0]  # the only one
    import networkx as nx

    if name == "erdos-renyi":
        draw = functools.partial(nx.fast_gnp_random_graph, n, min(1.0, degree / (n - 1)))
        enough = max(degree + 1, math.ceil(math.log(n)) + 1)  # isolated ranks become rare from ln n on [3]
    elif name == "random-regular":
        possible = range(2, n, 1 + n % 2)  # n * degree is twice the number of edges
        if degree not in possible:
            enough = min(possible, key=lambda other: (abs(other - degree), -other))
            raise UserError(f"topology random-regular of {n} ranks cannot have degree {degree}: take {enough}")
        if degree == 2:  # large unions of rings are hardly ever connected; if one is, it's a ring
            order = random.Random(seed).sample(range(n), n)
            return _phase(n, itertools.pairwise([*order, order[0]]))
        draw, enough = functools.partial(_regular, n, degree), degree + 1
    else:
        raise ValueError(f"nothing says how {name} is drawn")
    for graph in (draw(seed=other) for other in range(seed, seed + TRIES)):
        if nx.is_connected(graph):
            return _phase(n, graph.edges)
    raise UserError(f"topology {name}: {TRIES} graphs of {n} ranks with degree {degree} fell apart; take {enough} or more")


def _regular(n: int, degree: int, seed: int) -> Any:
    import networkx as nx

    if 2 * degree >= n:  # networkx would hardly ever find it, but finds what is left out
        return nx.complement(nx.random_regular_graph(n - 1 - degree, n, seed=seed))
    return nx.random_regular_graph(degree, n, seed=seed)


def _read(path: str, n: int) -> Topology:
    """The Topology in a file of edges, in the format of networkx.read_edgelist: two ranks a line, # begins a comment.

    What follows on a line, such as networkx's attributes, has no effect, nor has an edge of a rank with itself.
    A first line `# directed` says that edges lead from the first to the second rank only.
    """
    directed, edges = False, []
    for number, line in enumerate(read_text(path, LARGEST_LIST, errors="replace").splitlines(), 1):
        directed = directed or (number == 1 and line.lower().split() in (["#", "directed"], ["#directed"]))
        text = line.partition("#")[0].rstrip()
        match = EDGE.fullmatch(text)
        if match:
            edges.append((int(match[1]), int(match[2])))
        elif text:
            raise UserError(f"{path}, line {number}: {text!r:.60} is no edge; write two ranks, for example  0 1")
    ranks = set(itertools.chain(*edges)) or {0}
    missing = next(rank for rank in itertools.count() if rank not in ranks)
    if missing < len(ranks):
        raise UserError(f"{path} has rank {max(ranks)}, but not {missing}: number the ranks from 0 without gaps")
    if missing != n:
        raise UserError(f"{path} is a graph of {missing}, but there are {n} ranks: start {missing} or take another topology")
    topology = Topology(str(path), n, (_phase(n, edges, directed),))
    if (apart := topology.apart()) is not None:
        a, b = apart
        raise UserError(f"{path} is not connected: no way leads from rank {a} to rank {b}; add edges")
    return topology


def weights(topology: Topology, kind: str) -> list[Array]:
    """How much each rank takes of what it receives.

    metropolis  1 / (1 + max(d_i, d_j)), the rest its own; doubly stochastic on every undirected graph
                (Metropolis et al. 1953; for averages Xiao, Boyd 2004, Fast linear iterations for distributed averaging)
    uniform     1 / (1 + how many send to i); row-stochastic, doubly where all send to equally many and receive from so many
    column      1 / (1 + to how many j sends); column-stochastic, for push-sum (Kempe, Dobra, Gehrke 2003, Gossip-based
                computation of aggregate information, FOCS)

    Returns
    -------
    list of (n,n) float64
        One a phase; W[i,j] is what rank i gives to what comes from rank j, W[i,i] what it gives to its own.
    """
    if kind not in WEIGHTS:
        raise UserError(f"weights '{kind}': they are one of {', '.join(WEIGHTS)}")
    if kind == "metropolis" and topology.directed:
        raise UserError(f"topology {topology.name} has edges of one way, metropolis weights need both: take uniform")
    found = []
    for phase in range(len(topology.phases)):
        joined = np.zeros((topology.size, topology.size))
        for rank in range(topology.size):
            joined[rank, list(topology.senders(phase, rank))] = 1
        if kind == "metropolis":
            degrees = joined.sum(1)
            matrix = joined / (1 + np.maximum.outer(degrees, degrees))
            np.fill_diagonal(matrix, 1 - matrix.sum(1))
        else:
            np.fill_diagonal(joined, 1)
            matrix = joined / joined.sum(1 if kind == "uniform" else 0, keepdims=True)
        found.append(matrix)
    return found


def is_row_stochastic(matrix: Array) -> bool:
    """Whether the weights (n,n) that each rank gives sum to 1: what is equal everywhere stays as it is."""
    return bool((matrix >= -TOLERANCE).all() and (abs(matrix.sum(1) - 1) <= TOLERANCE).all())


def is_column_stochastic(matrix: Array) -> bool:
    """Whether what each rank has is given away whole: the sum over ranks stays as it is."""
    return is_row_stochastic(matrix.T)


def is_doubly_stochastic(matrix: Array) -> bool:
    """Whether both hold: then repeated mixing leads to the average."""
    return is_row_stochastic(matrix) and is_column_stochastic(matrix)


def spectral_gap(matrices: Sequence[Array]) -> float:
    """1 - |lambda_2|, a step, of the product of all phases' (n,n) weights: 1.0 where it averages exactly, 0.0 if never."""
    product = functools.reduce(lambda before, matrix: matrix @ before, matrices)
    symmetric = np.array_equal(product, product.T)
    moduli = np.sort(abs(np.linalg.eigvalsh(product) if symmetric else np.linalg.eigvals(product)))
    second = float(moduli[-2]) if len(moduli) > 1 else 0.0
    if second <= len(product) * TOLERANCE:  # a rounded 0, of which the root below could be large
        return 1.0
    return max(0.0, 1.0 - math.pow(second, 1 / len(matrices)))
