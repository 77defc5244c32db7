"""Sound from recordings to what is made of them: levels that are continued, and text that is written down, by two ranks."""

import json

import numpy as np
import pytest
from helpers.launch import mpirun

from dllm.data import audio

PITCHES = {"low": 0.2, "high": 1.1}  # radians a sample


def small(*settings):
    return [word for one in ("model.hidden=16", "train.lanes=4", "log.sample=0", *settings) for word in ("--set", one)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Recordings of one or two tones, the names of which are said in them."""
    folder, rng, lines = tmp_path_factory.mktemp("speech"), np.random.default_rng(1), []
    for number in range(24):
        said = rng.choice([*PITCHES], rng.integers(1, 3)).tolist()
        tones = [np.sin(np.arange(2400) * PITCHES[word]) * np.hanning(2400) for word in said]
        audio.write(folder / f"{number:02}.wav", audio.Sound(np.concatenate(tones).astype(np.float32) / 2, 8000))
        lines.append(f"{' '.join(said)}\t{number:02}.wav\n")
    (folder / "said.tsv").write_text("".join(lines))
    return folder


def test_a_model_of_sound_is_measured_in_bits_a_sample_and_continues_it(folder):
    sounds = [f"{number:02}.wav" for number in range(4)]
    mpirun(2, "-m", "dllm.prepare", "--audio", *sounds, "--test-audio", *sounds, "--tokenizer", "mulaw", "--out", "levels",
           cwd=folder, check=True)  # fmt: skip
    done = mpirun(2, "-m", "dllm.train", "--data", "levels", "--out", "sound", "--max-steps", 4, *small("model.embedding=8"),
                  cwd=folder, check=True)  # fmt: skip
    assert "python -m dllm.generate sound --out sound.wav" in done.stdout
    done = mpirun(2, "-m", "dllm.evaluate", "sound", cwd=folder, check=True)
    measured = json.loads(done.stdout.splitlines()[-1])
    assert measured["bits_per_sample"] == measured["bits_per_token"] == pytest.approx(measured["bits_per_byte"])
    mpirun(0, "-m", "dllm.generate", "sound", "--out", "x.wav", "--tokens", 300, cwd=folder, check=True)
    assert len(audio.read(folder / "x.wav").samples) == 300
    for options in (["--prompt", "text"], [], ["--out", "none/x.wav"]):
        refused = mpirun(0, "-m", "dllm.generate", "sound", *options, cwd=folder)
        assert refused.returncode == 2
        assert refused.stderr.count("\n") == 1


def test_a_model_writes_down_what_it_has_learnt_to_hear(folder):
    mpirun(2, "-m", "dllm.prepare", "--transcripts", "said.tsv", "--test-transcripts", "said.tsv", "--tokenizer", "mel",
           "--augment", 1, "--out", "frames", cwd=folder, check=True)  # fmt: skip
    settings = "model.layers=1", "train.lr=0.02", "train.warmup=5", "train.epochs=60", "model.dropout=0", "train.window=100"
    mpirun(2, "-m", "dllm.train", "--preset", "speech-to-text", "--data", "frames", "--out", "text", *small(*settings),
           cwd=folder, check=True)  # fmt: skip
    found = [
        json.loads(mpirun(ranks, "-m", "dllm.evaluate", "text", cwd=folder, check=True).stdout.splitlines()[-1])
        for ranks in (1, 3)
    ]
    assert found[0]["wer"] < 10
    assert found[0]["cer"] <= found[0]["wer"]
    assert found[1]["wer"] == found[0]["wer"]
    assert found[1]["loss"] == pytest.approx(found[0]["loss"], rel=1e-4)
    wanted = (folder / "said.tsv").read_text().splitlines()[0].partition("\t")[0]
    done = mpirun(2, "-m", "dllm.tools.predict", "text", "00.wav", cwd=folder, check=True)
    assert sum(one == other for one, other in zip(done.stdout.split(), wanted.split(), strict=False)) >= 1
    assert json.loads(mpirun(0, "-m", "dllm.tools.predict", "text", "00.wav", "--json", cwd=folder, check=True).stdout) == {
        "text": done.stdout.strip("\n")
    }
