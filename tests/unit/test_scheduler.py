"""Who reads, who runs and who has which slot: the scheduler of the engine by itself."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dllm.engines.requests import Request, Stream
from dllm.engines.scheduler import PATIENCE, WORTHWHILE, Scheduler


def stream(length=10, first=0, **changes):
    """One whose prompt is `length` tokens from `first` on."""
    return Stream(Request(prompt=np.arange(first, first + length), **changes), deliver=print, cancel=print)


def admitted(scheduler, *streams):
    for each in streams:
        scheduler.admit(each)
    return list(streams)


def unread(stream):
    """What the engine says of a prompt of which nothing is known."""
    return False


def test_every_slot_has_one_stream_at_most_and_is_free_again_after_it():
    scheduler = Scheduler(2)
    one, two = admitted(scheduler, stream(), stream())
    assert {one.slot, two.slot} == {0, 1}
    with pytest.raises(ValueError, match="all 2 slots"):
        scheduler.admit(stream())
    freed = one.slot
    scheduler.release(one)
    assert (one.slot, scheduler.free) == (None, 1)
    with pytest.raises(ValueError, match="without a slot"):
        scheduler.release(one)
    assert scheduler.admit(stream()) == freed


def test_the_steps_are_of_those_whose_prompts_are_read_in_the_order_in_which_they_were():
    scheduler = Scheduler(4)
    streams = admitted(scheduler, *[stream() for _ in range(3)])
    assert not scheduler.idle
    for each in (streams[2], streams[0]):
        scheduler.run(each)
    assert scheduler.reading == [streams[1]]
    assert scheduler.active.tolist() == [streams[2].slot, streams[0].slot]
    scheduler.release(streams[2])
    assert scheduler.active.tolist() == [streams[0].slot]
    assert scheduler.clear() == [streams[0], streams[1]]
    assert (scheduler.idle, scheduler.free, scheduler.active.size) == (True, 4, 0)


def test_a_window_is_read_at_once_where_nobody_runs_or_many_wait_else_after_some_turns():
    scheduler = Scheduler(2 * WORTHWHILE)
    assert not scheduler.window_is_due()
    first, second = admitted(scheduler, stream(), stream())
    assert scheduler.window_is_due()
    scheduler.run(first)
    for _ in range(2):
        assert [scheduler.window_is_due() for _ in range(PATIENCE + 1)] == [False] * PATIENCE + [True]
    admitted(scheduler, *[stream() for _ in range(WORTHWHILE - 1)])
    assert [scheduler.window_is_due() for _ in range(3)] == [True] * 3
    scheduler.release(second)
    assert not scheduler.window_is_due()


def test_windows_end_at_multiples_of_their_length_and_are_as_long_as_the_first():
    scheduler = Scheduler(8, window=64)
    streams = admitted(scheduler, stream(101, 0), stream(31, 200), stream(201, 300))
    streams[0].tokens_read = 10  # up to 64, then up to 100: the last token goes into the step
    assert scheduler.next_window(unread, True) == (streams, [54, 30, 54])
    streams[0].tokens_read = 64
    assert scheduler.next_window(unread, True) == (streams, [36, 30, 36])


@pytest.mark.parametrize(("length", "together"), [(65, 4), (129, 4), (33, 8), (2, 64), (1000, 4)])
def test_a_window_has_as_many_streams_as_make_256_tokens(length, together):
    scheduler = Scheduler(64)
    streams = admitted(scheduler, *[stream(length, 2000 * number) for number in range(64)])
    assert scheduler.next_window(unread, True)[0] == streams[:together]


def test_of_the_same_tokens_one_stream_reads_unless_they_are_scored_or_nothing_is_kept():
    scheduler = Scheduler(8)
    one, same, other = admitted(scheduler, stream(20), stream(20), stream(20, 50))
    scored = stream(20, echo=True)
    admitted(scheduler, scored)
    assert scheduler.next_window(unread, True)[0] == [one, other, scored]
    assert scheduler.next_window(unread, False)[0] == [one, same, other, scored]


def test_nobody_waits_for_the_same_tokens_of_another_client():
    """Else how long an answer takes would tell that another has just said the same."""
    scheduler = Scheduler(8)
    one, same = admitted(scheduler, stream(20, salt=b"one"), stream(20, salt=b"one"))
    other, none = admitted(scheduler, stream(20, salt=b"other"), stream(20))
    assert scheduler.next_window(unread, True)[0] == [one, other, none]
    assert same not in scheduler.next_window(unread, True)[0]


def test_those_whose_prompts_are_known_do_not_read_and_those_that_go_on_let_others_pass():
    scheduler = Scheduler(8)
    known, one, two = admitted(scheduler, stream(100), stream(100, 200), stream(100, 400))

    def is_read(stream):
        if stream is known:
            scheduler.run(stream)  # as the engine does
        return stream is known

    assert scheduler.next_window(is_read, True)[0] == [one, two]
    scheduler.requeue(one)
    assert scheduler.next_window(is_read, True)[0] == [two, one]
    assert scheduler.next_window(lambda stream: True, True) == ([], [])


@given(st.lists(st.tuples(st.sampled_from(["admit", "run", "release", "requeue", "clear"]), st.integers(0, 99)), max_size=60))
def test_slots_are_neither_lost_nor_shared_whatever_happens(steps):
    scheduler = Scheduler(5)
    for what, number in steps:
        pick = lambda streams: streams[number % len(streams)]
        if what == "admit" and scheduler.free:
            scheduler.admit(stream())
        elif what in ("run", "requeue") and scheduler.reading:
            getattr(scheduler, what)(pick(scheduler.reading))
        elif what == "release" and not scheduler.idle:
            scheduler.release(pick([*scheduler.reading, *scheduler.running]))
        elif what == "clear":
            scheduler.clear()
        slots = [each.slot for each in (*scheduler.reading, *scheduler.running)]
        assert len(set(slots)) == len(slots) == 5 - scheduler.free
        assert set(slots) <= set(range(5))
        assert scheduler.active.tolist() == [each.slot for each in scheduler.running]
