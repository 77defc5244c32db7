"""Which checkpoint of those on several disks a command gets."""

from dllm.runs.gathering import Manifest, Shelf, _candidates


def steps(*disks, best=True):
    """The order in which checkpoints of disks, lists of (step, whether it was the best, text for validation), are tried."""
    shelves = [Shelf({}, [Manifest(step, f"seal {step}", marked, text) for step, marked, text in disk]) for disk in disks]
    return [(found.step, rank) for found, rank in _candidates(shelves, best)]


def test_the_best_is_the_best_on_the_text_of_the_newest_of_all_disks():
    old, best, new = (30, True, "one"), (40, True, "two"), (50, False, "two")
    assert steps([new, old], [old]) == [(50, 0), (30, 0)]  # nothing was measured on the other text yet
    assert steps([old], [new, best, old]) == [(40, 1), (50, 1), (30, 0)]
    assert steps([old], [old]) == [(30, 0)]
    assert steps([new, best], [new], best=False) == [(50, 0), (40, 0)]
    assert steps([], []) == []
