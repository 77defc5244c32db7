"""comm/methods: every method is its matrix recursion, step by step, on a sum of quadratics. Written for any number of ranks."""

import itertools
import time
from types import SimpleNamespace

import numpy as np
import pytest
from helpers.counting_comm import Counting

from dllm.comm import runtime, topology
from dllm.comm.control import Control
from dllm.comm.methods import METHODS, make_averaging
from dllm.comm.methods.base import OneTensor
from dllm.config import AveragingConfig, Config, TrainConfig
from dllm.errors import UserError
from dllm.training import optim

pytestmark = pytest.mark.mpi
P, LR = 7, 0.05


@pytest.fixture
def comm():
    return runtime.world()


class Quadratics:
    """f_i(x) = |A_i x - b_i|^2 / 2 for each rank i, all different; what is sought is the least mean of all."""

    def __init__(self, ranks, seed=3):
        random = np.random.default_rng(seed)
        self.A, self.b = np.eye(P) + 0.1 * random.normal(size=(ranks, P, P)), random.normal(size=(ranks, P))
        self.start = random.normal(size=P)

    def gradient(self, rank, x):
        return self.A[rank].T @ (self.A[rank] @ x - self.b[rank])

    def gradients(self, X):
        return np.array([self.gradient(rank, x) for rank, x in enumerate(X)])

    def solution(self):
        return np.linalg.lstsq(self.A.reshape(-1, P), self.b.reshape(-1), rcond=None)[0]


class Vector(OneTensor):
    """A layout without an embedding."""

    table = None


class Run:
    """A method on this rank, driven as the training loop drives it."""

    def __init__(self, comm, name, lr=LR, train=(), node=None, dtype=np.float64, **settings):
        self.problem, self.rank, self.lr = Quadratics(comm.size), comm.rank, lr
        self.x, self.g = self.problem.start.astype(dtype), np.zeros(P, dtype)
        train = TrainConfig(optimizer="sgd", lr=lr, **dict(train))
        config = AveragingConfig(**{"method": name, "bucket_mb": 2e-5, **settings})
        settings = Config(averaging=config, train=train)
        place = SimpleNamespace(comm=node, ranks=node.size if node else 1, oversubscribed=True)
        vectors = {"memory": None, "theta": self.x, "gradient": self.g, "layout": Vector(P)}
        self.method = make_averaging(settings, comm, place, **vectors)
        self.optimizer = optim.make_optimizer(train, None)
        moments = [np.zeros(P, dtype) for _ in range(self.optimizer.moments)]
        self.state = SimpleNamespace(theta=self.x, moments=moments, step=0)

    def step(self):
        self.method.begin(np.zeros(0, np.int64), Control())
        self.g[:] = self.problem.gradient(self.rank, self.x) * (self.method.scale / self.method.comm.size)
        for part in (slice(0, 3), slice(3, P)):
            self.method.ready(part)
        gradient = self.method.gradient()
        norm = self.optimizer.step(self.state, gradient, self.lr)
        self.method.clear()
        self.method.mix(self.x, self.lr)
        self.method.agreed()
        self.method.verdict(norm, True)
        self.state.step += 1
        return self.x

    def steps(self, count):
        for _ in range(count):
            self.step()
        return self.x


def matrices(run):
    """W of each phase, written down here anew from the topology's edges."""
    graph = run.method.of_x.neighbours.topology if hasattr(run.method, "of_x") else run.method.neighbourhood.topology
    return [topology.weights(graph, "uniform" if graph.directed else "metropolis")[k] for k in range(len(graph.phases))]


def signs(V):
    """Rows as their signs times their mean magnitudes, which travel in float32."""
    return np.where(V >= 0, 1.0, -1.0) * np.abs(V).mean(axis=1, keepdims=True).astype(np.float32)


def clipped(G, longest):
    """Rows no longer than that."""
    return G * np.minimum(1, longest / np.linalg.norm(G, axis=1, keepdims=True))


def compressed(problem, n, config, clip, steps, lr=LR):
    """X (n,P) after each step of Allreduce, where each rank clips its own gradient and compresses it."""
    X, error, m = np.tile(problem.start, (n, 1)), np.zeros((n, P)), np.zeros((n, P))
    for _ in range(steps):
        G = clipped(problem.gradients(X), clip) if clip else problem.gradients(X)
        if config.compression == "sign":
            error += G
            G = signs(error)
            error -= G
        elif config.compression == "signum":
            m = config.momentum * m + (1 - config.momentum) * G
            G = np.tile(np.sign(np.sign(m).sum(axis=0)), (n, 1))
        X = X - lr * G.mean(axis=0)
        yield X


def recursion(name, problem, graph, n, config, steps, lr=LR):
    """X (n,P) after each step, by dense matrices: what the papers say."""
    X = np.tile(problem.start, (n, 1))
    kind = "column" if name == "sgp" else "uniform" if graph.directed else "metropolis"
    W = topology.weights(graph, kind)
    Y, before, psi_before, m, w = np.zeros_like(X), np.zeros_like(X), X.copy(), np.zeros_like(X), np.ones((n, 1))
    history, outer, v, known = [X.copy()], X[0].copy(), np.zeros(P), X.copy()
    for t in range(steps):
        Wt, G = W[t % len(W)], problem.gradients(X)
        if name == "dpsgd":
            X = Wt @ X - lr * G
        elif name == "dpsgd-atc":
            X = Wt @ (X - lr * G)
        elif name == "sgp":
            X, w = Wt @ (w * X - lr * G), Wt @ w
            X = X / w
        elif name == "gradient-tracking":
            Y, before = Wt @ Y + G - before, G
            X = Wt @ X - lr * Y
        elif name == "exact-diffusion":
            psi = X - lr * G
            X, psi_before = (np.eye(n) + Wt) / 2 @ (psi + X - psi_before), psi
        elif name == "qg-momentum":
            new = Wt @ (X - lr * (G + config.momentum * m))
            m, X = config.momentum * m + (1 - config.momentum) * (X - new) / lr, new
        elif name == "relaysum":
            half = X - lr * G
            history.append(half)
            distance = distances(graph)
            X = np.zeros_like(X)
            for i in range(n):
                near = [j for j in range(n) if t + 1 - max(distance[i, j] - 1, 0) >= 1]
                X[i] = np.mean([history[t + 1 - max(distance[i, j] - 1, 0)][j] for j in near], axis=0)
        elif name == "choco":
            half = X - lr * G
            known = known + (signs(half - known) if config.compression == "sign" else half - known)
            X = half + config.consensus * (Wt @ known - known)
        elif name in ("local-sgd", "diloco"):
            X = X - lr * G
            if (t + 1) % config.period == 0:
                new = X.mean(axis=0)
                if name == "diloco":
                    delta = outer - new
                    v = config.momentum * v + delta
                    outer = outer - config.outer_lr * (delta + config.momentum * v)
                    new = outer
                X = np.tile(new, (n, 1))
        yield X


def distances(graph):
    import networkx

    tree = networkx.Graph()
    tree.add_nodes_from(range(graph.size))
    tree.add_edges_from((i, j) for i in range(graph.size) for j in graph.receivers(0, i))
    lengths = dict(networkx.all_pairs_shortest_path_length(tree))
    return np.array([[lengths[i][j] for j in range(graph.size)] for i in range(graph.size)])


CASES = [
    *((name, graph) for name in ("dpsgd", "dpsgd-atc", "gradient-tracking", "qg-momentum") for graph in
      ("ring", "torus", "complete", "star", "exponential", "one-peer-exponential", "erdos-renyi")),
    *(("sgp", graph) for graph in ("ring", "star", "tree", "exponential", "one-peer-exponential", "erdos-renyi")),
    *(("exact-diffusion", graph) for graph in ("ring", "torus", "complete", "star", "tree")),
    ("relaysum", "tree"), ("relaysum", "star"), ("local-sgd", ""), ("diloco", ""),
]  # fmt: skip


@pytest.mark.parametrize("graph", ["ring", "torus", "star"])
@pytest.mark.parametrize("compression", ["none", "sign"])
def test_each_step_of_compressed_gossip_is_the_matrix_recursion(comm, graph, compression):
    run = Run(comm, "choco", topology=graph, compression=compression, consensus=0.3)
    for X in recursion("choco", run.problem, topology.make_topology(graph, comm.size), comm.size, run.method.config, 25):
        np.testing.assert_allclose(run.step(), X[comm.rank], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("clip", [0.0, 0.5])
@pytest.mark.parametrize("compression", ["none", "sign", "signum"])
def test_each_step_of_own_gradients_clipped_and_compressed_is_the_recursion(comm, clip, compression):
    train = {"clip": clip, "clip_by": "own"}
    run = Run(comm, "allreduce", train=train, compression=compression)
    for X in compressed(run.problem, comm.size, run.method.config, clip, 25):
        np.testing.assert_allclose(run.step(), X[comm.rank], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("name", "graph"), CASES)
def test_each_step_is_the_matrix_recursion(comm, name, graph):
    settings = {"topology": graph, "period": 3, "degree": 2}
    run = Run(comm, name, **settings)
    config = run.method.config
    shape = topology.make_topology(graph or "ring", comm.size, 2, 1)
    expected = recursion(name, run.problem, shape, comm.size, config, 25)
    for X in expected:
        np.testing.assert_allclose(run.step(), X[comm.rank], rtol=1e-12, atol=1e-12)


class Nodes:
    """The least squares of nodes that have `n` ranks each, one behind the other."""

    def __init__(self, problem, n):
        self.problem, self.n, self.start = problem, n, problem.start

    def gradients(self, X):
        G = self.problem.gradients(np.repeat(X, self.n, axis=0))
        return G.reshape(len(X), self.n, P).mean(axis=1)


@pytest.mark.parametrize("name", [*(name for name in METHODS if name not in ("allreduce", "choco", "async-gossip"))])
@pytest.mark.parametrize("n", [1, 2, 4])
def test_between_nodes_each_step_is_the_matrix_recursion_of_nodes(comm, name, n):
    n = min(n, comm.size)
    if comm.size % n:
        with pytest.raises(UserError, match="as many ranks on every node"):
            Run(comm, name, node=comm.Split(comm.rank // n, comm.rank), hierarchical=True)
        return
    run = Run(comm, name, node=comm.Split(comm.rank // n, comm.rank), hierarchical=True, period=3)
    nodes = comm.size // n
    graph = topology.make_topology(
        {"relaysum": "tree"}.get(name, "exponential" if name != "exact-diffusion" else "ring"), nodes, 2, 1
    )
    for X in recursion(name, Nodes(run.problem, n), graph, nodes, run.method.config, 12):
        np.testing.assert_allclose(run.step(), X[comm.rank // n], rtol=1e-12, atol=1e-12)
    mean = np.empty(P)
    run.method.average(mean)
    np.testing.assert_allclose(mean, X.mean(axis=0), rtol=1e-12, atol=1e-12)


def test_every_neighbour_answers(comm):
    for name, graph in (("dpsgd", "ring"), ("dpsgd", "one-peer-exponential"), ("sgp", "star"), ("local-sgd", "")):
        run = Run(comm, name, topology=graph)
        trips = run.method.round_trips()
        neighbours = run.method.neighbourhood
        assert set(trips) == (set(itertools.chain(*neighbours.receivers)) if neighbours else set())
        assert all(0 < seconds < 30 for seconds in trips.values())


def test_exact_methods_reach_the_optimum_where_dpsgd_does_not(comm):
    solution = Quadratics(comm.size).solution()
    far = {}
    for name in ("dpsgd", "gradient-tracking", "exact-diffusion", "relaysum"):
        far[name] = np.abs(Run(comm, name, lr=0.2).steps(320) - solution).max()  # a step that is wider lets tracking diverge
    plain = far.pop("dpsgd")
    assert max(far.values()) < 1e-8, far
    if comm.size > 2:
        assert max(comm.allgather(plain)) > 1e-4


@pytest.mark.parametrize("name", ["exact-diffusion", "choco"])  # which keep what a rounding error could stay in
def test_where_nothing_is_learnt_rounding_does_not_move_the_mean(comm, name):
    run = Run(comm, name, dtype=np.float32)
    run.steps(20)
    before, after = np.empty_like(run.x), np.empty_like(run.x)
    run.lr = 0.0
    run.method.average(before)
    run.steps(600)
    run.method.average(after)
    np.testing.assert_allclose(after, before, rtol=1e-3, atol=1e-4)


def least_squares(comm, name, steps=40, **settings):
    return Run(comm, name, **settings).steps(steps).copy()


def plain_sgd(comm, steps=40):
    problem = Quadratics(comm.size)
    x = problem.start.copy()
    for _ in range(steps):
        x -= LR * np.mean([problem.gradient(rank, x) for rank in range(comm.size)], axis=0)
    return x


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("dpsgd-atc", {"topology": "complete", "weights": "uniform"}),
        ("local-sgd", {"period": 1}),
        ("allreduce", {"compression": "none"}),
        ("allreduce", {"compression": "powersgd", "rank": 99}),
        ("choco", {"topology": "complete", "consensus": 1.0}),
    ],
)
def test_these_are_allreduce(comm, name, settings):
    np.testing.assert_allclose(least_squares(comm, name, **settings), plain_sgd(comm), rtol=1e-12, atol=1e-12)


def test_one_peer_exponential_graphs_average_exactly(comm):
    if comm.size & (comm.size - 1):
        return
    run = Run(comm, "dpsgd-atc", topology="one-peer-exponential")
    run.x[:] = np.arange(P) + comm.rank
    run.lr = 0.0
    run.steps(max(1, comm.size.bit_length() - 1))
    np.testing.assert_allclose(run.x, np.arange(P) + (comm.size - 1) / 2, rtol=1e-14)


def test_push_sum_averages_on_a_directed_graph_that_is_not_balanced(comm, tmp_path):
    n = comm.size
    edges = [(rank, (rank + 1) % n) for rank in range(n)] + [(0, rank) for rank in range(2, n)]
    path = comm.bcast(str(tmp_path / "edges"))
    if comm.rank == 0:
        with open(path, "w") as file:
            file.write("# directed\n" + "".join(f"{a} {b}\n" for a, b in edges if a != b))
    comm.barrier()
    run = Run(comm, "sgp", topology=path) if n > 1 else Run(comm, "sgp")
    start = np.random.default_rng(comm.rank).normal(size=P)
    run.x[:], run.lr = start, 0.0
    run.steps(300)
    np.testing.assert_allclose(run.x, np.mean(comm.allgather(start), axis=0), atol=1e-9)
    weights = np.concatenate(comm.allgather(run.method.w))
    np.testing.assert_allclose(weights.sum(), n)
    assert n < 3 or np.ptp(weights) > 0.1
    if n > 2:
        with pytest.raises(UserError, match="rows and columns add up to 1"):
            Run(comm, "dpsgd", topology=path)


@pytest.mark.parametrize("compression", ["none", "sign", "top-k", "random-k", "qsgd", "bf16"])
def test_choco_knows_its_neighbours_to_the_bit(comm, compression):
    run = Run(comm, "choco", compression=compression, consensus=0.1, fraction=0.3, topology="ring")
    method = run.method
    known = {rank: method.known.copy() for rank in method.around.senders[0]}
    for _ in range(300):
        run.step()
        for rank, payload in zip(method.around.senders[0], method.incoming, strict=True):
            method.Q.add(payload, known[rank])
    everyones = comm.allgather(method.known)
    _, own, others = method.around.at(0)
    s = own * everyones[comm.rank]
    for weight, rank in zip(others, method.around.senders[0], strict=True):
        assert np.array_equal(known[rank], everyones[rank])
        s += weight * everyones[rank]
    np.testing.assert_allclose(method.s, s, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("compression", ["sign", "top-k", "random-k", "qsgd", "bf16"])
def test_what_compression_leaves_out_is_sent_later(comm, compression):
    run = Run(comm, "allreduce", compression=compression, fraction=0.3)
    start, sums = run.x.copy(), np.zeros(P)
    for _ in range(50):
        sums += run.problem.gradient(comm.rank, run.x)
        run.step()
    left = np.mean(comm.allgather(run.method.feedback.memory), axis=0)
    applied = (start - run.x) / LR
    np.testing.assert_allclose(applied + left, np.mean(comm.allgather(sums), axis=0), rtol=1e-9, atol=1e-9)
    assert len({x.tobytes() for x in comm.allgather(run.x)}) == 1


def test_asynchronous_gossip_loses_nothing_and_comes_near_the_optimum(comm):
    run = Run(comm, "async-gossip", period=50, lr=0.02)
    for _ in range(200):
        run.step()
        time.sleep(0.0005 * (comm.rank == 0))  # not all are as fast as others
    mean = np.empty(P)
    run.method.average(mean)
    weight = comm.allreduce(float(run.method.w[0]))
    np.testing.assert_allclose(weight, comm.size, rtol=1e-12)
    assert np.abs(mean - run.problem.solution()).max() < 0.5
    before, run.lr = mean.copy(), 0.0
    run.steps(100)
    run.method.average(mean)
    np.testing.assert_allclose(mean, before, rtol=1e-9, atol=1e-9)
    run.method.end()


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        *((name, {}) for name in ("dpsgd", "dpsgd-atc", "sgp", "gradient-tracking", "exact-diffusion", "qg-momentum")),
        ("relaysum", {}),
        ("local-sgd", {"period": 3}), ("diloco", {"period": 3}), ("choco", {"compression": "sign"}),
        *(("allreduce", {"compression": kind}) for kind in ("none", "powersgd", "sign", "signum", "top-k", "qsgd", "bf16")),
    ],
)  # fmt: skip
def test_bytes_counted_are_those_that_mpi_has_to_send(comm, name, settings):
    counting = Counting(comm)
    run = Run(counting, name, **settings)
    at_first = counting.sent
    run.steps(12)
    assert run.method.bytes_sent == counting.sent - at_first
    assert (run.method.bytes_sent > 0) == (comm.size > 1)
