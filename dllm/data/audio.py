"""Recordings: read from files, brought to one rate, varied for training, and written.

WAV is read by the standard library. What that refuses, and FLAC, OGG and MP3, is read by soundfile where it is installed.
"""

from __future__ import annotations

import contextlib
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
LEAST_RATE, MOST_RATE = 1000, 768_000
ENDLESS = 1 << 30  # bytes of sound that a header may promise falsely: whoever writes to a pipe does not know how many come
ZEROS, BETA, ROLLOFF = 32, 9.0, 0.95  # of the filter: zeros on a side, Kaiser window, edge as a part of the lower rate
BLOCK = 1 << 22  # weights of the filter that are in memory at a time


class Sound(NamedTuple):
    """A recording."""

    samples: Array  # (n,) float32 in [-1, 1)
    rate: int  # samples a second


def read(path: str | os.PathLike[str]) -> Sound:
    """The recording in a file, its channels averaged. Raises UserError."""
    with contextlib.suppress(OSError):  # which opening it says
        storage.check_regular(path)
    try:
        with open(path, "rb") as file:
            return decode(file.read())
    except UserError as error:
        raise UserError(f"cannot read {path}: {error}") from None
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path}: {reason(error)}") from None


def decode(data: bytes, most: float = math.inf) -> Sound:
    """The recording that the bytes of a file hold, its channels averaged. Raises UserError that says why, and names no file.

    most : seconds that it may have: few bytes of FLAC can be hours of silence
    """
    sound = _decode(data, most)
    if len(sound.samples) > most * sound.rate:
        raise UserError(f"it is longer than {most:,.0f} seconds")
    if not LEAST_RATE <= sound.rate <= MOST_RATE:
        raise UserError(f"it has {sound.rate:,} samples a second; {LEAST_RATE:,} to {MOST_RATE:,} are read")
    if not len(sound.samples):
        raise UserError("there is no sound in it")
    if not np.isfinite(sound.samples).all():
        raise UserError("it has samples that are no numbers")
    return sound


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
            rate = opened.samplerate
            samples = opened.read(-1 if most == math.inf else int(most * rate) + 1, dtype="float32", always_2d=True)
    except Exception as error:  # the library has errors of its own
        says = getattr(error, "error_string", "") or reason(error)  # without the name of the file
        raise UserError(f"{why}, and soundfile says: {says}") from None
    return Sound(samples.mean(axis=1, dtype=np.float32), int(rate))


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
    for first in range(0, count, block):
        places, phases = np.divmod(np.arange(first, min(count, first + block)) * down, up)
        distinct, which = np.unique(phases, return_inverse=True)
        t = distinct[:, None] / up - taps
        h = np.sinc(c * t) * np.i0(BETA * np.sqrt(np.maximum(0, 1 - (t / half) ** 2)))
        h /= h.sum(axis=1, keepdims=True)  # what is constant stays so
        parts.append(np.einsum("nk,nk->n", near[places], h.astype(np.float32)[which]))
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
