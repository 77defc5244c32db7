"""PowerSGD as its paper writes it down, in NumPy; and ranks that are threads."""

import threading

import numpy as np

from dllm.comm import powersgd


class Workers:
    """Ranks that are threads."""

    def __init__(self, size):
        self.size, self.slots, self.barrier = size, [None] * size, threading.Barrier(size, timeout=20)
        self.posted = [0] * size

    def comm(self, rank):
        return WorkersComm(self, rank)

    def run(self, function):
        """[function(comm) of each rank]."""
        results = [None] * self.size

        def one(rank):
            results[rank] = function(self.comm(rank))

        threads = [threading.Thread(target=one, args=(rank,), daemon=True) for rank in range(self.size)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        return results


class WorkersComm:
    def __init__(self, workers, rank):
        self.workers, self.rank, self.size = workers, rank, workers.size

    def Dup(self):
        return self

    def Iallreduce(self, send, receive):
        self.workers.posted[self.rank] += send.nbytes
        self.workers.slots[self.rank] = send
        self.workers.barrier.wait()
        receive[:] = sum(self.workers.slots)
        self.workers.barrier.wait()
        return self

    def Wait(self):
        pass


MATRICES = [(6, 9), (5,), (9, 4), (2, 3, 4), (1, 7)]  # 54 + 5 + 36 + 24 + 7 = 126
LENGTH = 126


def gradients(ranks, steps, dtype=np.float64):
    return np.random.default_rng(5).standard_normal((steps, ranks, LENGTH)).astype(dtype)


def by_textbook(ranks, rank, steps, q):
    """Results (steps, P) of algorithms 1 and 2 of the paper, whose memory holds M_i - P Q^T; q: the first Q of all matrices."""
    memory, results = np.zeros((ranks, LENGTH)), []
    pieces, _, _ = powersgd.pieces(MATRICES, rank)
    Q = [piece.factor(piece.q, q) if piece.rank else None for piece in pieces]
    for x in gradients(ranks, steps):
        x = x + memory
        result = np.zeros(LENGTH)
        for n, piece in enumerate(pieces):
            if not piece.rank:
                result[piece.part] = x[:, piece.part].mean(axis=0)
                continue
            matrices = [piece.short(own) for own in x]
            basis = gram_schmidt(sum(M @ Q[n] for M in matrices) / ranks)
            Q[n] = sum(M.T @ basis for M in matrices) / ranks
            piece.short(result)[:] = basis @ Q[n].T
        memory = x - result
        results.append(result)
    return np.array(results)


def gram_schmidt(columns):
    columns = columns.copy()
    for k in range(columns.shape[1]):
        columns[:, k] -= columns[:, :k] @ (columns[:, :k].T @ columns[:, k])
        columns[:, k] /= np.linalg.norm(columns[:, k])
    return columns
