"""The schedule that ranks agree on, made in one process from the lanes of all of them."""

import numpy as np

from dllm.data import lanes


def schedule_of_ranks(ranks, last="keep", place=0):
    """The Schedule of Lanes of several ranks; what they would combine over MPI is combined here."""

    class Everyone:
        """The lanes of all ranks, as those of one."""

        stride, steps = ranks[0].stride, [max(max(rank.steps, default=0) for rank in ranks)]

        def shapes(self, places):
            found = [rank.shapes(places) for rank in ranks]
            return sum(tokens for tokens, _ in found), np.max([widths for _, widths in found], axis=0)

        def arrange(self, seed, epoch):
            found = [rank.arrange(seed, epoch) for rank in ranks]
            return found[0]

    return lanes.Schedule(Everyone(), last, None, place)
