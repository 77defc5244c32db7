"""Lanes of pairs: each window is a pair a lane, in another order in each epoch."""

import itertools

import numpy as np
import pytest
from helpers.pair_corpus import make_corpus
from helpers.schedules import schedule_of_ranks
from hypothesis import given, settings
from hypothesis import strategies as st

from dllm.data import lane_kinds
from dllm.data.lanes import deal
from dllm.data.pair_lanes import PairLanes
from dllm.errors import UserError
from dllm.files import storage

SIDE = st.lists(st.integers(0, 9), min_size=1, max_size=6)


@settings(max_examples=20, deadline=None, derandomize=True, database=None)
@given(st.lists(st.tuples(SIDE, SIDE), min_size=1, max_size=25), st.data())
def test_a_window_of_a_lane_is_a_pair_each_comes_once_and_targets_alone_are_asked_for(tmp_path_factory, examples, data):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(storage, "flush", lambda path: None)  # which takes most of the time
        corpus = make_corpus(tmp_path_factory.mktemp("pairs"), examples)
    sep, end = corpus.tokenizer.sep, corpus.tokenizer.end
    count = data.draw(st.integers(1, len(examples)))
    window = corpus.split("train")["longest"] + data.draw(st.integers(0, 3))
    ranks = data.draw(st.integers(1, count + 1))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PairLanes, "group", 4)
        parts = [lane_kinds.read_lanes(corpus, "train", deal(count, ranks, rank), count, window) for rank in range(ranks)]
        schedule = schedule_of_ranks(parts)
        assert schedule.windows == -(-len(examples) // count)
        assert schedule.per_epoch == sum(len(target) + 1 for _, target in examples)
        found = [[] for _ in range(count)]
        schedule.begin_epoch(data.draw(st.integers(1, 3)), data.draw(st.integers(0, 3)))
        for place in schedule.places:
            windows = [part.window(place, schedule.width(place)) for part in parts]
            tokens, targets = (np.concatenate([window[part] for window in windows], axis=1) for part in (0, 1))
            assert np.count_nonzero(targets != -1) == schedule.tokens(place)
            widest = 0
            for lane in range(count):
                if (targets[:, lane] == -1).all():
                    continue
                stop = int(np.flatnonzero(targets[:, lane] == end)[0]) + 1
                row, wanted = tokens[:stop, lane].tolist(), targets[:, lane].tolist()
                middle, widest = row.index(sep), max(widest, stop)
                assert row[0] == end
                assert wanted == [-1] * middle + row[middle + 1 :] + [end] + [-1] * (len(wanted) - stop)
                found[lane].append((row[1:middle], row[middle + 1 :]))
            assert schedule.width(place) == widest
    cuts = [len(examples) * lane // count for lane in range(count + 1)]
    for lane, (start, stop) in enumerate(itertools.pairwise(cuts)):
        assert sorted(found[lane]) == sorted((list(source), list(target)) for source, target in examples[start:stop])


def test_the_pairs_of_a_window_are_about_equally_long(tmp_path):
    rng = np.random.default_rng(3)
    corpus = make_corpus(tmp_path, [([1] * rng.integers(1, 40), [2] * rng.integers(1, 40)) for _ in range(2000)])
    reader = lane_kinds.read_lanes(corpus, "train", range(8), 8, 100)
    for epoch in range(3):
        reader.arrange(1, epoch)
        _, widths = reader.shapes(np.arange(250))
        assert 8 * widths.sum() < 1.2 * (corpus.split("train")["tokens"] - 1)
        assert np.abs(np.corrcoef(widths[1:], widths[:-1])[0, 1]) < 0.3  # no order of lengths is left


def test_each_epoch_brings_other_pairs_together_in_another_order_whatever_rank_has_a_lane(tmp_path, monkeypatch):
    monkeypatch.setattr(PairLanes, "group", 16)
    rng = np.random.default_rng(3)
    corpus = make_corpus(tmp_path, [([k % 10] * rng.integers(1, 9), [k // 10 % 10, k // 100]) for k in range(203)])

    def batches(epoch, seed=1, ranks=1):
        """Window by window the pairs of all lanes."""
        parts = [lane_kinds.read_lanes(corpus, "train", deal(4, ranks, rank), 4, 30) for rank in range(ranks)]
        for part in parts:
            part.arrange(seed, epoch)
        found = [np.concatenate([part.window(place, 30)[0] for part in parts], axis=1) for place in range(51)]
        return [tuple(lane.tobytes() for lane in window.T) for window in found]

    first, again, second, seeded = batches(0), batches(0, ranks=3), batches(1), batches(0, seed=2)
    assert first == again
    for other in (second, seeded):
        assert sorted(lane for window in first for lane in window) == sorted(lane for window in other for lane in window)
        assert len({*first} & {*other}) < 10  # few windows are made of the same pairs
        assert sum(one == two for one, two in zip(first, other, strict=True)) < 5


@pytest.mark.parametrize(("count", "ranks"), [(6, 6), (4, 3), (5, 2), (24, 8)])
def test_lanes_of_pairs_read_just_the_shards_that_they_name(tmp_path, count, ranks):
    corpus, pairs = make_corpus(tmp_path, [([k % 10], [k % 7, 1]) for k in range(24)], shard_count=6), 4  # in each shard
    for rank in range(ranks):
        mine = deal(count, ranks, rank)
        first, last = 24 * mine.start // count, 24 * mine.stop // count
        named = [file.name for file in lane_kinds.lane_files(corpus, "train", mine, count)]
        assert named == [f"train-{k:05d}.h5" for k in range(first // pairs, -(-last // pairs))]
        others = {path for path in tmp_path.glob("*.h5") if path.name not in named}
        for path in others:
            path.rename(path.with_suffix(".away"))
        reader = lane_kinds.read_lanes(corpus, "train", mine, count, 12)
        for number in range(max(len(order) for order in reader._orders)):
            reader.window(number, 12)
        for path in others:
            path.with_suffix(".away").rename(path)


def test_a_window_must_hold_the_longest_pair_and_lanes_need_pairs(tmp_path):
    corpus = make_corpus(tmp_path, [([1], [2, 3]), ([4] * 5, [6] * 5)])
    with pytest.raises(UserError, match=r"has a pair of 12 tokens .* --set train.window=12"):
        lane_kinds.read_lanes(corpus, "train", range(1), 1, 11)
    with pytest.raises(UserError, match=r"has 2 pairs: too few for 3 lanes"):
        lane_kinds.read_lanes(corpus, "train", range(3), 3, 20)
    lane_kinds.read_lanes(corpus, "train", range(2), 2, 12)


def test_a_stream_that_is_not_made_of_pairs_is_refused(tmp_path):
    corpus = make_corpus(tmp_path, [([1], [2, 3]), ([4] * 5, [6, 11, 6])])  # 11: an <end> inside a target
    with pytest.raises(UserError, match="is not made of pairs"):
        lane_kinds.read_lanes(corpus, "train", range(1), 1, 30)
