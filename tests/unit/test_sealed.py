"""The channel between two ranks over real sockets: with an honest peer, and with whoever stands in between or in its place."""

import asyncio
import contextlib

import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from hypothesis import example, given, settings
from hypothesis import strategies as st

from dllm.errors import UserError
from dllm.peers import sealed
from dllm.peers.sealed import LARGEST, LENGTH, NONCE, PAD, TAG, Channel, Keys, NotSealed, Seal

SECRET = b"PATIENT Ada Lovelace, insurance number 4711"
ANSWERS = [b"", b"one", b"two" * 1000, bytes(PAD - LENGTH)]
HELLO = sealed.RANK + NONCE + TAG
LIMIT = 20  # seconds, of any conversation
BROKEN = NotSealed, EOFError, OSError


def agreed(count=3, commons=None):
    """The keys of so many ranks, which know each other."""
    all_keys = [Keys(rank) for rank in range(count)]
    for rank, keys in enumerate(all_keys):
        keys.agree([each.public for each in all_keys], commons[rank] if commons else b"")
    return all_keys


class Wire:
    """Between a caller and who answers: what goes by, and a function that may change it. In frames as they were written.

    change(direction, number, piece) -> bytes; direction is "<" to the caller or ">" from it
    """

    def __init__(self, change=lambda direction, number, piece: piece):
        self.change, self.seen = change, {"<": [], ">": []}

    async def carry(self, direction, reader, writer):
        with contextlib.suppress(*BROKEN):
            first = HELLO if direction == ">" else NONCE
            while True:
                if self.seen[direction]:
                    head = await reader.readexactly(LENGTH)
                    piece = head + await reader.readexactly(int.from_bytes(head))
                else:
                    piece = await reader.readexactly(first)
                writer.write(self.change(direction, len(self.seen[direction]), piece))
                self.seen[direction].append(piece)
        writer.close()


async def talk(caller, other, wire=None, rank=1, answers=ANSWERS, patience=LIMIT):
    """What each side has got: (of who answers, of the caller, the errors of both). patience : seconds, as peers.py has it."""
    got, heard, errors = [], [], []

    async def answer(reader, writer):
        try:
            async with asyncio.timeout(patience):
                channel = await sealed.welcome(other, reader, writer)
                got.append(await channel.receive())
            for each in answers:
                await channel.send(each)
        except BROKEN as error:
            errors.append(error)
        finally:
            writer.close()

    async def between(reader, writer):
        far_reader, far_writer = await asyncio.open_connection("127.0.0.1", server.sockets[0].getsockname()[1])
        await asyncio.gather(wire.carry(">", reader, far_writer), wire.carry("<", far_reader, writer))

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    middle = await asyncio.start_server(between if wire else answer, "127.0.0.1", 0)
    reader, writer = await asyncio.open_connection("127.0.0.1", middle.sockets[0].getsockname()[1])
    try:
        async with asyncio.timeout(patience):
            channel = await sealed.call(caller, rank, reader, writer, SECRET)
            for _ in answers:
                heard.append(await channel.receive())
    except BROKEN as error:
        errors.append(error)
    writer.close()
    server.close()
    middle.close()
    await asyncio.sleep(0.01)
    return got, heard, errors


def run(*arguments, **options):
    return asyncio.run(asyncio.wait_for(talk(*arguments, **options), LIMIT))


def test_two_ranks_understand_each_other_and_nobody_between_them_does():
    keys, wire = agreed(), Wire()
    assert run(keys[0], keys[1], wire) == ([SECRET], ANSWERS, [])
    data = b"".join(wire.seen["<"] + wire.seen[">"])
    assert not any(data.count(SECRET[at : at + 6]) for at in range(len(SECRET) - 6))
    assert len({len(frame) for frame in wire.seen["<"][1:3]}) == 1  # nothing and three letters look the same
    assert all((len(frame) - LENGTH - TAG) % PAD == 0 for frame in wire.seen["<"][1:] + wire.seen[">"][1:])


def test_keys_and_frames_are_those_of_the_standards():
    """Written out by hand: HKDF of the secret of both key pairs, a count as nonce, the length beside."""
    one, two = agreed(2, [b"common"] * 2)
    private = X25519PrivateKey.generate()
    one._private = private
    one.public = private.public_key().public_bytes_raw().hex()
    one.agree([one.public, two.public], b"common")
    to_two, to_one = one.of_connection(0, 1, b"nonces")
    shared = private.exchange(X25519PublicKey.from_public_bytes(bytes.fromhex(two.public))) + b"common"
    for seal, direction in ((to_two, b"question"), (to_one, b"answer")):
        key = HKDF(SHA256(), length=32, salt=b"nonces", info=b"dllm serve 0 calls 1, " + direction).derive(shared)
        for count in (1, 2):
            expected = ChaCha20Poly1305(key).encrypt(count.to_bytes(12, "little"), b"text", b"beside")
            assert seal.close(b"text", b"beside") == expected


def test_a_connection_about_something_else_opens_nothing():
    """As one that is led to the port of another model."""
    early = [keys.about(b"this") for keys in (Keys(0), Keys(1))]
    for keys in early:  # those who agree later know it, too
        keys.agree([each.public for each in early])
    assert run(*early) == ([SECRET], ANSWERS, [])
    that = early[1].about(b"that")
    assert run(early[0], that, patience=2)[:2] == ([], [])
    assert run(early[0].about(b"that"), that) == ([SECRET], ANSWERS, [])


@pytest.mark.parametrize(
    "who",
    [
        "a stranger at the peer's port", "another rank at the peer's port", "a stranger who calls",
        "a rank that calls as another", "a rank that calls as the one called", "other tokens",
    ],
)  # fmt: skip
def test_who_is_not_the_one_gets_nothing_and_is_not_believed(who):
    keys, strangers = agreed(), agreed()
    caller, other, rank = {
        "a stranger at the peer's port": (keys[0], strangers[1], 1),
        "another rank at the peer's port": (keys[0], keys[2], 1),
        "a stranger who calls": (strangers[0], keys[1], 1),
        "a rank that calls as another": (keys[2], keys[1], 1),
        "a rank that calls as the one called": (keys[2], keys[1], 1),
        "other tokens": (*agreed(2, [b"token", b"other"]), 1),
    }[who]
    if "calls as" in who:
        caller.rank = 1 if who.endswith("called") else 0
    got, heard, errors = run(caller, other, rank=rank)
    assert (got, heard) == ([], [])
    assert any(isinstance(error, NotSealed) for error in errors)


PIECES = [("<", 0), ("<", 1), ("<", 3), (">", 0), (">", 1)]


@pytest.mark.slow
@pytest.mark.parametrize("piece", PIECES, ids=str)
@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6))
@example(0)
@example(15)  # of a frame: its length gets longer
def test_a_flipped_bit_anywhere_ends_it(piece, bit):
    """Where it makes a length longer, the rest of it never comes."""

    def flip(direction, number, data):
        if (direction, number) != piece:
            return data
        changed = bytearray(data)
        changed[bit // 8 % len(data)] ^= 1 << bit % 8
        return bytes(changed)

    keys = agreed(2)
    got, heard, errors = run(keys[0], keys[1], Wire(flip), patience=0.5)
    assert errors
    assert heard == ANSWERS[: len(heard)]
    assert len(heard) < len(ANSWERS)
    assert got == ([SECRET] if piece[0] == "<" and piece[1] else [])


@pytest.mark.parametrize("what", ["repeated", "left out", "swapped", "cut", "sent back"])
def test_frames_that_are_not_the_next_are_not_taken(what):
    kept = []

    def change(direction, number, data):
        if direction == ">" and number == 1:
            kept.append(data)
        if (direction, number) == ("<", 2):
            kept.append(data)
            return {"repeated": data + data, "cut": data[: len(data) // 2]}.get(what, kept[0] if what == "sent back" else b"")
        if (direction, number) == ("<", 3) and what == "swapped":
            return data + kept[-1]
        return data

    keys = agreed(2)
    got, heard, errors = run(keys[0], keys[1], Wire(change))
    assert got == [SECRET]
    assert heard == ANSWERS[: 2 if what == "repeated" else 1]
    assert errors


def test_what_was_said_once_says_nothing_on_another_connection():
    """A recorded call, played to the rank that it was for; a recorded answer, played to the rank that called."""
    keys, wire = agreed(2), Wire()
    run(keys[0], keys[1], wire)
    for direction in "<>":
        again = Wire(lambda way, number, data, old=direction: wire.seen[old][number] if way == old else data)
        got, heard, errors = run(keys[0], keys[1], again)
        assert heard == []
        assert got == []
        assert errors


@pytest.mark.parametrize("size", [0, PAD, PAD + TAG - 1, LARGEST + LENGTH + PAD + TAG + 1, 2**32 - 1])
def test_lengths_are_bounded_before_anything_is_read(size):
    async def receive():
        reader = asyncio.StreamReader()
        reader.feed_data(size.to_bytes(LENGTH))  # and nothing behind it
        await Channel(reader, None, None, Seal(bytes(32))).receive()

    with pytest.raises(NotSealed, match=f"a frame of {size} bytes"):
        asyncio.run(asyncio.wait_for(receive(), 5))


def test_the_longest_message_passes_and_a_longer_one_is_not_sent():
    keys = agreed(2)
    longest = bytes(LARGEST)
    assert run(keys[0], keys[1], answers=[longest])[1] == [longest]
    with pytest.raises(ValueError, match="a message of"):
        asyncio.run(Channel(None, None, Seal(bytes(32)), None).send(longest + b"x"))


@pytest.mark.parametrize("public", ["", "00", "zz" * 32, "00" * 32, "01" + "00" * 31])
def test_a_public_key_that_is_none_is_named(public):
    """The last two have a secret that everybody knows (RFC 7748, section 6.1)."""
    keys = Keys(0)
    with pytest.raises(UserError, match="rank 1 sent no public key"):
        keys.agree([keys.public, public])
