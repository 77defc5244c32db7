"""Sound as tokens: recordings to a corpus of levels, at one rate, and back to a recording."""

import json

import numpy as np
import pytest

from dllm.data import audio
from dllm.data.corpus import Corpus
from dllm.data.tokenizers import KINDS, load
from dllm.errors import UserError
from dllm.kernels.mulaw import mulaw_levels
from dllm.prepare import main

TONE = np.sin(np.arange(4000) / 7).astype(np.float32) / 2


@pytest.fixture
def recordings(tmp_path):
    for number, rate in enumerate((8000, 16000)):
        audio.write(tmp_path / f"{number}.wav", audio.Sound(TONE * (number + 1) / 2, rate))
    return tmp_path


def prepared(folder, *options):
    code = main([*options, "--out", str(folder / "corpus")])
    return code, Corpus(folder / "corpus") if code == 0 else None


def levels_of(path, rate):
    return mulaw_levels(audio.at_rate(audio.read(path), rate).samples).tolist()


def test_a_corpus_has_the_levels_of_all_recordings_one_behind_the_other(recordings):
    paths = [str(recordings / name) for name in ("0.wav", "1.wav")]
    _, corpus = prepared(recordings, "--audio", *paths, "--valid-audio", paths[1], "--tokenizer", "mulaw", "--rate", "6000")
    assert corpus.manifest["splits"]["train"]["bytes"] == 4500 == corpus.manifest["splits"]["train"]["tokens"]
    assert corpus.read("train", 0, 4500).tolist() == levels_of(paths[0], 6000) + levels_of(paths[1], 6000)
    assert corpus.tokenizer.rate == 6000
    _, other = prepared(recordings / "more", "--train", paths[0], "--tokenizer-from", str(recordings / "corpus"))
    assert other.tokenizer.rate == 6000
    assert other.read("train", 0, 3000).tolist() == levels_of(paths[0], 6000)


def test_whole_recordings_are_held_out(recordings):
    sound = recordings / "sound"
    sound.mkdir()
    for number in range(40):
        audio.write(sound / f"{number:02}.wav", audio.Sound(TONE[: 100 + number], 8000))
    _, corpus = prepared(recordings, "--audio", str(sound), "--valid-fraction", "0.3", "--tokenizer", "mulaw")
    tokens = [corpus.manifest["splits"][split]["tokens"] for split in ("train", "valid")]
    assert sum(tokens) == sum(100 + number for number in range(40))
    assert tokens[1] > 500
    held_out = corpus.read("valid", 0, tokens[1])
    assert held_out[:100].tolist() == mulaw_levels(audio.read(sound / "00.wav").samples)[:100].tolist()  # all begin alike


def test_tokens_become_a_recording_again():
    tokenizer = load(json.loads(json.dumps(KINDS["mulaw"](11025).to_json())), "tokenizer.json")
    sound = tokenizer.sound(mulaw_levels(TONE).astype(np.int64))
    assert sound.rate == 11025
    assert np.abs(sound.samples - TONE).max() < 0.012  # half a level
    assert tokenizer.decode(tokenizer.encode(b"\x00\x7f\xff\n")) == b"\x00\x7f\xff\n"


@pytest.mark.parametrize("rate", [0, 10**9, 8000.0, True, "8000", None])
def test_a_rate_that_no_sound_has_is_refused(rate):
    with pytest.raises(UserError, match=r"tokenizer\.json"):
        load({"kind": "mulaw", "rate": rate}, "tokenizer.json")


@pytest.mark.parametrize(
    ("options", "why"),
    [
        (["--train", "text.txt", "--tokenizer", "mulaw"], "cannot read text.txt: it is no WAV file"),
        (["--train", "empty.wav", "--tokenizer", "mulaw"], "cannot read empty.wav: there is no sound in it"),
        (["--train", "text.txt", "--tokenizer", "byte", "--rate", "8000"], "--rate goes with --tokenizer mulaw or mel"),
        (["--train", "text.txt", "--tokenizer", "mulaw", "--rate", "7"], "argument --rate: 7 is not"),
        (["--train", "good.wav", "--tokenizer", "mulaw", "--vocab-size", "7"], "--vocab-size 7: mulaw has 256 tokens"),
        (["--train", "text.txt", "--tokenizer", "mulaw", "--field", "text"], "give --audio, and no --field"),
    ],
)
def test_what_is_no_sound_is_one_line(tmp_path, monkeypatch, capfd, options, why):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("no sound")
    audio.write("empty.wav", audio.Sound(np.zeros(0, np.float32), 8000))
    audio.write("good.wav", audio.Sound(TONE, 8000))
    assert prepared(tmp_path, *options) == (2, None)
    error = capfd.readouterr().err
    assert why in error
    assert "Traceback" not in error
    assert not (tmp_path / "corpus").exists()
