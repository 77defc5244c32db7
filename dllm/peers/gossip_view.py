"""What the ranks of a server say of one of its models: a view of the gossip, which is about all of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..comm.membership import Membership
    from .reports import Entry


class GossipView:
    """The gossip as it looks where there is one model. Reports have what belongs to the rank and what belongs to the model.

    Parameters
    ----------
    gossip : comm.membership.Membership
        Of reports.RankReport.
    place : int
        Of the model, in the order of the command.

    Attributes
    ----------
    rank : int
        This one.
    """

    def __init__(self, gossip: Membership, place: int) -> None:
        self.gossip, self.place, self.rank = gossip, place, gossip.rank

    @property
    def known(self) -> dict[int, tuple[int, Mapping[str, Any]]]:
        """rank -> (how many reports it has made, the newest one)."""
        return {rank: (count, self._of_model(report)) for rank, (count, report) in dict(self.gossip.known).items()}

    def table(self) -> dict[int, Entry]:
        """rank -> (report, seconds since it was heard of, whether it is dead)."""
        return {rank: (self._of_model(report), age, dead) for rank, (report, age, dead) in self.gossip.table().items()}

    def _of_model(self, report: Mapping[str, Any]) -> Mapping[str, Any]:
        return {**report, **report["models"][self.place]}
