"""kernels/keccak.py against known answers of Keccak, Ethereum and Swarm, and against the plain reference beside it."""

import hashlib

import numpy as np
import pytest

from dllm.kernels import keccak

# KeccakF-1600-IntermediateValues.txt of the authors of Keccak: the words of zeros, permuted once
PERMUTED_ZEROS = """
f1258f7940e1dde7 84d5ccf933c0478a d598261ea65aa9ee bd1547306f80494d 8b284e056253d057 ff97a42d7f8e6fd4 90fee5a0a44647c4
8c5bda0cd6192e76 ad30a6f71b19059c 30935ab7d08ffc64 eb5aa93f2317d635 a9a6e6260d712103 81a57c16dbcf555f 43b831cd0347c826
01f22f1a11a5569f 05e5635a21d9ae61 64befef28cc970f2 613670957bc46611 b87c5a554fd00ecb 8c3ee88a1ccf32c8 940c7922ae3a2614
1841f924a2c509e4 16f53526e70465c2 75f644e97f30a13b eaf1ff7b5ceca249
"""
HASHES = [  # of Ethereum: the code hash of an account without code; an event's topic; the names of Swarm's folders
    (b"", "c5d2460186f7233c927e7db2dcc703c0e500b653ca82273b7bfad8045d85a470"),
    (b"Transfer(address,address,uint256)", "ddf252ad1be2c89b69c2b068fc378daa952ba7f163c4a11628f55a4df523b3ef"),
    (b"mantaray:0.1", "025184789d63635766d78c41900196b57d7400875ebe4d9b5d1e76bd9652a9b7"),
    (b"mantaray:0.2", "5768b3b6a7db56d21d1abff40d41cebfc83448fed8d7e9b06ec0d3b073f28f7b"),
]
ADDRESSES = [  # of tests of Bee: a span, what the chunk holds, its address
    (0, b"", "b34ca8c22b9e982354f9c7f50b470d66db428d880c8a904d5fe4ec9713171526"),
    (3, b"foo", "2387e8e7d8a48c2a9339c97c1dc3461a9a7aa07e994c5cb8b38fd7c1b3e6ea48"),
    (15, b"greaterthanspan", "27913f1bdb6e8e52cbd5a5fd4ab577c857287edf6969b41efe926b51de0f4f23"),
]


def addresses(payloads, spans):
    """Hexadecimal addresses of chunks."""
    chunks = np.zeros((len(payloads), keccak.CHUNK), np.uint8)
    for row, payload in zip(chunks, payloads, strict=True):
        row[: len(payload)] = np.frombuffer(payload, np.uint8)
    out = np.full((len(payloads), 4), 7, np.uint64)
    keccak.addresses(out, chunks.view(np.uint64), np.array(spans, np.uint64))
    return [row.tobytes().hex() for row in out]


def test_the_permutation_of_zeros_is_the_published_one_in_every_lane():
    state = np.zeros((25, keccak.LANES), np.uint64)
    keccak.permute(state)
    expected = np.array([int(word, 16) for word in PERMUTED_ZEROS.split()], np.uint64)
    np.testing.assert_array_equal(state, np.repeat(expected[:, None], keccak.LANES, 1))


@pytest.mark.parametrize(("message", "expected"), HASHES)
def test_the_reference_has_ethereum_s_hashes(message, expected):
    assert keccak.keccak256_reference(message).hex() == expected


@pytest.mark.parametrize("size", [0, 1, 134, 135, 136, 137, 300])
def test_sha3_made_of_the_permutation_is_that_of_the_standard_library(size):
    """SHA3-256 is keccak256 with another first byte of padding."""
    message = bytes(i % 256 for i in range(size))
    padded = bytearray(message + b"\6" + bytes(-(size + 1) % 136))
    padded[-1] |= 0x80
    state = np.zeros((25, keccak.LANES), np.uint64)
    for block in np.frombuffer(padded, np.uint64).reshape(-1, keccak.RATE):
        state[: keccak.RATE] ^= block[:, None]
        keccak.permute(state)
    assert state[:4, 3].tobytes() == hashlib.sha3_256(message).digest()


def test_hashes_of_a_few_words_are_the_reference_s():
    rng = np.random.default_rng(1)
    words = rng.integers(0, 2**64, (20, keccak.LANES), np.uint64)
    state = np.empty((25, keccak.LANES), np.uint64)
    for first, n in [(0, 0), (3, 1), (0, 5), (2, 8), (5, 15)]:
        keccak.keccak256(state, words, first, n)
        for k in (0, keccak.LANES - 1):
            message = words[first : first + n, k].tobytes()
            assert state[:4, k].tobytes() == keccak.keccak256_reference(message)


@pytest.mark.parametrize(("span", "payload", "expected"), ADDRESSES)
def test_addresses_of_bee(span, payload, expected):
    assert addresses([payload], [span]) == [expected]
    assert keccak.address_reference(payload, span).hex() == expected


@pytest.mark.parametrize("n", [1, keccak.LANES - 1, keccak.LANES, 2 * keccak.LANES + 3])
def test_addresses_of_many_chunks_are_the_reference_s(n):
    rng = np.random.default_rng(n)
    payloads = [rng.bytes(size) for size in rng.integers(0, keccak.CHUNK + 1, n)]
    spans = [int(span) for span in rng.integers(0, 2**63, n)]
    found = addresses(payloads, spans)
    for k in {0, n - 1}:
        assert found[k] == keccak.address_reference(payloads[k], spans[k]).hex()
    assert addresses(payloads[::-1], spans[::-1]) == found[::-1]  # whichever lane a chunk is in
