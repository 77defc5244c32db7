"""Who may go on after a death: never two groups that cannot see each other."""

import itertools

import pytest

from dllm.comm.survivors import quorum


@pytest.mark.parametrize(
    ("size", "alive", "machines", "may"),
    [
        (4, {0}, [{0, 1, 2, 3}], True),  # of one machine those that are gone are dead for certain
        (4, {3}, [{0, 1, 2, 3}], True),
        (4, {0, 1, 3}, [{0}, {1}, {2}, {3}], True),
        (4, {2}, [{0}, {1}, {2}, {3}], False),
        (4, {0, 2}, [{0}, {1}, {2}, {3}], True),  # half, with the lowest
        (4, {1, 3}, [{0}, {1}, {2}, {3}], False),
        (4, {2, 3}, [{0, 1}, {2, 3}], False),
        (6, {1, 3}, [{0, 1}, {2, 3}, {4, 5}], True),  # 0 and 2 are dead; 4 and 5, elsewhere, are as many, but not the lowest
        (6, {3}, [{0, 1}, {2, 3}, {4, 5}], False),
        (2, {1}, [{0}, {1}], False),
    ],
)
def test_a_group_goes_on_where_no_other_can(size, alive, machines, may):
    known = set().union(*(machine for machine in machines if machine & alive))
    assert quorum(size, alive, known) is may


@pytest.mark.parametrize(
    "machines", [[{0}, {1}, {2}, {3}, {4}], [{0, 1}, {2, 3}, {4}], [{0, 1, 2}, {3, 4}], [{0, 4}, {1, 2, 3}]]
)
def test_of_two_groups_behind_a_cut_link_at_most_one_goes_on(machines):
    """However the machines fall apart, and whoever has died besides."""
    for side in itertools.product([True, False], repeat=len(machines)):
        for dead in itertools.chain.from_iterable(itertools.combinations(range(5), count) for count in range(4)):
            groups = []
            for which in (True, False):
                there = [machine for machine, mine in zip(machines, side, strict=True) if mine is which]
                alive = set().union(*there) - set(dead)
                known = set().union(*(machine for machine in there if machine & alive))
                groups.append(bool(alive) and quorum(5, alive, known))
            assert not all(groups), (side, dead)
