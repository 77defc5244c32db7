"""What ranks tell each other in each step beside gradients: whether to stop, whether a checkpoint is due."""

from __future__ import annotations

from dataclasses import astuple, dataclass, fields
from typing import TYPE_CHECKING

import numpy as np

from .runtime import wait
from .traffic import sent_by_allreduce

if TYPE_CHECKING:
    from mpi4py import MPI


@dataclass(frozen=True)
class Control:
    """The word of one rank; combined over ranks by maximum, so that one rank is enough for a yes."""

    stop: bool = False  # somebody asked this rank to stop
    out_of_time: bool = False  # the run has had the seconds it was given
    checkpoint: bool = False  # a checkpoint is due
    writing: bool = False  # the last checkpoint is still being written here
    looking: bool = False  # this rank still looks after copies of files (comm/upkeep.py)
    unsound: int = 0  # this rank + 1 where its gradient of an earlier step was not finite and the others do not know yet


UNKNOWN = Control(writing=True, looking=True)  # where ranks do not meet in a step: nothing is to be done


class ControlExchange:
    """Combines the Controls of all ranks by an Allreduce of its own, which is under way while the step is computed.

    Attributes
    ----------
    request : MPI.Request or None
        None where ranks do not meet in this step.
    """

    def __init__(self) -> None:
        self._own, self._all = np.zeros((2, len(fields(Control))))
        self.request: MPI.Request | None = None

    def begin(self, comm: MPI.Comm, control: Control) -> int:
        """Start to combine. Returns the bytes that this rank sends."""
        from mpi4py import MPI

        self._own[:] = astuple(control)
        self.request = comm.Iallreduce(self._own, self._all, MPI.MAX)
        return sent_by_allreduce(self._own.nbytes, comm.size)

    def pass_over(self) -> None:
        """Ranks do not meet in this step."""
        self.request = None

    def agreed(self) -> Control:
        """Wait for the maximum over ranks; UNKNOWN where they do not meet."""
        if self.request is None:
            return UNKNOWN
        wait(self.request)
        stop, out_of_time, checkpoint, writing, looking, unsound = self._all.tolist()
        return Control(bool(stop), bool(out_of_time), bool(checkpoint), bool(writing), bool(looking), int(unsound))
