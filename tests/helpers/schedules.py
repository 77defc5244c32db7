"""The schedule that ranks agree on, made in one process from the lanes of all of them."""

import numpy as np
import pytest

from dllm.data import lanes


def schedule_of_ranks(ranks, last="keep"):
    """The Schedule of Lanes of several ranks; what they would combine over MPI is combined here."""

    def largest(comm, mine):
        of_windows = len(mine) > 1 or len(called) > 0  # the longest lane is asked for first
        called.append(True)
        everyone = [rank.shapes(len(mine))[1] if of_windows else [max(rank.steps, default=0)] for rank in ranks]
        return np.max(everyone, axis=0)

    called = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lanes, "largest", largest)
        patch.setattr(lanes, "total", lambda comm, mine: sum(rank.shapes(len(mine))[0] for rank in ranks))
        return lanes.Schedule(ranks[0], last)
