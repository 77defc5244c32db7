"""Lanes of texts with labels, and of text that is read both ways."""

import itertools

import numpy as np
import pytest
from helpers.labels import as_counted, conllu, make_corpus, records, sentences
from helpers.schedules import schedule_of_ranks
from hypothesis import given, settings
from hypothesis import strategies as st
from test_shards import make_corpus as corpus_of_text

from dllm.data import text
from dllm.data.labelled_lanes import LabelledLanes
from dllm.data.labelling import Classing, Tagging
from dllm.data.lane_kinds import lane_files, most_lanes, read_lanes
from dllm.data.lanes import deal
from dllm.errors import UserError
from dllm.files import storage

FEW = settings(max_examples=8, deadline=None, derandomize=True, database=None)


@pytest.fixture(scope="module", params=["tags", "classes"])
def labelled(request, tmp_path_factory):
    """A corpus in several shards, the kind of model that reads it, and its records."""
    folder, rng = tmp_path_factory.mktemp(request.param), np.random.default_rng(5)
    examples = sentences(rng, 57)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(storage, "flush", lambda path: None)
        if request.param == "tags":
            (folder / "train").write_text(conllu(examples).replace("\tTe\t", "\t_\t"))
            patch.setattr(text, "SHARD", 2500)
            corpus = make_corpus(folder / "out", Tagging(1), {"train": [folder / "train"]})
        else:
            (folder / "train").write_text("".join(f"{tags[0]}\t{' '.join(words)}\n" for words, tags in examples))
            patch.setattr(text, "SHARD", 300)
            corpus = make_corpus(folder / "out", Classing(1), {"train": [folder / "train"]})
    assert len(corpus.split("train")["shards"]) > 2
    wanted = [(tokens, [corpus.labels.index(label) for label in labels if label]) for tokens, labels in records(corpus)]
    return corpus, {"tags": "tagger", "classes": "classifier"}[request.param], wanted


@FEW
@given(st.data())
def test_each_record_comes_once_an_epoch_whatever_ranks_there_are(labelled, data):
    corpus, kind, wanted = labelled
    count = data.draw(st.sampled_from([1, 3, 8, most_lanes(corpus, "train", kind)]))
    ranks, seed, epoch = (
        data.draw(st.sampled_from([1, 2, 5, count + 1])),
        data.draw(st.integers(1, 3)),
        data.draw(st.integers(0, 3)),
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LabelledLanes, "group", data.draw(st.sampled_from([4, 4096])))
        parts = [read_lanes(corpus, "train", deal(count, ranks, rank), count, 90, kind=kind) for rank in range(ranks)]
        schedule, alone = schedule_of_ranks(parts), read_lanes(corpus, "train", range(count), count, 90, kind=kind)
        schedule.begin_epoch(seed, epoch)
        alone.arrange(seed, epoch)
        assert schedule.per_epoch == sum(len(labels) for _, labels in wanted)
        found = [[] for _ in range(count)]
        for place in schedule.places:
            batches, whole = [part.window(place, schedule.width(place)) for part in parts], alone.window(place, 0)
            here = [lane for batch in batches for lane in as_counted(batch)]
            assert here == as_counted(whole)
            assert schedule.tokens(place) == sum(len(labels) for _, labels in here)
            assert schedule.width(place) == len(whole.targets) == max(len(batch.targets) for batch in batches)
            assert all(len(batch.inputs) == max(1, batch.lengths.max(initial=0)) for batch in batches)
            for lane, record in zip(found, here, strict=True):
                lane += [record] if record[0] else []
    cuts = [len(wanted) * lane // count for lane in range(count + 1)]
    for lane, (start, stop) in zip(found, itertools.pairwise(cuts), strict=True):
        assert sorted(lane) == sorted(wanted[start:stop])


def test_lanes_of_records_read_just_the_shards_that_they_name(labelled):
    corpus, kind, _ = labelled
    for rank in range(4):
        named = [file.name for file in lane_files(corpus, "train", deal(5, 4, rank), 5, kind)]
        others = {path for path in corpus.folder.glob("*.h5") if path.name not in named}
        assert others
        for path in others:
            path.rename(path.with_suffix(".away"))
        lanes = read_lanes(corpus, "train", deal(5, 4, rank), 5, 90, kind=kind)
        for place in range(max(lanes.steps)):
            lanes.window(place, 0)
        for path in others:
            path.with_suffix(".away").rename(path)


def test_a_sentence_must_fit_a_window_and_of_a_text_its_end_is_read(labelled):
    corpus, kind, wanted = labelled
    longest = corpus.split("train")["longest"]
    if kind == "tagger":
        with pytest.raises(UserError, match=f"has a sentence of {longest} steps .* --set train.window={longest}"):
            read_lanes(corpus, "train", range(1), 1, longest - 1, kind=kind)
    else:
        lanes = read_lanes(corpus, "train", range(1), 1, 3, kind=kind)
        found = [as_counted(lanes.window(place, 0))[0] for place in range(len(wanted))]
        assert sorted(found) == sorted((tokens[-3:], label) for tokens, label in wanted)
    with pytest.raises(UserError, match=r"reads text or pairs: --preset (tagger|classifier)"):
        read_lanes(corpus, "train", range(1), 1, 90)
    with pytest.raises(UserError, match=f"has {len(wanted)} records: too few for 99 lanes"):
        read_lanes(corpus, "train", range(1), 99, 90, kind=kind)


def test_sentences_of_a_window_are_about_equally_long(tmp_path, monkeypatch):
    monkeypatch.setattr(storage, "flush", lambda path: None)
    rng = np.random.default_rng(1)
    lines = "".join(f"{number % 2}\t{'a' * rng.integers(1, 60)}\n" for number in range(1600))
    (tmp_path / "train").write_text(lines)
    corpus = make_corpus(tmp_path / "out", Classing(1), {"train": [tmp_path / "train"]}, "byte")
    lanes = read_lanes(corpus, "train", range(8), 8, 60, kind="classifier")
    lanes.arrange(1, 2)
    batches = [lanes.window(place, 0) for place in range(200)]
    rows = np.array([len(batch.inputs) for batch in batches])
    assert sum(batch.lengths.sum() for batch in batches) > 0.88 * 8 * rows.sum()
    assert abs(np.corrcoef(rows[1:], rows[:-1])[0, 1]) < 0.3  # no order of lengths is left


@pytest.mark.parametrize(("count", "window", "ahead"), [(1, 7, 1), (3, 4, 6), (5, 100, 1 << 16)])
def test_text_is_read_onwards_and_backwards_each_token_once(tmp_path, monkeypatch, count, window, ahead):
    monkeypatch.setattr("dllm.data.lanes.AHEAD", ahead)
    monkeypatch.setattr("dllm.data.both_ways_lanes.AHEAD", ahead)
    corpus, length = corpus_of_text(tmp_path), 41 // count
    lanes = read_lanes(corpus, "train", range(count), count, window, kind="bilm")
    plain = read_lanes(corpus, "train", range(count), count, window)
    schedule = schedule_of_ranks([lanes])
    assert schedule.per_epoch == 2 * count * (length - 1)
    parts = [lanes.window(place, schedule.width(place)) for place in schedule.places]
    inputs, targets = (np.concatenate([part[one] for part in parts]) for one in (0, 1))
    for lane in range(count):
        tokens = corpus.read("train", lane * length, lane * length + length)
        np.testing.assert_array_equal(inputs[:, lane], tokens[:-1])
        np.testing.assert_array_equal(targets[:, lane], tokens[1:])
        np.testing.assert_array_equal(inputs[:, count + lane], tokens[:0:-1])
        np.testing.assert_array_equal(targets[:, count + lane], tokens[-2::-1])
    np.testing.assert_array_equal(parts[0].inputs[:, :count], plain.window(0, schedule.width(0)).inputs)
