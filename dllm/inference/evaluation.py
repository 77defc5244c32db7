"""The loss of a trained model over a split, by all ranks together, and its perplexity."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from ..comm.runtime import allgather, together
from ..config import Config
from ..data.corpus import Corpus
from ..data.lanes import Schedule, deal
from ..data.pair_lanes import read_lanes
from ..kernels.team import Team
from ..kernels.types import Array, DType
from ..model.language_model import LanguageModel

if TYPE_CHECKING:
    from mpi4py import MPI

LARGEST_LOSS = 700.0  # nats; a diverged model's perplexity stays a number that JSON and float64 have


def perplexity(loss: float) -> float:
    """exp(loss) of a loss in nats a token, at most exp(700)."""
    return math.exp(min(loss, LARGEST_LOSS))


class Evaluation:
    """The loss of a split, its lanes dealt over the ranks; planned once, run as often as wanted. Collective.

    Parameters
    ----------
    comm : MPI.Comm
    corpus : Corpus
    split : str
    config : Config
    dtype : numpy dtype
    team : kernels.team.Team, optional
        Threads that share the work.
    private : bool
        Every rank has a corpus of its own; their lanes add up.
    """

    def __init__(
        self,
        comm: MPI.Comm,
        corpus: Corpus,
        split: str,
        config: Config,
        dtype: DType,
        private: bool = False,
        team: Team | None = None,
    ) -> None:
        self.comm, self.split = comm, split
        entry = corpus.split(split)
        ranks, rank = (1, 0) if private else (comm.size, comm.rank)
        wanted = config.train.eval_lanes or config.train.lanes
        most = entry["pairs"] if corpus.tokenizer.pairs else entry["tokens"] // 2
        count = max(1, min(wanted // comm.size if private else wanted, most))
        window = max(config.train.window, *allgather(comm, entry.get("longest", 0)))
        with together(comm):
            self.lanes = read_lanes(corpus, split, deal(count, ranks, rank), count, window)
        self.schedule = Schedule(self.lanes, gather=functools.partial(allgather, comm))
        self.fresh = corpus.tokenizer.pairs or config.train.carry == "window"
        sizes = comm.allgather((entry["tokens"], entry["bytes"])) if private else [(entry["tokens"], entry["bytes"])]
        self.bytes_per_token = sum(size for _, size in sizes) / sum(tokens for tokens, _ in sizes)
        width = len(self.lanes.starts)
        shape = config.model, corpus.vocabulary, dtype, window, width
        self.model = LanguageModel(*shape, training=False, team=team)

    def run(self, theta: Array, beat: Callable[[], object] = lambda: None) -> dict[str, Any]:
        """{"split", "tokens", "loss", "perplexity", "window_perplexity", "bits_per_token", "bits_per_byte"} of theta (P,).

        loss in nats a token; perplexity is its exponential, window_perplexity the mean of exp(loss of a window), as some
        papers have it. beat() is called after each window.
        """
        B, config = len(self.lanes.starts), self.model.config
        self.model.bind(theta)
        h = np.zeros((config.layers, B, config.hidden), self.model.dtype)
        c = np.zeros_like(h)
        totals = np.zeros(self.schedule.windows)
        with together(self.comm):
            for number in range(self.schedule.windows if B else 0):
                tokens, targets = self.lanes.window(number, self.schedule.width(number))
                if self.fresh:
                    h[:], c[:] = 0, 0
                totals[number] = self.model.forward(tokens, targets, h, c).sum(dtype=np.float64)
                beat()
        tokens = self.schedule.per_epoch
        totals = np.sum(allgather(self.comm, totals), axis=0)
        loss = float(totals.sum()) / tokens
        losses = totals / [self.schedule.tokens(number) for number in range(self.schedule.windows)]
        return {
            "split": self.split, "tokens": tokens, "loss": loss, "perplexity": perplexity(loss),
            "window_perplexity": float(np.exp(np.minimum(losses, LARGEST_LOSS)).mean()),
            "bits_per_token": loss / math.log(2), "bits_per_byte": loss / math.log(2) / self.bytes_per_token,
        }  # fmt: skip
