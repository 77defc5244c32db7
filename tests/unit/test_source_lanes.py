"""Lanes of sources and targets: each window is a pair a lane, as an encoder and a decoder read it."""

import itertools

import numpy as np
import pytest
from helpers.pair_corpus import make_corpus
from helpers.schedules import schedule_of_ranks
from hypothesis import given, settings
from hypothesis import strategies as st

from dllm.data.lane_kinds import lane_files, most_lanes, read_lanes
from dllm.data.lanes import deal
from dllm.data.source_lanes import SourceLanes
from dllm.errors import UserError
from dllm.files import storage

SIDE = st.lists(st.integers(0, 9), min_size=1, max_size=6)


def pair_of(batch, lane, sep, end):
    """(source, target) of a lane of a batch, after a look at what surrounds them; None where it has none."""
    length, targets, before = int(batch.lengths[lane]), batch.targets[:, lane], batch.before[:, lane]
    assert not batch.inputs[length:, lane].any()
    steps = np.count_nonzero(targets != -1)
    assert (targets[steps:] == -1).all()
    assert not before[steps:].any()
    if not steps:
        assert length == 0
        return None
    assert before[0] == sep
    assert targets[steps - 1] == end
    assert before[1:steps].tolist() == targets[: steps - 1].tolist()
    return batch.inputs[:length, lane].tolist(), before[1:steps].tolist()


@settings(max_examples=25, deadline=None, derandomize=True, database=None)
@given(st.lists(st.tuples(SIDE, SIDE), min_size=1, max_size=25), st.data())
def test_each_pair_comes_once_an_epoch_whatever_ranks_there_are(tmp_path_factory, examples, data):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(storage, "flush", lambda path: None)  # which takes most of the time
        corpus = make_corpus(tmp_path_factory.mktemp("pairs"), examples)
    sep, end = corpus.tokenizer.sep, corpus.tokenizer.end
    count = data.draw(st.integers(1, most_lanes(corpus, "train", "seq2seq")))
    ranks = data.draw(st.integers(1, count + 1))
    window = max(max(len(source), len(target) + 1) for source, target in examples)
    seed, epoch = data.draw(st.integers(1, 3)), data.draw(st.integers(0, 3))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SourceLanes, "group", data.draw(st.sampled_from([4, 4096])))
        parts = [read_lanes(corpus, "train", deal(count, ranks, rank), count, window, kind="seq2seq") for rank in range(ranks)]
        alone = read_lanes(corpus, "train", range(count), count, window, kind="seq2seq")
        schedule = schedule_of_ranks(parts)
        schedule.begin_epoch(seed, epoch)
        alone.arrange(seed, epoch)
        assert schedule.per_epoch == sum(len(target) + 1 for _, target in examples)
        found = [[] for _ in range(count)]
        for place in schedule.places:
            batches, whole = [part.window(place, schedule.width(place)) for part in parts], alone.window(place, 0)
            longest = max(len(batch.targets) for batch in batches)
            assert longest == len(whole.targets) == schedule.width(place)
            assert sum(np.count_nonzero(batch.targets != -1) for batch in batches) == schedule.tokens(place)
            here = [pair_of(batch, lane, sep, end) for batch in batches for lane in range(len(batch.lengths))]
            assert here == [pair_of(whole, lane, sep, end) for lane in range(count)]
            for batch in batches:
                assert len(batch.inputs) == max(1, batch.lengths.max(initial=0))
            for pairs, pair in zip(found, here, strict=True):
                pairs += [] if pair is None else [pair]
    cuts = [len(examples) * lane // count for lane in range(count + 1)]
    for pairs, (start, stop) in zip(found, itertools.pairwise(cuts), strict=True):
        assert sorted(pairs) == sorted((list(source), list(target)) for source, target in examples[start:stop])


def test_sources_and_targets_of_a_window_are_about_equally_long_and_ranks_have_equal_work(tmp_path):
    rng = np.random.default_rng(3)
    sizes = rng.poisson(9, 4000) + 1
    more = rng.integers(0, 4, 4000)
    examples = [(rng.integers(0, 10, size), rng.integers(0, 10, size + extra)) for size, extra in zip(sizes, more, strict=True)]
    corpus = make_corpus(tmp_path, examples)
    ranks = [read_lanes(corpus, "train", deal(16, 2, rank), 16, 100, kind="seq2seq") for rank in range(2)]
    seen = set()
    for epoch in range(2):
        for lanes in ranks:
            lanes.arrange(1, epoch)
        batches = [[lanes.window(place, 0) for lanes in ranks] for place in range(250)]
        rows = np.array([[(len(batch.inputs), len(batch.targets)) for batch in window] for window in batches])
        used = sum(np.array([batch.lengths.sum(), (batch.targets != -1).sum()]) for window in batches for batch in window)
        assert (used / (8 * rows.sum(axis=(0, 1))) > [0.94, 0.9]).all()  # of sources, of targets
        assert rows.sum(axis=2).max(axis=1).sum() < 1.03 * rows.sum() / 2  # both ranks wait for the one with more
        assert abs(np.corrcoef(rows[1:, 0, 0], rows[:-1, 0, 0])[0, 1]) < 0.3  # no order of lengths is left
        now = {tuple(batch.inputs.tobytes() + batch.before.tobytes() for batch in window) for window in batches}
        assert len(seen & now) < 3  # other pairs meet
        seen = now


def test_a_window_must_hold_each_side_but_not_both_together(tmp_path):
    corpus = make_corpus(tmp_path, [([1], [2, 3]), ([4] * 5, [6] * 7), ([4] * 9, [6])])
    with pytest.raises(UserError, match=r"has a source of 9 tokens .* --set train.window=9"):
        read_lanes(corpus, "train", range(1), 1, 8, kind="seq2seq")
    with pytest.raises(UserError, match=r"has a target, with its <end>, of 8 tokens .* --set train.window=8"):
        read_lanes(corpus, "train", range(2), 3, 7, kind="seq2seq")
    read_lanes(corpus, "train", range(1), 1, 9, kind="seq2seq")
    with pytest.raises(UserError, match=r"has 3 pairs: too few for 4 lanes"):
        read_lanes(corpus, "train", range(1), 4, 9, kind="seq2seq")


def test_what_no_model_of_a_kind_reads_is_refused(tmp_path):
    corpus = make_corpus(tmp_path, [([1], [2, 3])])
    for ask in (read_lanes, lane_files):
        more = (9,) if ask is read_lanes else ()
        with pytest.raises(UserError, match=r"holds pairs, and model.kind = tagger reads tags: --preset seq2seq"):
            ask(corpus, "train", range(1), 1, *more, kind="tagger")
