"""The loss on the validation split while a run goes on, and what follows from it: the best checkpoint, a lower rate."""

from __future__ import annotations

import math
from collections.abc import Callable

from ..comm.averaging import Averaging
from ..config import TrainConfig
from ..inference.evaluation import Evaluation
from ..runs.state import State
from . import optim
from .progress import Reporter


class Validation:
    """What a run asks of it; as it stands, for a corpus without a validation split."""

    best = math.inf  # loss, nats a token, over all evaluations

    def due(self, state: State) -> bool:
        """Whether the run is evaluated at this step."""
        return False

    def exhausted(self, state: State) -> bool:
        """Whether so many evaluations brought nothing that the run ends."""
        return False

    def run(self, state: State, final: bool = False) -> bool:
        """Evaluate the model that all ranks make up. Returns whether it is the best so far. Collective.

        final : at a run's end, where none is due: it changes nothing that a resumed run would notice.
        """
        return False


class SplitValidation(Validation):
    """The loss of the model that all ranks make up, on the validation split.

    Parameters
    ----------
    evaluation : Evaluation
        Of the validation split.
    averaging : Averaging
    train : TrainConfig
    reporter : Reporter
        Takes the lines of metrics.
    show_alive : callable
        Called after each window.
    best : float
        What the run has reached before.
    """

    def __init__(
        self,
        evaluation: Evaluation,
        averaging: Averaging,
        train: TrainConfig,
        reporter: Reporter,
        show_alive: Callable[[], None],
        best: float = math.inf,
    ) -> None:
        self.evaluation, self.averaging, self.train = evaluation, averaging, train
        self.reporter, self.show_alive, self.best = reporter, show_alive, best

    def due(self, state: State) -> bool:
        every = self.train.eval_every
        return state.step % every == 0 if every else state.place == 0

    def exhausted(self, state: State) -> bool:
        return 0 < self.train.patience <= state.stale

    def run(self, state: State, final: bool = False) -> bool:
        theta = self.averaging.model(state.theta)
        result = self.evaluation.run(theta, self.show_alive)
        own_loss = lambda own: float(self.evaluation.run(own, self.show_alive)["loss"])
        result |= self.averaging.disagreement(state.theta, theta, own_loss)
        self.reporter.log({"step": state.step, **result})
        loss = float(result["loss"])
        best = loss < state.best_loss
        self.best = min(self.best, state.best_loss, loss)
        if not final:
            state.lr_factor = optim.stalled(self.train, state.lr_factor, loss, state.best_loss)
            state.best_loss, state.stale = min(state.best_loss, loss), 0 if best else state.stale + 1
        return best
