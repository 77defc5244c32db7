"""What finds private text in captured bytes: planted pieces are found, noise is not."""

import base64
import json

import numpy as np
import pytest
from helpers.leaks import FORMS, Detector

pytestmark = pytest.mark.slow  # of a helper of tests

TEXT = b"Mrs Okonkwo, born 3 May 1961, was given 40 mg of furosemide.\nShe slept well and left on Tuesday.\n"
RNG = np.random.default_rng(3)
WINDOWS = [RNG.integers(300, 5000, (10, 4)) for _ in range(5)]
NOISE = RNG.integers(0, 256, 5 << 18, np.uint8).tobytes() + RNG.normal(size=1 << 17).astype("f4").tobytes() + bytes(10_000)


@pytest.fixture(scope="module")
def detector():
    return Detector({"site": TEXT}, {"site": WINDOWS})


def planted(piece, at):
    return NOISE[:at] + piece + NOISE[at:]


@pytest.mark.parametrize("at", [0, 1 << 20, (1 << 20) - 5, (1 << 20) + 3, len(NOISE)])
def test_bytes_are_found_wherever_they_stand(detector, at):
    assert detector.find(NOISE) == []
    assert detector.find(planted(TEXT[20:31], at)) == []
    (line,) = detector.find(planted(TEXT[20:40], at))
    assert line.startswith(f"bytes of site: bytes {at} to {at + 20}")


@pytest.mark.parametrize("form", FORMS[1:])
@pytest.mark.parametrize(
    ("order", "tokens"),
    {
        "in the text's order": np.concatenate(WINDOWS)[8:14, 2],
        "in a window's order": WINDOWS[3].ravel()[5:11],
        "sorted, each once": np.unique(WINDOWS[2])[7:13],
        "each once as they come": np.array(list(dict.fromkeys(WINDOWS[1].ravel().tolist())))[1:7],
    }.items(),
)
def test_tokens_are_found_in_every_order_and_form(detector, order, tokens, form):
    for at in (0, 7, 99_999):
        lines = detector.find(planted(tokens.astype(form).tobytes(), at))
        assert len(lines) == 1
        assert f"as {form}" in lines[0]
        assert order in lines[0] or "each once as they come" in order  # which is a window's order where no token comes twice
    assert detector.find(planted(tokens[:5].astype(form).tobytes(), 7)) == []


def test_tokens_of_one_byte_take_twelve():
    detector = Detector(windows=[np.frombuffer(TEXT, np.uint8)[:96].reshape(4, 24).T])  # 4 lanes
    assert detector.find(NOISE[:1000] + TEXT[24:34]) == []
    assert "in the text's order, as u1" in detector.find(NOISE[:1000] + TEXT[24:36])[0]


def test_numbers_and_bytes_inside_json_are_found(detector):
    tokens = WINDOWS[0].ravel()[:8].tolist()
    assert "in decimals" in detector.find(b'{"rows":' + json.dumps(tokens).encode() + b"}")[0]
    assert "in decimals" in detector.find(json.dumps(tokens, separators=(",", ":")).encode())[0]
    assert "in base64" in detector.find(b'["' + base64.b64encode(TEXT[11:44]) + b'"]')[0]
    assert detector.find(json.dumps([1, 2, 3, 4, 5, 6, 7]).encode()) == []


def test_what_anything_could_have_sent_is_no_piece():
    detector = Detector([b" " * 50 + b"==========\n"], [np.zeros((20, 4), int), np.ones(50, int)])
    assert detector.find(bytes(5000) + b" " * 100 + np.ones(100).tobytes()) == []


def test_doubles_are_told_from_each_other_and_from_nothing():
    known = [RNG.integers(0, 70_000, (10, 4)) for _ in range(500)]
    lines = np.zeros((5000, 12))
    lines[np.arange(5000), 6] = np.arange(5000)
    assert Detector(windows=known).find(lines.tobytes() + RNG.integers(70_000, 80_000, 50_000).astype("f8").tobytes()) == []
