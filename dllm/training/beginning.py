"""Where a run begins: with drawn parameters or those of another model, at a checkpoint, or with what survived a death."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

from ..config import Config
from ..data.corpus import Corpus
from ..data.lanes import Schedule
from ..errors import UserError
from ..inference.loaded_model import LoadedModel
from ..kernels.types import Array
from ..model.base import Model
from ..model.inheriting import inherit
from ..runs import checkpoint, provenance
from ..runs.checkpoint import Checkpoint
from ..runs.checkpoint_writer import Saver
from ..runs.provenance import Text, is_same, text_of, with_text
from ..runs.state import State
from .lane_copies import Piece
from .metrics import Clock

if TYPE_CHECKING:
    from mpi4py import MPI


@dataclass
class Survived:
    """What a rank brings out of the death of others."""

    theta: Array
    moments: list[Array]
    scalars: dict[str, Any]
    lanes: list[Piece]  # its own, and the previous rank's where that has died
    clock: Clock
    saver: Saver  # of the run before


Origin: TypeAlias = Checkpoint | Survived | LoadedModel | None


class Where(NamedTuple):
    """Where training goes on."""

    texts: list[Text]  # what the model was and is trained on
    epoch: int
    place: int
    order: int  # State.order


def where(comm: MPI.Comm, corpus: Corpus, seed: int, origin: Origin) -> Where:
    """Where training goes on. Collective. seed : of the order of a new run"""
    text = text_of(comm, corpus)
    if isinstance(origin, Survived):
        scalars = origin.scalars
        return Where(provenance.parse(origin.saver.facts["texts"]), scalars["epoch"], scalars["place"], scalars["order"])
    if isinstance(origin, Checkpoint):
        scalars, before = origin.manifest["scalars"], origin.texts
        texts = with_text(before[:-1] if is_same(before[-1], text) else before, text)
        same = before[-1].train == text.train
        return Where(texts, scalars["epoch"] if same else 0, scalars["place"] if same else 0, scalars["order"])
    before = [] if origin is None else origin.texts or [Text("")]  # of an imported model nothing is known
    return Where(with_text(before, text), 0, 0, seed)


def fill(
    state: State, model: Model, own: range, schedule: Schedule, config: Config, text: Text, origin: Origin,
    warn: Callable[[str], None],
) -> None:  # fmt: skip
    """Fill the state as the run begins. What survived is there already.

    text : what the model is trained on now
    warn : told what begins anew, by all ranks alike

    Raises UserError.
    """
    if isinstance(origin, Checkpoint):
        checkpoint.check_fits(origin, model.layout, model.layout.dtype, len(state.moments), config.train.lanes)
        checkpoint.load(origin, model.layout, state, own)
        _go_on(state, schedule, config.train.carry, origin, text, warn)
    elif isinstance(origin, LoadedModel):
        model.initialise(config.train.seed)
        inherit(model.layout, state.theta, origin.layout, origin.vector, origin.name)
    elif origin is None:
        model.initialise(config.train.seed)
    if origin is None or isinstance(origin, LoadedModel):
        state.order = config.train.seed


def _go_on(state: State, schedule: Schedule, carry: str, resume: Checkpoint, text: Text, warn: Callable[[str], None]) -> None:
    """Bring the state of a checkpoint to `text` and its schedule, and say what begins anew."""
    before, anew = resume.texts[-1], []
    if before.train != text.train:
        state.begin_text(carry)
        anew.append("the text for training is another: its first epoch begins")
    if before.valid != text.valid:
        state.begin_validation()
        anew.append("the text for validation is another: the best loss, and what followed from it, begin anew")
    if not is_same(before, text):
        state.seen = 0
    if anew:
        warn("; ".join(anew))
    if state.place > schedule.longest:
        raise UserError(f"{resume.folder} is at place {state.place:,} of an epoch, and lanes have {schedule.longest:,} here")
    if state.place >= min(schedule.end, schedule.longest):  # windows of another width end elsewhere
        state.place, state.epoch = 0, state.epoch + 1
