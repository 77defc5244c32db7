"""Shards written and read back, lanes and their schedule; what is damaged or foreign is a UserError that names the file."""

import itertools
import json

import numpy as np
import pytest
from helpers.run_files import flip, place_of
from helpers.schedules import schedule_of_ranks
from hypothesis import given, settings
from hypothesis import strategies as st

from dllm.data import lanes, shards
from dllm.data.corpus import Corpus
from dllm.data.tokenizer_files import save_tokenizer, tokenizer_hash
from dllm.data.tokenizers import CharTokenizer
from dllm.errors import UserError
from dllm.files import storage

FEW = settings(max_examples=150, deadline=None, derandomize=True, database=None)
TOKENS = np.random.default_rng(2).integers(0, 300, 41)
CUTS = (0, 10, 11, 11, 30, 41)  # the third shard is empty


def make_corpus(folder, tokens=TOKENS, cuts=CUTS, vocabulary=300, split="train"):
    """A prepared folder whose shards hold tokens[cuts[i]:cuts[i+1]]."""
    folder.mkdir(exist_ok=True)
    tokenizer = CharTokenizer([chr(0x4E00 + number) for number in range(vocabulary)])
    entries = []
    for number, (start, stop) in enumerate(itertools.pairwise(cuts)):
        path = folder / f"{split}-{number:05d}.h5"
        with shards.ShardWriter(path, shards.token_dtype(vocabulary)) as shard:
            for part in np.array_split(tokens[start:stop], 3):
                shard.append(part)
        assert shard.tokens == stop - start
        entries.append({"name": path.name, "start": start, "stop": stop, "sha256": storage.sha256(path)})
    splits = {split: {"tokens": len(tokens), "bytes": 3 * len(tokens), "shards": entries}}
    save_tokenizer(folder, tokenizer)
    manifest = {
        "format": shards.FORMAT,
        "kind": "char",
        "vocabulary": vocabulary,
        "dtype": shards.token_dtype(vocabulary).name,
        "tokenizer": tokenizer_hash(tokenizer),
        "splits": splits,
    }
    storage.write_json(folder / "manifest.json", manifest)
    return Corpus(folder)


def test_every_range_of_tokens_is_read_back_over_any_number_of_shards(tmp_path):
    corpus = make_corpus(tmp_path)
    for start, stop in itertools.combinations_with_replacement(range(42), 2):
        tokens = corpus.read("train", start, stop)
        assert tokens.dtype == np.int64
        np.testing.assert_array_equal(tokens, TOKENS[start:stop])


def test_only_the_shards_that_hold_a_range_are_opened(tmp_path):
    corpus = make_corpus(tmp_path)
    for number in (0, 1, 2, 4):
        (tmp_path / f"train-{number:05d}.h5").unlink()
    np.testing.assert_array_equal(corpus.read("train", 11, 30), TOKENS[11:30])
    corpus.verify("train", 11, 30)
    with pytest.raises(UserError, match=r"cannot read .*train-00001.h5"):
        corpus.read("train", 10, 30)
    with pytest.raises(UserError, match=r"cannot read .*train-00004.h5"):
        corpus.verify("train", 11, 31)


@pytest.mark.parametrize(
    ("vocabulary", "dtype"), [(1, "uint8"), (256, "uint8"), (257, "uint16"), (65536, "uint16"), (65537, "uint32")]
)
def test_tokens_have_the_smallest_dtype_that_holds_the_vocabulary(vocabulary, dtype):
    assert shards.token_dtype(vocabulary) == np.dtype(dtype)


def test_the_largest_token_of_a_dtype_survives(tmp_path):
    corpus = make_corpus(tmp_path, np.array([255, 0, 255]), (0, 3), 256)
    assert corpus.dtype == np.uint8
    assert corpus.read("train", 0, 3).tolist() == [255, 0, 255]


def test_a_shard_that_was_not_finished_is_not_there(tmp_path):
    def write():
        with shards.ShardWriter(tmp_path / "train-00000.h5", np.uint8) as shard:
            shard.append(np.zeros(5, np.uint8))
            raise MemoryError

    with pytest.raises(MemoryError):
        write()
    assert list(tmp_path.iterdir()) == []


def test_a_flipped_bit_anywhere_is_found_by_verify_where_the_range_touches_the_shard(tmp_path):
    corpus, path = make_corpus(tmp_path), tmp_path / "train-00003.h5"
    size = path.stat().st_size
    for place in (0, 100, place_of(path), size - 1):
        flip(path, place)
        corpus.verify("train", 0, 11)
        with pytest.raises(UserError, match=r"train-00003.h5 is damaged"):
            corpus.verify("train", 0, 12)
        flip(path, place)
    corpus.verify("train", 0, 41)


def test_a_flipped_bit_in_the_tokens_is_found_by_reading_too(tmp_path):
    corpus, path = make_corpus(tmp_path), tmp_path / "train-00003.h5"
    flip(path, place_of(path) + 5)
    with pytest.raises(UserError, match=r"cannot read .*train-00003.h5"):
        corpus.read("train", 0, 41)


@pytest.mark.parametrize("size", [0, 7, 800, -1])
def test_a_truncated_shard_is_named(tmp_path, size):
    corpus, path = make_corpus(tmp_path), tmp_path / "train-00003.h5"
    path.write_bytes(path.read_bytes()[:size])
    for check in (corpus.read, corpus.verify):
        with pytest.raises(UserError, match=r"train-00003.h5"):
            check("train", 0, 41)


def test_tokens_beyond_the_vocabulary_are_named(tmp_path):
    corpus = make_corpus(tmp_path, np.array([0, 299, 300]), (0, 3))
    assert corpus.read("train", 0, 2).tolist() == [0, 299]
    with pytest.raises(UserError, match=r"split 'train' has a token beyond its vocabulary of 300"):
        corpus.read("train", 0, 3)


def test_a_missing_split_is_named_with_those_there_are(tmp_path):
    with pytest.raises(UserError, match=r"has no split 'test'; it has train"):
        make_corpus(tmp_path).split("test")


def test_the_same_text_and_tokenizer_have_the_same_hash(tmp_path):
    one, same, other = (make_corpus(tmp_path / name) for name in "abc")
    other = make_corpus(tmp_path / "c", TOKENS[::-1])
    assert one.hash == same.hash != other.hash
    assert one.tokenizer_hash == other.tokenizer_hash
    one.check_vocabulary(other.tokenizer_hash, "RUN")
    with pytest.raises(UserError, match=r"is not the one that RUN was trained with"):
        one.check_vocabulary(make_corpus(tmp_path / "d", vocabulary=301).tokenizer_hash, "RUN")


MANIFESTS = {  # how a manifest is spoilt: what the message says
    "missing key": (lambda value: value.pop("vocabulary"), "has no 'vocabulary'"),
    "missing key in a split": (lambda value: value["splits"]["train"].pop("bytes"), "has no 'bytes'"),
    "missing key in a shard": (lambda value: value["splits"]["train"]["shards"][0].pop("sha256"), "has no 'sha256'"),
    "newer format": (lambda value: value.update(format=99), "has format 99"),
    "signed dtype": (lambda value: value.update(dtype="int8"), "is not a manifest"),
    "wide dtype": (lambda value: value.update(dtype="int64"), "is not a manifest"),
    "list of splits": (lambda value: value.update(splits=[]), "is not a manifest"),
    "other vocabulary": (lambda value: value.update(vocabulary=301), "tokenizer.json is not the one"),
    "other tokenizer": (lambda value: value.update(tokenizer="0" * 64), "tokenizer.json is not the one"),
    "split is a number": (lambda value: value["splits"].update(train=5), "manifest.json"),
    "split is a list": (lambda value: value["splits"].update(train=[]), "manifest.json"),
    "shards are a number": (lambda value: value["splits"]["train"].update(shards=5), "manifest.json"),
    "a shard is a number": (lambda value: value["splits"]["train"].update(shards=[5]), "manifest.json"),
    "tokens are a word": (lambda value: value["splits"]["train"].update(tokens="many"), "manifest.json"),
    "tokens are more than the shards'": (lambda value: value["splits"]["train"].update(tokens=42), "manifest.json"),
    "a gap between shards": (lambda value: value["splits"]["train"]["shards"].pop(1), "manifest.json"),
    "a shard elsewhere": (lambda value: value["splits"]["train"]["shards"][0].update(name="../a.h5"), "manifest.json"),
}


@pytest.mark.parametrize("case", MANIFESTS)
def test_a_bad_manifest_is_named(tmp_path, case):
    spoil, message = MANIFESTS[case]
    make_corpus(tmp_path)
    value = json.loads((tmp_path / "manifest.json").read_text())
    spoil(value)
    storage.write_json(tmp_path / "manifest.json", value)
    with pytest.raises(UserError) as error:
        Corpus(tmp_path)
    assert message in str(error.value)
    assert str(tmp_path) in str(error.value)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b"\xff\xfe"])
@pytest.mark.parametrize("name", ["manifest.json", "tokenizer.json"])
def test_a_json_file_that_is_none_is_named(tmp_path, name, content):
    make_corpus(tmp_path)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=name):
        Corpus(tmp_path)


def test_a_folder_that_is_no_corpus_is_named(tmp_path):
    with pytest.raises(UserError, match=r"there is no prepared corpus at .*/missing"):
        Corpus(tmp_path / "missing")
    with pytest.raises(UserError, match=r"cannot read .*manifest.json: No such file"):
        Corpus(tmp_path)


def test_the_tokenizer_of_another_corpus_is_noticed(tmp_path):
    make_corpus(tmp_path)
    save_tokenizer(tmp_path, CharTokenizer([chr(0x5E00 + number) for number in range(300)]))
    with pytest.raises(UserError, match=r"tokenizer.json is not the one its manifest names"):
        Corpus(tmp_path)


def test_a_shard_of_another_length_or_dtype_than_the_manifest_says_is_named(tmp_path):
    corpus = make_corpus(tmp_path)
    for tokens in (np.zeros(2, np.uint16), np.zeros(1, np.uint32)):
        with shards.ShardWriter(tmp_path / "train-00001.h5", tokens.dtype) as shard:
            shard.append(tokens)
        with pytest.raises(UserError, match=r"train-00001.h5: 'tokens' is uint.* where uint16\[1\] is expected"):
            corpus.read("train", 10, 11)


# lanes


@pytest.mark.parametrize(("count", "ranks"), [(1, 1), (8, 1), (8, 3), (7, 7), (5, 8), (32, 6), (1000, 17)])
def test_lanes_are_dealt_in_order_and_evenly(count, ranks):
    parts = [lanes.deal(count, ranks, rank) for rank in range(ranks)]
    assert [lane for part in parts for lane in part] == list(range(count))
    sizes = [len(part) for part in parts]
    assert max(sizes) - min(sizes) <= 1


def schedule_of(steps, window, last="keep", place=0):
    """The Schedule of lanes of so many steps, two lanes a rank."""
    ranks = [object.__new__(lanes.Lanes) for _ in range(0, len(steps), 2)]
    for number, rank in enumerate(ranks):
        rank.steps, rank.T, rank.stride = steps[2 * number : 2 * number + 2], window, window

    return schedule_of_ranks(ranks, last, place)


def epoch(reader, schedule):
    """What every lane of a reader is given and asked in an epoch, padding taken out."""
    windows = [reader.window(place, schedule.width(place)) for place in schedule.places]
    tokens, targets = (np.concatenate([window[part] for window in windows]) for part in (0, 1))
    real = targets != -1
    return [(tokens[real[:, lane], lane], targets[real[:, lane], lane]) for lane in range(targets.shape[1])], targets


DEALS = [(1, 7, 1), (4, 3, 1), (4, 3, 3), (5, 7, 2), (3, 100, 2), (20, 1, 4)]


@pytest.mark.parametrize(("count", "window", "ranks"), DEALS)
@pytest.mark.parametrize("ahead", [1, 6, 1 << 16])
def test_in_an_epoch_every_lane_sees_its_tokens_once_and_in_order(tmp_path, monkeypatch, count, window, ranks, ahead):
    monkeypatch.setattr(lanes, "AHEAD", ahead)
    corpus, length = make_corpus(tmp_path), 41 // count
    schedule = schedule_of([length - 1] * count, window)
    seen = 0
    for rank in range(ranks):
        mine = lanes.deal(count, ranks, rank)
        reader = lanes.Lanes(corpus, "train", mine, count, window)
        assert reader.steps == [length - 1] * len(mine)
        np.testing.assert_array_equal(reader.numbers, list(mine))
        for lane, (tokens, targets) in zip(mine, epoch(reader, schedule)[0], strict=True):
            text_of_lane = TOKENS[lane * length : (lane + 1) * length]
            np.testing.assert_array_equal(tokens, text_of_lane[:-1])
            np.testing.assert_array_equal(targets, text_of_lane[1:])
            seen += len(targets)
    assert seen == schedule.per_epoch == sum(map(schedule.tokens, schedule.places))


def test_windows_may_be_read_in_any_order_and_are_new_arrays(tmp_path):
    reader = lanes.Lanes(make_corpus(tmp_path), "train", range(2), 2, 3)
    first = reader.window(3, 3)
    for place in (15, 0, 6):
        reader.window(place, 3)
    again = reader.window(3, 3)
    np.testing.assert_array_equal(first[:2], again[:2])
    assert not np.shares_memory(first[0], again[0])
    assert first[0].dtype == first[1].dtype == np.int64
    np.testing.assert_array_equal(first[0], TOKENS[:40].reshape(2, 20)[:, 3:6].T)


def test_short_lanes_of_private_corpora_end_in_padding(tmp_path):
    corpora = [make_corpus(tmp_path / "a"), make_corpus(tmp_path / "b", TOKENS[:17], (0, 17))]
    readers = [
        lanes.Lanes(corpora[0], "train", range(2), 2, 6),
        lanes.Lanes(corpora[1], "train", range(2), 2, 6, first=2),
    ]
    assert [list(reader.numbers) for reader in readers] == [[0, 1], [2, 3]]
    schedule = schedule_of([19, 19, 7, 7], 6)
    assert (schedule.windows, schedule.per_epoch) == (4, 52)
    assert schedule.places == [0, 6, 12, 18]
    assert [schedule.width(place) for place in schedule.places] == [6, 6, 6, 1]
    assert [schedule.tokens(place) for place in schedule.places] == [24, 14, 12, 2]
    for reader, corpus_tokens in zip(readers, (TOKENS[:40], TOKENS[:16]), strict=True):
        rows, targets = epoch(reader, schedule)
        for row, text_of_lane in zip(rows, corpus_tokens.reshape(2, -1), strict=True):
            np.testing.assert_array_equal(row[1], text_of_lane[1:])
        assert targets.shape == (19, 2)
    assert (targets[7:] == -1).all()


@pytest.mark.parametrize(("predicted", "windows", "per_epoch"), [(20, 2, 16), (16, 2, 16), (8, 1, 8), (5, 1, 5)])
def test_a_shorter_last_window_may_be_dropped_unless_it_is_the_only_one(predicted, windows, per_epoch):
    schedule = schedule_of([predicted], 8, "drop")
    assert (schedule.windows, schedule.per_epoch) == (windows, per_epoch)


@FEW
@given(st.lists(st.integers(1, 40), min_size=1, max_size=6), st.integers(1, 12))
def test_a_schedule_counts_every_predicted_token_once(predicted, window):
    schedule = schedule_of(predicted, window)
    assert schedule.per_epoch == sum(predicted)
    for place in schedule.places:
        left = [min(window, max(0, length - place)) for length in predicted]
        assert schedule.tokens(place) == sum(left)
        assert schedule.width(place) == max(left) > 0


@FEW
@given(st.lists(st.integers(1, 40), min_size=1, max_size=6), st.integers(1, 12), st.data())
def test_from_any_place_an_epoch_goes_on_to_its_end_without_reading_text_twice(predicted, window, data):
    place = data.draw(st.integers(0, max(predicted) - 1))
    schedule = schedule_of(predicted, window, place=place)
    steps, seen, at = 0, 0, place
    while at or not steps:
        assert 0 < schedule.width(at) <= window
        seen, at, steps = seen + schedule.tokens(at), schedule.after(at), steps + 1
        assert at % window == 0
    assert seen == sum(max(0, length - place) for length in predicted)
    assert steps == schedule_of(predicted, window).left(place)
    assert schedule.per_epoch == sum(predicted)


def test_too_few_tokens_for_the_lanes_are_named(tmp_path):
    corpus = make_corpus(tmp_path)
    assert lanes.Lanes(corpus, "train", range(20), 20, 5).steps == [1] * 20
    with pytest.raises(UserError, match=r"split 'train' of .* has 41 tokens: too few for 21 lanes"):
        lanes.Lanes(corpus, "train", range(21), 21, 5)


@pytest.mark.parametrize(("count", "ranks"), [(1, 1), (4, 4), (5, 3), (20, 8)])
def test_lanes_read_just_the_shards_that_they_name(tmp_path, count, ranks):
    corpus, spans = make_corpus(tmp_path), list(itertools.pairwise(CUTS))
    length = 41 // count
    for rank in range(ranks):
        mine = lanes.deal(count, ranks, rank)
        start, stop = mine.start * length, mine.stop * length
        named = [file.name for file in lanes.Lanes.files(corpus, "train", mine, count)]
        assert named == [f"train-{k:05d}.h5" for k, (first, last) in enumerate(spans) if first < stop and last > start]
        others = {path for path in tmp_path.glob("*.h5") if path.name not in named}
        for path in others:
            path.rename(path.with_suffix(".away"))
        lanes.Lanes(corpus, "train", mine, count, 50).window(0, 50)
        for path in others:
            path.with_suffix(".away").rename(path)


def test_a_shard_is_hashed_once_unless_its_file_is_another(tmp_path, monkeypatch):
    corpus, hashed = make_corpus(tmp_path), []
    real = storage.sha256
    monkeypatch.setattr(storage, "sha256", lambda path, *rest: hashed.append(path.name) or real(path, *rest))
    for _ in range(2):
        corpus.verify("train", 0, 12)
    assert hashed == [f"train-{number:05d}.h5" for number in range(4)]
    flip(tmp_path / "train-00003.h5", 100)
    with pytest.raises(UserError, match=r"train-00003.h5 is damaged"):
        corpus.verify("train", 0, 12)
    assert len(hashed) == 5
