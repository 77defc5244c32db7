"""Recordings with labels as frames: what a corpus of them holds, copies that are varied, lanes, and what is refused."""

import json

import numpy as np
import pytest

from dllm.data import audio
from dllm.data.corpus import Corpus
from dllm.data.lane_kinds import read_lanes
from dllm.data.sound_tokenizers import MelTokenizer
from dllm.data.tokenizers import load
from dllm.errors import UserError
from dllm.inference.model_card import command
from dllm.prepare import main

RATE = 8000


def tone(pitch, seconds):
    return audio.Sound(np.sin(np.arange(round(seconds * RATE)) * pitch).astype(np.float32) / 2, RATE)


@pytest.fixture
def folder(tmp_path):
    """Recordings of 0.1 to 0.5 s, and tables of them."""
    for number in range(5):
        audio.write(tmp_path / f"{number}.wav", tone(0.1 * (number + 1), 0.1 * (number + 1)))
    said = ["a b", " ab  ba ", "b", "", "abab"]
    (tmp_path / "said.tsv").write_text("".join(f"{text}\t{number}.wav\n" for number, text in enumerate(said)))
    (tmp_path / "class.tsv").write_text("".join(f"{'low' if number < 2 else 'high'}\t{number}.wav\n" for number in range(5)))
    return tmp_path


def prepared(folder, *options, name="corpus"):
    assert main([*options, "--tokenizer", "mel", "--out", str(folder / name)]) == 0
    return Corpus(folder / name)


def recordings(corpus, split="train"):
    """Of each recording the frames, and what stands beside them."""
    found = []
    for shard in corpus.split(split)["shards"]:
        places, classes = corpus.read_records(split, shard)
        for number, (begin, end) in enumerate(places.T):
            labels = classes[number] if corpus.content == "classes" else corpus.read_tags(split, begin, end)
            found.append((corpus.read_frames(split, begin, end), labels))
    return found


def test_a_corpus_has_the_frames_and_the_class_of_each_recording(folder):
    corpus = prepared(folder, "--classes", str(folder / "class.tsv"), "--test-classes", str(folder / "class.tsv"))
    assert (corpus.content, corpus.labels, corpus.features) == ("classes", ["high", "low"], 40)
    sounds = [audio.read(folder / f"{number}.wav") for number in range(5)]
    frames = {len(one): one for one in map(MelTokenizer(RATE).frames, sounds)}
    found = recordings(corpus)
    assert sorted(len(one) for one, _ in found) == sorted(frames)
    for one, label in found:
        assert np.allclose(one, frames[len(one)], atol=4e-3)  # float16
        assert label == (len(one) < 25)
    assert corpus.split("train")["records"] == corpus.split("test")["records"] == 5


def test_files_of_a_class_are_recordings(folder):
    options = ["--class", f"low={folder / '[01].wav'}", "--class", f"high={folder / '[234].wav'}", "--rate", "4000"]
    corpus = prepared(folder, *options)
    assert sorted((len(one) < 25) == label for one, label in recordings(corpus)) == [True] * 5
    assert corpus.tokenizer.rate == 4000


def test_a_transcript_is_letters_beside_the_first_frames(folder, capfd):
    (folder / "short.wav").write_bytes((folder / "0.wav").read_bytes())
    with open(folder / "said.tsv", "a") as table:
        table.write("aabbaabbaabb\tshort.wav\n")  # 17 frames, and it has nine
    corpus = prepared(folder, "--transcripts", str(folder / "said.tsv"))
    assert corpus.labels == [" ", "a", "b"]
    assert "1 of 6 train recordings are left out: they have fewer frames than letters" in capfd.readouterr().out
    said = {len(one): "".join(corpus.labels[label] for label in labels if label >= 0) for one, labels in recordings(corpus)}
    assert [said[length] for length in sorted(said)] == ["a b", "ab ba", "b", "", "abab"]
    for _, labels in recordings(corpus):
        assert (labels[np.argmax(labels < 0) :] < 0).all()


def test_training_gets_varied_copies_which_depend_on_seed_and_name_alone(folder):
    table = str(folder / "class.tsv")
    options = "--classes", table, "--test-classes", table, "--augment", "2"
    corpus, again = (prepared(folder, *options, name=name) for name in ("one", "two"))
    assert corpus.hash == again.hash
    assert corpus.split("train")["records"] == 15
    assert corpus.split("test")["records"] == 5
    assert len({one.tobytes() for one, _ in recordings(corpus)}) == 15
    assert prepared(folder, *options, "--seed", "2", name="three").hash != corpus.hash


def test_lanes_give_every_recording_once_an_epoch(folder):
    classes = prepared(folder, "--classes", str(folder / "class.tsv"), name="classes")
    lanes = read_lanes(classes, "train", range(2), 2, 100, None, "classifier")
    lanes.arrange(1, 1)
    batches = [lanes.window(place, 0) for place in range(max(lanes.steps))]
    lengths = sorted(int(length) for batch in batches for length in batch.lengths if length)
    assert lengths == sorted(len(one) for one, _ in recordings(classes))
    for batch in batches:
        assert batch.inputs.dtype == np.float32
        assert batch.inputs.shape == (batch.lengths.max(), 2, 40)
        for lane, length in enumerate(batch.lengths):
            assert (batch.inputs[length:, lane] == 0).all()
            assert batch.targets[0, lane] == ((length < 25) if length else -1)
    said = prepared(folder, "--transcripts", str(folder / "said.tsv"), name="said")
    lanes = read_lanes(said, "train", range(5), 5, 100, None, "ctc")
    batch = lanes.window(0, 0)
    assert lanes.shapes(np.array([0]))[0] == [3 + 5 + 1 + 1 + 4]  # an empty transcript counts as one
    texts = {int(n): [label for label in batch.targets[:, lane] if label >= 0] for lane, n in enumerate(batch.lengths)}
    assert texts == {len(one): [label for label in labels if label >= 0] for one, labels in recordings(said)}


def test_lanes_refuse_what_no_window_holds_and_what_they_do_not_hear(folder):
    said = prepared(folder, "--transcripts", str(folder / "said.tsv"))
    with pytest.raises(UserError, match="recording of 48 steps and a window must hold it"):
        read_lanes(said, "train", range(1), 1, 20, None, "ctc")
    with pytest.raises(UserError, match=r"holds recordings with transcripts, and model\.kind = lm reads text or pairs"):
        read_lanes(said, "train", range(1), 1, 100, None, "lm")


@pytest.mark.parametrize(
    ("options", "why"),
    [
        (["--audio", "0.wav", "--tokenizer", "byte"], "--audio is of recordings, and --tokenizer byte makes no levels"),
        (
            ["--train", "text", "--valid-audio", "0.wav", "--tokenizer", "char"],
            "--audio is of recordings, and --tokenizer char makes no levels",
        ),
        (["--train", "text", "--tokenizer", "mel"], "--tokenizer mel makes frames of recordings with labels"),
        (
            ["--transcripts", "said.tsv", "--tokenizer", "char"],
            "--transcripts are of recordings, and --tokenizer char reads",
        ),
        (["--classes", "class.tsv", "--tokenizer", "byte", "--augment", "2"], "--augment is of recordings with labels"),
        (["--classes", "class.tsv", "--tokenizer", "mulaw"], "--tokenizer mulaw makes levels of recordings: give --audio"),
        (
            ["--classes", "gone.tsv", "--tokenizer", "mel"],
            "gone.tsv line 1 names a recording that cannot be read: No such file",
        ),
        (
            ["--classes", "no.tsv", "--tokenizer", "mel"],
            "no.tsv line 1 names a recording that cannot be read: it is no WAV file",
        ),
        (["--transcripts", "control.tsv", "--tokenizer", "mel"], "control.tsv line 1 has a transcript with characters"),
        (
            ["--transcripts", "said.tsv", "--valid-transcripts", "other.tsv", "--tokenizer", "mel"],
            "other.tsv line 1 has a letter that is none of the 3 of the train text",
        ),
    ],
)
def test_what_does_not_fit_is_one_line(folder, monkeypatch, capfd, options, why):
    monkeypatch.chdir(folder)
    (folder / "text").write_text("no sound")
    (folder / "gone.tsv").write_text("a\tgone.wav\nb\t0.wav\n")
    (folder / "no.tsv").write_text("a\ttext\nb\t0.wav\n")
    (folder / "other.tsv").write_text("abc\t4.wav\n")
    (folder / "control.tsv").write_text("a\x07\t4.wav\n")
    assert main([*options, "--out", "corpus"]) == 2
    error = capfd.readouterr().err
    assert why in error
    assert error.count("\n") == 1
    assert not (folder / "corpus").exists()


@pytest.mark.parametrize("key", ["features", "labels", "dtype"])
def test_a_manifest_that_lies_about_frames_is_refused(folder, key):
    prepared(folder, "--transcripts", str(folder / "said.tsv"))
    path = folder / "corpus" / "manifest.json"
    manifest = json.loads(path.read_text())
    for value in {"features": (0, 41, "40", True, None), "labels": ([], ["a", "bc"], ["b", "a"]), "dtype": ("uint8",)}[key]:
        path.write_text(json.dumps({**manifest, key: value}))
        with pytest.raises(UserError, match=r"is not (a manifest|the one its manifest names)"):
            Corpus(folder / "corpus")


@pytest.mark.parametrize("value", [{"rate": 8000}, {"rate": 8000, "bands": 0}, {"rate": 7, "bands": 40}])
def test_frames_that_nothing_says_are_refused(value):
    with pytest.raises(UserError, match=r"tokenizer\.json"):
        load({"kind": "mel", **value}, "tokenizer.json")


@pytest.mark.parametrize(
    ("kind", "wanted"),
    [("lm", "generate x --out sound.wav"), ("classifier", "tools.predict x FILE.wav"), ("ctc", "tools.predict x FILE.wav")],
)
def test_a_model_of_sound_is_asked_for_sound(kind, wanted):
    assert command(kind, "x", False, True) == f"python -m dllm.{wanted}"
