"""The loss and perplexity of a trained model over a split, by all ranks together, and the corpus that it is measured on."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from ..comm.messages import largest, total
from ..comm.node_info import NodeInfo
from ..comm.runtime import agree, together
from ..config import Config, is_private
from ..data.corpus import Corpus, open_corpus
from ..data.lane_kinds import lane_files, lanes_of, most_lanes, read_lanes
from ..data.lanes import Schedule, deal
from ..data.supply import supply
from ..data.tokenizer_files import tokenizer_hash
from ..errors import UserError
from ..kernels.team import Team
from ..kernels.types import Array, DType
from ..model import blocks
from ..model.batch import Batch
from ..model.ctc import Ctc
from ..model.encoder_model import EncoderModel
from ..model.kinds import language_model, make_model
from ..model.layout import Layout
from .decoded_losses import DecodedLosses
from .label_scores import LabelCounts
from .loaded_model import LoadedModel
from .speech import TranscriptErrors

if TYPE_CHECKING:
    from mpi4py import MPI

LARGEST_LOSS = 700.0  # nats; a diverged model's perplexity stays a number that JSON and float64 have


def perplexity(loss: float) -> float:
    """exp(loss) of a loss in nats a token, at most exp(700)."""
    return math.exp(min(loss, LARGEST_LOSS))


class Counts(Protocol):
    """What is counted of the windows of a split while a model reads them."""

    def see(self, batch: Batch) -> None:
        """Count what the model has just made of a batch."""

    @property
    def counts(self) -> Array:
        """What can be added up over ranks: (n,) int64."""

    def scores(self, counts: Array, whole: bool) -> dict[str, Any]:
        """What counts of all ranks say. whole : also what is more than some numbers"""


class Nothing:
    """Counts of a model whose losses say all."""

    counts: Array = np.zeros(0, np.int64)

    def see(self, batch: Batch) -> None:
        """Nothing."""

    def scores(self, counts: Array, whole: bool) -> dict[str, Any]:
        """None."""
        return {}


def corpus_of(
    comm: MPI.Comm, node: NodeInfo, model: LoadedModel, name: str, *, data: str | None, split: str, otherwise: str = ""
) -> tuple[Corpus, bool]:
    """This rank's corpus to measure a model on, and whether it is a private one. Collective.

    Parameters
    ----------
    model : LoadedModel
    name : str
        What the user calls it.
    data : str or None
        A corpus of the user's choice, as data.path names it; None: that of the model's run.
    split : str
        Must be there.
    otherwise : str
        Options other than --data that would do, for the message where no corpus is known.

    Raises
    ------
    UserError
        On all ranks, where there is no such corpus, or it has another vocabulary than the model.
    """
    path = data or model.data
    if path is None:
        raise UserError.of_all(f"{name} does not say where its corpus is: give one by --data DIR{otherwise}")
    corpus = open_corpus(comm, node, path, lambda text: None, model.settings.storage)
    with together(comm):
        corpus.check_vocabulary(tokenizer_hash(model.tokenizer), name)
        corpus.check_labels(model.tokenizer.labels, name)
        corpus.split(split)
    return corpus, is_private(path)


class Evaluation:
    """The loss of a split, its lanes dealt over the ranks; planned once, run as often as wanted. Collective.

    Parameters
    ----------
    comm : MPI.Comm
    corpus : Corpus
    split : str
    config : Config
    dtype : numpy dtype
    private : bool
        Every rank has a corpus of its own; their lanes add up.
    team : kernels.team.Team, optional
        Threads that share the work.
    say : callable
        Told by all ranks which shards were damaged on a disk.
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
        say: Callable[[str], None] = lambda text: None,
    ) -> None:
        self.comm, self.split, self.corpus, self.units = comm, split, corpus, blocks.units(config.model)
        entry = corpus.split(split)
        ranks, rank = (1, 0) if private else (comm.size, comm.rank)
        wanted = config.train.eval_lanes or config.train.lanes
        kind = config.model.kind
        most = most_lanes(corpus, split, kind)
        count = max(1, min(wanted // comm.size if private else wanted, most))
        longest = 0 if lanes_of(corpus, kind).shortens else entry.get("longest", 0)
        window = max(config.train.window, int(largest(comm, np.array([longest]))[0]))
        mine = deal(count, ranks, rank)
        supply(comm, corpus, agree(comm, lane_files, corpus, split, mine, count, kind), say)
        self.lanes = agree(comm, read_lanes, corpus, split, mine, count, window, None, kind)
        self.schedule = Schedule(self.lanes, comm=comm)
        if not self.schedule.per_epoch:
            raise UserError.of_all(f"split '{split}' of {corpus.folder} has nothing that a model could say right or wrong")
        self.fresh = corpus.content != "text" or config.train.carry == "window"
        tokens, size = total(comm if private else None, np.array([entry["tokens"], entry["bytes"]]))
        self.bytes_per_token = size / tokens
        width = len(self.lanes.starts)
        layout = Layout(config.model, corpus.vocabulary, dtype)
        with together(comm):
            self.model = make_model(layout, window, width, training=False, team=team)

    def run(
        self, theta: Array, between: Callable[[], object] = lambda: None, precision: str = "", whole: bool = False
    ) -> dict[str, Any]:
        """{"split", "tokens", "loss", "perplexity", "window_perplexity", "bits_per_token", "bits_per_byte"} of theta (P,).

        loss in nats a token; perplexity is its exponential, window_perplexity the mean of exp(loss of a window), as some
        papers have it. Of a model that predicts labels or letters there are as many "labels" or "letters" in place of tokens,
        and what they are counted by: "accuracy" and "macro_f1", or "wer" and "cer". A score that is not defined is None, and
        NAME_reason says why.

        Parameters
        ----------
        theta : (P,) array
        between : callable
            Called after each window.
        precision : str
            That of a Decoder that does it.
        whole : bool
            Also what is more than some numbers, such as "confusion".
        """
        B, layout = len(self.lanes.starts), self.model.layout
        self.model.bind(theta)
        with together(self.comm):
            model = DecodedLosses(language_model(self.model), B, precision) if precision else self.model
        h = np.zeros((layout.carried, B, layout.config.hidden), self.model.dtype)
        c = np.zeros_like(h)
        schedule = self.schedule
        totals, counts = np.zeros(schedule.windows), self._counts()
        with together(self.comm):
            for number, place in enumerate(schedule.places if B else ()):
                batch = self.lanes.window(place, schedule.width(place))
                if self.fresh:
                    h[:], c[:] = 0, 0
                totals[number] = model.forward(batch, h, c).sum(dtype=np.float64)
                counts.see(batch)
                between()
        count, everyones = schedule.per_epoch, total(self.comm, totals)
        loss = float(everyones.sum()) / count
        found = {"split": self.split, self.units.predicted: count, "loss": loss}
        windows = np.array([schedule.tokens(place) for place in schedule.places])
        found |= self._of_text(loss, everyones[windows > 0] / windows[windows > 0])
        return found | counts.scores(total(self.comm, counts.counts), whole)

    def _counts(self) -> Counts:
        if isinstance(self.model, Ctc):
            return TranscriptErrors(self.model, self.corpus.labels)
        return LabelCounts(self.model, self.corpus.labels) if isinstance(self.model, EncoderModel) else Nothing()

    def _of_text(self, loss: float, losses: Array) -> dict[str, Any]:
        """What a loss, nats a token, means for a text. losses : of each window"""
        if not self.units.text:
            reason = f"{self.units.predicted} are predicted, no text"
            names = "perplexity", "bits_per_byte"
            return dict.fromkeys(names) | {f"{name}_reason": reason for name in names}
        bits = loss / math.log(2)
        found: dict[str, Any] = {
            "perplexity": perplexity(loss),
            "window_perplexity": float(np.exp(np.minimum(losses, LARGEST_LOSS)).mean()),
            "bits_per_token": bits,
        }
        if self.corpus.content == "pairs":
            found |= {"bits_per_byte": None, "bits_per_byte_reason": "how many bytes the targets have is not known"}
        else:
            found["bits_per_byte"] = bits / self.bytes_per_token
        if self.corpus.tokenizer.rate and not self.corpus.tokenizer.bands:
            found["bits_per_sample"] = bits
        return found
