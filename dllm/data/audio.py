"""Recordings: read from files, brought to one rate, varied for training, and written.

WAV is read by the standard library. What that refuses, and FLAC, OGG and MP3, is read by soundfile where it is installed.
"""

from __future__ import annotations

import io
import math
import os
import struct
import wave
from typing import NamedTuple

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from ..errors import UserError, reason
from ..files import storage
from ..kernels.types import Array

RATE = 8000  # samples a second, as telephones have
LEAST_RATE, MOST_RATE = 1000, 384_000
MOST_SAMPLES = 1 << 28  # of a recording; a few bytes of FLAC can say hours of silence
LOUDEST = 1 << 16  # of a float; 1 is the loudest of a sound card, and some programs count in whole numbers
ENDLESS = 1 << 30  # bytes of sound that a header may promise falsely: whoever writes to a pipe does not know how many come
ZEROS, BETA, ROLLOFF = 32, 9.0, 0.95  # of the filter: zeros on a side, Kaiser window, edge as a part of the lower rate
BLOCK = 1 << 22  # weights of the filter, or samples of all channels, that are in memory at a time
PHASES = 1024  # of the filter that are computed: between them it is interpolated, with an error below 1e-6


class Sound(NamedTuple):
    """A recording."""

    samples: Array  # (n,) float32 in [-1, 1)
    rate: int  # samples a second


def read(path: str | os.PathLike[str]) -> Sound:
    """The recording in a file, its channels averaged. Raises UserError."""
    try:
        return load(path)
    except UserError as error:
        raise UserError(f"cannot read {path}: {error}") from None


def load(path: str | os.PathLike[str]) -> Sound:
    """As `read`, but the error says why alone and names no file: its name may be private text."""
    try:
        if os.path.exists(path) and not os.path.isfile(path):  # a pipe has no end
            raise UserError("it is not a file")
        with open(path, "rb") as file:
            return decode(file.read())
    except (OSError, ValueError) as error:
        raise UserError(reason(error)) from None


def decode(data: bytes, most: float = math.inf) -> Sound:
    """The recording that the bytes of a file hold, its channels averaged. Raises UserError that says why, and names no file.

    most : seconds that it may have: few bytes of FLAC can be hours of silence
    """
    sound = _decode(data, most)
    if len(sound.samples) > most * sound.rate:
        raise UserError(f"it is longer than {most:,.0f} seconds")
    _check_rate(sound.rate)
    if not len(sound.samples):
        raise UserError("there is no sound in it")
    if not np.isfinite(sound.samples).all():
        raise UserError("it has samples that are no numbers")
    if (loudest := float(np.abs(sound.samples).max())) > LOUDEST:
        raise UserError(f"it has samples of {loudest:.3g}, and 1 is the loudest of a recording")
    return sound


def _check_rate(rate: int) -> None:
    if not LEAST_RATE <= rate <= MOST_RATE:
        raise UserError(f"it has {rate:,} samples a second; {LEAST_RATE:,} to {MOST_RATE:,} are read")


def _decode(data: bytes, most: float) -> Sound:
    file = io.BytesIO(data)
    if data[:4] != b"RIFF" or data[8:12] != b"WAVE":
        return _decode_by_library(file, "it is no WAV file", most)
    try:
        with wave.open(file) as opened:
            promised, width = opened.getnframes(), opened.getnchannels() * opened.getsampwidth()
            data = opened.readframes(promised)
            parameters = opened.getparams()
    except (wave.Error, EOFError, struct.error, RuntimeError) as error:
        file.seek(0)
        return _decode_by_library(file, f"it is no WAV file of whole numbers ({reason(error) or 'it ends too early'})", most)
    if len(data) < promised * width < ENDLESS:
        raise UserError(f"it is cut: {len(data):,} of {promised * width:,} bytes of sound are there")
    data = data[: len(data) // width * width]
    samples = _numbers(data, parameters.sampwidth).reshape(-1, parameters.nchannels).mean(axis=1, dtype=np.float32)
    return Sound(samples, parameters.framerate)


def _numbers(data: bytes, width: int) -> Array:
    """Numbers (n,) float32 in [-1, 1) of `width` bytes each. Raises UserError."""
    if width == 1:  # the only width without a sign
        return (np.frombuffer(data, np.uint8).astype(np.float32) - 128) / 128
    if width == 3:
        bytes_of = np.zeros((len(data) // 3, 4), np.uint8)
        bytes_of[:, 1:] = np.frombuffer(data, np.uint8).reshape(-1, 3)
        data, width = bytes_of.tobytes(), 4
    if width not in (2, 4):
        raise UserError(f"it has samples of {8 * width} bits; 8, 16, 24 and 32 are read")
    return np.frombuffer(data, f"<i{width}").astype(np.float32) / np.float32(1 << (8 * width - 1))


def _decode_by_library(file: io.BytesIO, why: str, most: float) -> Sound:
    """Raises UserError; why: the standard library does not read it."""
    try:
        import soundfile
    except (ImportError, OSError):  # OSError: its own library is not there
        raise UserError(f"{why}; FLAC and other kinds take pip install 'dllm[audio]'") from None
    try:
        with soundfile.SoundFile(file) as opened:
            rate, channels = opened.samplerate, opened.channels
            _check_rate(rate)
            limit = min(MOST_SAMPLES, most * rate)
            parts, there = [np.empty(0, np.float32)], 0
            while there <= limit:  # the channels of all of it may not fit into memory
                part = opened.read(max(1, BLOCK // channels), dtype="float32", always_2d=True)
                if not len(part):
                    break
                with np.errstate(all="ignore"):  # `decode` says what is wrong with numbers that are none
                    parts.append(part.mean(axis=1, dtype=np.float32))
                there += len(part)
            if there > MOST_SAMPLES:
                raise UserError(f"it has more than {MOST_SAMPLES:,} samples")
    except UserError:
        raise
    except Exception as error:  # the library has errors of its own
        says = getattr(error, "error_string", "") or reason(error)  # without the name of the file
        raise UserError(f"{why}, and soundfile says: {says}") from None
    return Sound(np.concatenate(parts), int(rate))


def write(path: str | os.PathLike[str], sound: Sound) -> None:
    """Write a recording as WAV of 16 bits, whole or not at all. Raises OSError."""
    with storage.atomic(path) as temporary, open(temporary, "xb") as file, wave.open(file, "wb") as out:
        out.setnchannels(1)
        out.setsampwidth(2)
        out.setframerate(sound.rate)
        out.writeframes(np.round(np.clip(sound.samples, -1, 1) * 32767).astype("<i2").tobytes())


def at_rate(sound: Sound, rate: int) -> Sound:
    """The same with `rate` samples a second."""
    return Sound(resample(sound.samples, sound.rate, rate), rate)


def resample(samples: Array, rate: int, wanted: int) -> Array:
    """Samples (ceil(n wanted / rate),) float32: those of (n,) as a bandlimited curve, read at other times.

    y_m = sum_k x_k h(m rate / wanted - k), h(t) = c sinc(c t) Kaiser(t); c is below 1 where the rate falls, so that what the
    lower rate cannot hold goes. Smith and Gossett 1984, "A flexible sampling-rate conversion method".
    """
    if rate == wanted:
        return np.asarray(samples, np.float32)
    common = math.gcd(rate, wanted)
    up, down = wanted // common, rate // common
    c = ROLLOFF * min(1.0, up / down)
    half = math.ceil(ZEROS / c)
    taps = np.arange(1 - half, half + 1)
    near = sliding_window_view(np.pad(samples, (half - 1, half + 1)), 2 * half)
    count, block, parts = -(-len(samples) * up // down), max(1, BLOCK // (2 * half)), []
    rows = min(up, PHASES)
    t = np.arange(rows + 1)[:, None] / rows - taps
    h = np.sinc(c * t) * np.i0(BETA * np.sqrt(np.maximum(0, 1 - (t / half) ** 2)))
    h = (h / h.sum(axis=1, keepdims=True)).astype(np.float32)  # what is constant stays so
    for first in range(0, count, block):
        places, phases = np.divmod(np.arange(first, min(count, first + block)) * down, up)
        which, between = np.divmod(phases * rows, up)
        x, part = near[places], np.zeros(len(places), np.float32)
        if up > rows:
            after = (between / up).astype(np.float32)
            part = after * np.einsum("nk,nk->n", x, h[which + 1] - h[which])
        parts.append(part + np.einsum("nk,nk->n", x, h[which]))
    return np.concatenate(parts) if parts else np.empty(0, np.float32)


def varied(sound: Sound, seed: list[int]) -> Sound:
    """The same as another voice in another room might say it, drawn by `seed`: for training.

    Pitch, throat and speed change together by a factor between 0.8 and 1.25 (Ko et al. 2015, "Audio augmentation for speech
    recognition"); up to 0.1 s of the ends are cut off or added; noise of a random colour is 10 to 40 dB below the sound.
    """
    rng = np.random.default_rng(seed)
    x = resample(sound.samples, round(100 * 1.25 ** rng.uniform(-1, 1)), 100)  # few phases: the filter costs little
    before, behind = rng.integers(-sound.rate // 20, sound.rate // 10, 2)
    if len(x) > 4 * (abs(before) + abs(behind)):
        x = x[max(0, -before) : len(x) - max(0, -behind)]
    x = np.pad(x, (max(0, before), max(0, behind)))
    lines = np.fft.rfft(rng.standard_normal(len(x)))
    noise = np.fft.irfft(lines * np.arange(1, len(lines) + 1) ** -rng.uniform(0, 1), len(x))
    loudness = np.sqrt(np.square(x).mean() / max(np.square(noise).mean(), 1e-30))
    return Sound((x + noise * (loudness * 10 ** (-rng.uniform(10, 40) / 20))).astype(np.float32), sound.rate)
