"""Recordings: what WAV files hold, other rates, levels, frames, and voices that are varied."""

import io
import struct
import time
import wave

import numpy as np
import pytest

from dllm.data import audio
from dllm.errors import UserError
from dllm.kernels.mel import log_mel, mel_filters
from dllm.kernels.mulaw import mulaw_levels, mulaw_samples


def wav(path, data, width=2, channels=1, rate=8000):
    with wave.open(str(path), "wb") as file:
        file.setnchannels(channels)
        file.setsampwidth(width)
        file.setframerate(rate)
        file.writeframes(data)
    return path


@pytest.mark.parametrize(
    ("width", "data", "expected"),
    [
        (1, bytes([0, 128, 192]), [-1, 0, 0.5]),
        (2, struct.pack("<3h", -32768, 0, 16384), [-1, 0, 0.5]),
        (3, b"\x00\x00\x80\x00\x00\x00\x00\x00\x40", [-1, 0, 0.5]),
        (4, struct.pack("<3i", -(1 << 31), 0, 1 << 30), [-1, 0, 0.5]),
    ],
)
def test_samples_of_every_width_are_parts_of_the_largest(tmp_path, width, data, expected):
    sound = audio.read(wav(tmp_path / "a.wav", data, width, rate=11025))
    assert sound.samples.tolist() == expected
    assert sound.samples.dtype == np.float32
    assert sound.rate == 11025


def test_channels_are_averaged(tmp_path):
    data = struct.pack("<4h", 16384, 0, -32768, 16384)
    assert audio.read(wav(tmp_path / "a.wav", data, channels=2)).samples.tolist() == [0.25, -0.25]


def test_what_is_written_is_read_again(tmp_path):
    samples = np.sin(np.arange(500) / 9).astype(np.float32)
    audio.write(tmp_path / "a.wav", audio.Sound(samples, 8000))
    sound = audio.read(tmp_path / "a.wav")
    assert sound.rate == 8000
    assert np.abs(sound.samples - samples).max() < 2 / 32768


def test_flac_is_read_as_wav_is(tmp_path):
    soundfile = pytest.importorskip("soundfile")
    samples = np.sin(np.arange(4000) / 9)
    soundfile.write(tmp_path / "a.flac", np.stack([samples, -samples / 2], axis=1), 22050)
    sound = audio.read(tmp_path / "a.flac")
    assert sound.rate == 22050
    assert np.abs(sound.samples - samples / 4).max() < 1e-4
    soundfile.write(tmp_path / "float.wav", samples, 8000, subtype="FLOAT")  # which the standard library refuses
    assert np.abs(audio.read(tmp_path / "float.wav").samples - samples).max() < 1e-6


def promised(bytes_there, bytes_said):
    """A WAV file that says something else than it has."""
    file = io.BytesIO()
    with wave.open(file, "wb") as wav_of:
        wav_of.setparams((1, 2, 8000, 0, "NONE", ""))
        wav_of.writeframes(bytes(bytes_there))
    data = bytearray(file.getvalue())
    data[40:44] = struct.pack("<I", bytes_said)
    return bytes(data)


def test_a_header_of_a_pipe_may_promise_too_much(tmp_path):
    (tmp_path / "a.wav").write_bytes(promised(300, 0xFFFFFFFF))
    assert len(audio.read(tmp_path / "a.wav").samples) == 150


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"", "it is no WAV file"),
        (b"ID3 what is no sound", "it is no WAV file"),
        (promised(100, 200), "it is cut: 100 of 200 bytes"),
        (promised(0, 0), "no sound in it"),
        (promised(100, 100)[:30], "it is no WAV file of whole numbers"),
        (promised(4, 4)[:24] + struct.pack("<I", 10) + promised(4, 4)[28:], "10 samples a second"),
        (promised(8, 8)[:34] + struct.pack("<H", 64) + promised(8, 8)[36:], "64 bits"),
        (promised(8, 8)[:20] + struct.pack("<H", 85) + promised(8, 8)[22:], "it is no WAV file of whole numbers"),
    ],
)
def test_what_is_no_recording_is_one_line(tmp_path, data, why):
    (tmp_path / "a.wav").write_bytes(data)
    with pytest.raises(UserError, match=why) as error:
        audio.read(tmp_path / "a.wav")
    assert str(error.value).count("a.wav") == 1


def test_a_folder_and_nothing_are_one_line(tmp_path):
    for path in (tmp_path, tmp_path / "missing"):
        with pytest.raises(UserError, match="cannot read"):
            audio.read(path)


@pytest.mark.parametrize(("rate", "wanted"), [(8000, 16000), (44100, 16000), (16000, 8000), (8000, 8560), (8001, 7999)])
def test_a_tone_at_another_rate_is_the_tone(rate, wanted):
    tone = lambda rate, seconds: np.sin(2 * np.pi * 440 * np.arange(round(rate * seconds)) / rate + 0.3)
    found = audio.resample(tone(rate, 0.5), rate, wanted)
    assert len(found) == -(-round(rate * 0.5) * wanted // rate)
    inside = slice(len(found) // 8, -len(found) // 8)
    assert np.abs(found - tone(wanted, 0.5)[: len(found)])[inside].max() < 1e-4


def test_what_a_lower_rate_cannot_hold_goes():
    high = np.sin(2 * np.pi * 5000 * np.arange(8000) / 16000)
    assert np.abs(audio.resample(high, 16000, 8000)[500:-500]).max() < 1e-3


def test_levels_are_those_of_the_formula_and_come_back():
    levels = np.arange(256)
    assert (mulaw_levels(mulaw_samples(levels)) == levels).all()
    for x in (-1, -0.3, -1e-3, 0, 1e-4, 0.02, 0.9, 1):
        F = np.sign(x) * np.log(1 + 255 * abs(x)) / np.log(256)
        assert mulaw_levels(np.array([x]))[0] == int((F + 1) / 2 * 255 + 0.5)
    assert mulaw_levels(np.array([-7.0, 7.0])).tolist() == [0, 255]
    samples = np.linspace(-1, 1, 10001)
    errors = np.abs(mulaw_samples(mulaw_levels(samples)) - samples)
    assert (errors <= (np.abs(samples) + 1 / 255) * np.log(256) / 255 * 1.02).all()  # half a level, where it is


def plain_log_mel(samples, rate, bands):
    """`log_mel` by loops, from its formulas."""
    window, hop = round(0.025 * rate), round(0.01 * rate)
    size = 2 * 2 ** int(np.ceil(np.log2(window)))
    mel = lambda f: 2595 * np.log10(1 + f / 700)
    edges = [mel(rate / 2) * b / (bands + 1) for b in range(bands + 2)]
    frequencies = [700 * (10 ** (edge / 2595) - 1) for edge in edges]
    powers = []
    for start in range(0, max(1, len(samples) - window + 1), hop):
        part = [samples[start + k] if start + k < len(samples) else 0.0 for k in range(window)]
        part = [x * (0.5 - 0.5 * np.cos(2 * np.pi * k / window)) for k, x in enumerate(part)]
        lines = [
            abs(sum(x * np.exp(-2j * np.pi * f * k / size) for k, x in enumerate(part))) ** 2 for f in range(size // 2 + 1)
        ]
        row = []
        for b in range(bands):
            low, middle, high = frequencies[b : b + 3]
            total = 0.0
            for f, power in enumerate(lines):
                at = f * rate / size
                if low < at < high:
                    total += power * ((at - low) / (middle - low) if at < middle else (high - at) / (high - middle))
            row.append(total)
        powers.append(row)
    loudest = max(max(row) for row in powers)
    logs = np.array([[np.log(max(power, 1e-8 * loudest)) for power in row] for row in powers])
    return (logs - logs.mean()) / max(logs.std(), 1e-3)


@pytest.mark.parametrize("n", [150, 520])
def test_frames_are_those_of_the_formulas(n):
    samples = np.random.default_rng(1).standard_normal(n) * np.hanning(n)
    found = log_mel(samples, 2000, 6)
    assert found.dtype == np.float32
    assert np.allclose(found, plain_log_mel(samples, 2000, 6), atol=1e-5)


def test_frames_do_not_depend_on_loudness_and_silence_is_nothing():
    samples = np.random.default_rng(1).standard_normal(4000).astype(np.float32) / 10
    assert np.allclose(log_mel(samples, 8000, 40), log_mel(samples / 8, 8000, 40), atol=1e-5)
    assert np.abs(log_mel(np.zeros(4000), 8000, 40)).max() < 1e-6
    assert log_mel(samples[:10], 8000, 40).shape == (1, 40)


@pytest.mark.parametrize(("rate", "bands"), [(8000, 40), (16000, 80)])
def test_every_band_hears_something(rate, bands):
    size = 2 * 2 ** int(np.ceil(np.log2(0.025 * rate)))
    assert (mel_filters(rate, size, bands).max(axis=0) > 0.5).all()


def test_a_varied_voice_depends_on_its_seed_alone_and_keeps_its_content():
    sound = audio.Sound(np.sin(np.arange(8000) / 3).astype(np.float32), 8000)
    first, again, other = (audio.varied(sound, [1, seed]) for seed in (1, 1, 2))
    assert (first.samples == again.samples).all()
    assert first.samples.shape != other.samples.shape
    for seed in range(20):
        one = audio.varied(sound, [2, seed])
        loudest = np.abs(np.fft.rfft(one.samples)).argmax() / len(one.samples) * 2 * np.pi
        assert 1 / 3 / 1.26 < loudest < 1.26 / 3
        assert 0.65 < len(one.samples) / 8000 < 1.5
    short = audio.varied(audio.Sound(np.ones(3, np.float32), 8000), [1])
    assert len(short.samples)


@pytest.mark.parametrize("name", ["x.wav", "x.flac"])
def test_what_is_longer_than_wanted_is_refused(name):
    data = io.BytesIO()
    if name.endswith("flac"):
        pytest.importorskip("soundfile").write(data, np.zeros(80_000), 8000, format="FLAC")  # some hundred bytes
    else:
        with wave.open(data, "wb") as out:
            out.setparams((1, 1, 8000, 0, "NONE", ""))
            out.writeframes(bytes(80_000))
    assert len(audio.decode(data.getvalue(), 10.0).samples) == 80_000
    with pytest.raises(UserError, match="it is longer than 9 seconds"):
        audio.decode(data.getvalue(), 9.0)


@pytest.mark.parametrize("value", [3e38, -1e30, float("nan"), float("inf")])
@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.filterwarnings("error")
def test_floats_that_no_sound_has_are_one_line(tmp_path, value, channels):
    samples = np.zeros((100, channels), np.float32)
    samples[50] = value
    pytest.importorskip("soundfile").write(tmp_path / "a.wav", samples, 8000, subtype="FLOAT")
    with pytest.raises(UserError, match=r"it has samples (of|that are no numbers)"):
        audio.read(tmp_path / "a.wav")


def test_many_channels_take_no_memory_and_rates_that_nothing_has_are_refused(monkeypatch):
    soundfile, data = pytest.importorskip("soundfile"), io.BytesIO()
    rng = np.random.default_rng(1)
    samples = rng.uniform(-0.5, 0.5, (5000, 8))
    soundfile.write(data, samples, 8000, format="FLAC")
    monkeypatch.setattr(audio, "BLOCK", 1000)
    assert np.abs(audio.decode(data.getvalue()).samples - samples.mean(axis=1)).max() < 1e-4
    monkeypatch.setattr(audio, "MOST_SAMPLES", 4000)
    with pytest.raises(UserError, match="more than 4,000 samples"):
        audio.decode(data.getvalue())
    soundfile.write(data := io.BytesIO(), samples, 655_350, format="FLAC")
    with pytest.raises(UserError, match="655,350 samples a second; 1,000 to 384,000"):
        audio.decode(data.getvalue())


@pytest.mark.parametrize(("rate", "wanted"), [(383_999, 8000), (44_101, 8000), (8000, 12_347)])
def test_rates_without_a_common_divisor_cost_little(rate, wanted):
    tone = lambda rate: np.sin(2 * np.pi * 440 * np.arange(rate) / rate + 0.3)
    begin = time.process_time()
    found = audio.resample(tone(rate), rate, wanted)
    assert time.process_time() - begin < 5  # it was a minute
    assert np.abs(found - tone(wanted)[: len(found)])[500:-500].max() < 1e-4
