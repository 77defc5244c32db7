"""Lives of ranks, and how a process becomes one: with ranks that are honest, with strangers, and with ranks that lie."""

import asyncio
import contextlib
import os
import secrets
import time

import msgspec
import pytest
from mpi4py import MPI

from dllm.comm.membership import LIFE, LIVES, Membership, Place
from dllm.comm.messages import pack
from dllm.errors import UserError
from dllm.launching.join_file import About, JoinFile, RankAt
from dllm.peers import joiner, joining, sealed
from dllm.peers.joining import TELL, Claim, Door, Elsewhere, Granted, Look, Refused, Seen
from dllm.peers.reports import report_of, room
from dllm.peers.sealed import STRANGER, DoorKeys, Keys
from dllm.serving.log import Log

LIMIT = 60  # seconds, of any test
SECRET = bytes(range(32))
BROKEN = OSError, EOFError, ValueError
ABOUT = About("", 3, room(1), SECRET.hex(), "00" * 16, {"model": "abc", "tokens": "none"}, ["--slots=4"], 1)


MODEL = {
    "address": ("127.0.0.1", 1), "active": 0, "queued": 0, "slots": 4, "tokens": 0, "tokens_per_second": 0.0, "steps": 0,
    "rows": {},
}  # fmt: skip


class Rank:
    """A rank without an engine: its gossip, its keys and its door, in this process."""

    def __init__(self, rank, folder, life=0, size=3, keys=None, known=b""):
        self.rank, self.port, self.state = rank, 0, "ok"
        self.gossip = Membership(MPI.COMM_SELF, self.report, report_of(1), room(1), Place(rank, size, life))
        self.keys = keys or Keys(rank, SECRET)
        about = msgspec.structs.replace(ABOUT, size=size)
        self.door = Door(self.gossip, self.keys, about, folder / "serve.json", lambda: self.state != "ok", Log(rank))
        self.gossip.take(known)

    def report(self):
        load = {"rows": {}, "models": [MODEL]}
        where = {"host": "here", "pid": os.getpid(), "door": ("127.0.0.1", self.port)}
        lives = {"public": self.keys.public} if self.gossip.life else {}
        return {**load, **where, **lives, "made": time.time(), "draining": self.state != "ok", "drained": False}

    async def open(self):
        self.port = await self.door.listen("127.0.0.1")
        self.gossip._speak()

    def shut(self):
        self.door._server.close()
        self.gossip.comm.Free()


@pytest.fixture(autouse=True)
def patient(monkeypatch):
    """A slow machine makes no rank silent."""
    monkeypatch.setattr(joining, "SILENT", LIMIT)


def tell(*ranks):
    """What MPI does: all hear of all."""
    for one in ranks:
        for other in ranks:
            if one is not other:
                assert other.gossip.take(one.gossip.told())


@contextlib.asynccontextmanager
async def server(folder, size=3, dead=(1,)):
    """The living ranks of a server, which have heard of all of them, and know who is dead."""
    ranks = [Rank(rank, folder, size=size) for rank in range(size)]
    for rank in ranks:
        await rank.open()
        rank.keys.agree([each.keys.public for each in ranks])
    tell(*ranks)
    living = [rank for rank in ranks if rank.rank not in dead]
    for number in dead:
        ranks[number].shut()
        for rank in living:
            rank.gossip.note_death(number, 0)
    try:
        yield living
    finally:
        for rank in living:
            rank.shut()


def file_of(ranks, **changes):
    about = msgspec.structs.replace(ABOUT, **{"size": ranks[0].gossip.size, **changes})
    return JoinFile("0", about, {rank.rank: RankAt("here", 1, ("127.0.0.1", rank.port), False) for rank in ranks})


async def ask(rank, question, secret=SECRET, caller=STRANGER, meant_for=None):
    """The answer of a door, with what comes behind a place that was granted."""
    reader, writer = await asyncio.open_connection("127.0.0.1", rank.port)
    try:
        message = question if isinstance(question, bytes) else msgspec.json.encode(question)
        channel = await sealed.call(DoorKeys(caller, secret), meant_for or rank.rank, reader, writer, message)
        return msgspec.json.decode(await channel.receive(), type=joining.Answer)
    finally:
        writer.close()


def claim_of(digest=None):
    return Claim(digest or ABOUT.digest(), Keys(0).public, "here")


async def hears(caller, other):
    """What a rank gets that another one calls over their own keys; None: it does not open."""
    got = asyncio.get_running_loop().create_future()

    async def answer(reader, writer):
        try:
            channel = await sealed.welcome(other, reader, writer)
            got.set_result(await channel.receive())
        except BROKEN:
            got.set_result(None)
        writer.close()

    async with await asyncio.start_server(answer, "127.0.0.1", 0) as listening:
        reader, writer = await asyncio.open_connection("127.0.0.1", listening.sockets[0].getsockname()[1])
        with contextlib.suppress(*BROKEN):
            await sealed.call(caller, other.rank, reader, writer, b"a prompt")
        found = await got
        writer.close()
        return found


def run(work):
    return asyncio.run(asyncio.wait_for(work, LIMIT))


# ---- lives


FINE = {
    "rows": {}, "made": 1.0, "host": "here", "pid": 1, "draining": False, "drained": False, "models": [MODEL],
}  # fmt: skip


def reports(rank, count, **changes):
    """A message about one rank."""
    return pack({rank: (count, {**FINE, **changes})})


def test_a_later_life_is_alive_and_no_news_of_the_one_before_revives_it(tmp_path):
    gossip = Rank(0, tmp_path).gossip
    state = lambda: (gossip.table()[1][0]["pid"], gossip.is_dead(1), gossip.life_of(1))
    assert gossip.take(reports(1, 900, pid=1))
    gossip.note_death(1, 0)
    assert state() == (1, True, 0)
    assert gossip.take(reports(1, 901, pid=2))  # what was on its way
    assert state() == (2, True, 0)
    assert gossip.take(reports(1, 5 << LIFE | 1, pid=3))
    assert state() == (3, False, 5)
    gossip.note_death(1, 0)  # MPI comes to know it now
    assert gossip.take(reports(1, 10**6, pid=4))
    assert gossip.take(reports(1, 4 << LIFE | 1, pid=4))
    assert state() == (3, False, 5)
    gossip.note_death(1, 5)
    assert gossip.take(reports(1, 5 << LIFE | 2, pid=5))
    assert state() == (5, True, 5)
    assert gossip.take(reports(1, (LIVES << LIFE) - 1, pid=6))
    assert state() == (6, False, LIVES - 1)
    assert not gossip.take(reports(1, 2**53 + 1))


def test_a_rank_that_was_replaced_learns_it_and_takes_nothing_else_of_itself_from_others(tmp_path):
    gossip = Rank(1, tmp_path, life=7).gossip
    assert gossip.take(reports(1, 3 << LIFE | 9, pid=9))
    assert (gossip.before["pid"], gossip.replaced, gossip.known) == (9, False, {})
    assert gossip.take(reports(1, 7 << LIFE | 99))
    assert (gossip.before["pid"], gossip.replaced, gossip.known) == (9, False, {})
    assert gossip.take(reports(1, 8 << LIFE))
    assert (gossip.replaced, gossip.known) == (True, {})


def test_a_new_life_of_a_rank_has_keys_of_its_own(tmp_path):
    old, other = Keys(1, SECRET), Rank(0, tmp_path)
    other.keys.agree([other.keys.public, old.public])
    old.agree([other.keys.public, old.public])
    assert run(hears(old, other.keys)) == b"a prompt"
    new = Keys(1, SECRET)
    new.renew(0, other.keys.public)
    assert run(hears(new, other.keys)) is None  # nobody has told of it
    other.gossip.take(reports(1, 1 << LIFE | 1, public=new.public))
    assert run(hears(new, other.keys)) == run(hears(other.keys, new)) == b"a prompt"
    assert run(hears(old, other.keys)) is None
    assert run(hears(other.keys, old)) is None
    without_secret = Keys(1, b"x" * 32)
    without_secret.renew(0, other.keys.public)
    other.gossip.take(reports(1, 2 << LIFE | 1, public=without_secret.public))
    assert run(hears(without_secret, other.keys)) is None
    other.gossip.take(reports(1, 3 << LIFE | 1, public="no key"))
    other.gossip.take(reports(1, 3 << LIFE | 1, public="00" * 32))  # a point that has the same secret with all keys
    assert 1 not in other.keys.publics


# ---- places


def test_a_process_takes_the_place_of_a_dead_rank_and_is_known_to_all(tmp_path):
    async def work():
        async with server(tmp_path) as (zero, two):
            file = file_of([zero, two])
            await asyncio.to_thread(joiner.check_place, file, "FILE")
            seat = await asyncio.to_thread(joiner.claim, file, "FILE", "here")
            assert (seat.place.rank, seat.place.size, seat.one_host) == (1, 3, True)
            assert 1 <= seat.place.life <= joining.STEP
            new = Rank(1, tmp_path, seat.place.life, keys=seat.keys, known=seat.known)
            await new.open()
            assert set(new.gossip.known) == {0, 1, 2}
            await asyncio.gather(new.door.meet(0), new.door.meet(2))
            for rank in (zero, two):
                assert not rank.gossip.is_dead(1)
                assert rank.gossip.table()[1][0]["door"] == ("127.0.0.1", new.port)
                assert await hears(rank.keys, new.keys) == await hears(new.keys, rank.keys) == b"a prompt"
            assert zero.door.places() == two.door.places() == []
            new.shut()
            for writer in [channel.writer for _, channel in new.door._channels.values()]:
                writer.close()
            await zero.door.meet(1)  # its door is shut
            assert zero.gossip.is_dead(1)
            assert zero.door.places() == [1]  # though it was given just now
            again = await asyncio.to_thread(joiner.claim, file, "FILE", "here")
            assert again.place.life > seat.place.life
            assert zero.door.places() == []  # until the process has come, or for RESERVED seconds

    run(work())


def test_two_who_ask_at_once_get_two_places_and_a_third_none(tmp_path, monkeypatch):
    monkeypatch.setattr(joiner, "WAIT", 1.0)

    async def work():
        async with server(tmp_path, 5, dead=(1, 3)) as living:
            asked = [asyncio.to_thread(joiner.claim, file_of(living), "FILE", "here") for _ in range(3)]
            found = await asyncio.gather(*asked, return_exceptions=True)
            assert sorted(seat.place.rank for seat in found if isinstance(seat, joiner.Seat)) == [1, 3]
            (problem,) = [str(one) for one in found if isinstance(one, UserError)]
            assert problem == "no rank of the server is dead: there is no place to take"

    run(work())


def test_the_lowest_living_rank_alone_gives_places_near_ones_first(tmp_path):
    async def work():
        async with server(tmp_path, 4, dead=(0, 3)) as (one, two):
            assert await ask(two, claim_of()) == Elsewhere(1, ("127.0.0.1", one.port))
            assert await ask(two, Look()) == Seen([0, 3])
            far = msgspec.structs.replace(claim_of(), host="elsewhere")
            assert (await ask(one, far)).rank == 0
            assert (await ask(one, claim_of())).rank == 3
            assert await ask(one, claim_of()) == Refused(True)
            two.gossip.note_death(1, 0)
            assert isinstance(await ask(two, claim_of()), Granted)  # two who give would give other lives

    run(work())


def test_a_process_with_other_settings_gets_no_place(tmp_path):
    async def work():
        async with server(tmp_path) as (zero, two):
            assert await ask(zero, claim_of(digest="00" * 32)) == Refused(False)
            with pytest.raises(UserError, match="is ending, or has other settings than that file says"):
                await asyncio.to_thread(joiner.claim, file_of([zero, two], facts={"model": "other"}), "FILE", "here")
            zero.state = two.state = "draining"
            zero.gossip._speak()
            two.gossip._speak()
            tell(zero, two)
            assert await ask(zero, claim_of()) == Refused(False)
            assert zero.door.places() == [1]

    run(work())


def test_facts_that_differ_are_named():
    here = dict(ABOUT.facts)
    joiner.check_facts(ABOUT, here)
    with pytest.raises(UserError, match="do not agree on the model: it has abc, here is def"):
        joiner.check_facts(ABOUT, {**here, "model": "def"})
    with pytest.raises(UserError, match="do not have the same tokens: give the same --token-file"):
        joiner.check_facts(ABOUT, {**here, "tokens": "5a" * 16})
    with pytest.raises(UserError, match="do not agree on the labels: it has none, here is x"):
        joiner.check_facts(ABOUT, {**here, "labels": "x"})


def test_a_server_that_is_gone_is_said_to_be(tmp_path):
    async def work():
        async with server(tmp_path) as living:
            file = file_of(living)
        with pytest.raises(UserError, match="no rank that --join FILE names answers: the server has ended"):
            await asyncio.to_thread(joiner.check_place, file, "FILE")

    run(work())


# ---- strangers and liars


async def noise(rank, data):
    """What comes back of a door that gets these bytes, once it has closed the connection."""
    reader, writer = await asyncio.open_connection("127.0.0.1", rank.port)
    try:
        with contextlib.suppress(OSError):
            writer.write(data)
            await writer.drain()
            writer.write_eof()
            return await reader.read()
    finally:
        writer.close()


def test_strangers_learn_nothing_at_a_door_and_change_nothing(tmp_path):
    async def work():
        async with server(tmp_path) as (zero, _):
            before = zero.gossip.told()
            for question in (Look(), claim_of(), TELL + reports(2, 9 << LIFE)):
                with pytest.raises(BROKEN):
                    await ask(zero, question, secret=b"x" * 32)
                with pytest.raises(BROKEN):  # what was meant for another rank
                    await ask(zero, question, meant_for=2)
            for data in (b"", b"GET / HTTP/1.1\r\n\r\n", secrets.token_bytes(52), b"\xff" * 10**6, bytes(100)):
                assert len(await noise(zero, data) or b"") <= sealed.NONCE
            assert (zero.gossip.told(), zero.door._given, zero.door.callers) == (before, {}, 0)
            assert await ask(zero, Look()) == Seen([1])

    run(work())


def test_what_was_said_at_a_door_opens_it_no_second_time(tmp_path):
    async def work():
        async with server(tmp_path) as (zero, _):
            said = []

            async def between(reader, writer):
                far_reader, far_writer = await asyncio.open_connection("127.0.0.1", zero.port)

                async def carry(source, target, kept):
                    with contextlib.suppress(*BROKEN):
                        while data := await source.read(1 << 16):
                            kept.append(data)
                            target.write(data)
                    target.close()

                await asyncio.gather(carry(reader, far_writer, said), carry(far_reader, writer, []))

            async with await asyncio.start_server(between, "127.0.0.1", 0) as middle:
                reader, writer = await asyncio.open_connection("127.0.0.1", middle.sockets[0].getsockname()[1])
                channel = await sealed.call(DoorKeys(STRANGER, SECRET), 0, reader, writer, msgspec.json.encode(claim_of()))
                assert msgspec.json.decode(await channel.receive(), type=joining.Answer).rank == 1
                writer.close()
            given = dict(zero.door._given)
            zero.door._given.clear()
            assert len(await noise(zero, b"".join(said))) == sealed.NONCE  # as to anybody
            assert given
            assert zero.door._given == {}

    run(work())


@pytest.mark.parametrize(
    "message",
    [
        b"", b"{}", b"null", b"[" * 4000, b'{"type":"tell"}', b'{"type":"claim"}', TELL, TELL + b"noise",
        TELL + pack({1: (1, {})}), TELL + pack({1: [-1, {}]}), TELL + reports(1, 1, host="a b"),
        b'{"type":"claim","digest":"","public":"00","host":"here"}',
        b'{"type":"claim","digest":"' + b"0" * 64 + b'","public":"' + b"g" * 64 + b'","host":"here"}', bytes(3 * 8192 + 4096),
        TELL + reports(1, 1, door=["x", 70000]),
    ],
)  # fmt: skip
def test_a_rank_that_says_what_is_no_question_gets_no_answer(tmp_path, message):
    async def work():
        async with server(tmp_path) as (zero, _):
            before = zero.gossip.told()
            with pytest.raises(BROKEN):
                await ask(zero, message, caller=2)
            assert (zero.gossip.told(), zero.door._given) == (before, {})
            assert await ask(zero, Look()) == Seen([1])

    run(work())


@pytest.mark.parametrize(
    "answer",
    [Granted(7, 1, {}), Granted(1, 1, {2: "00" * 32}), Seen([5]), Refused(True), Elsewhere(0, ("127.0.0.1", 1)), b"", b"noise"],
)  # fmt: skip
def test_a_process_that_is_lied_to_says_so_or_knows_nobody(tmp_path, monkeypatch, answer):
    monkeypatch.setattr(joiner, "WAIT", 0.5)

    async def lie(reader, writer):
        with contextlib.suppress(*BROKEN):
            channel = await sealed.welcome(DoorKeys(0, SECRET), reader, writer)
            await channel.receive()
            await channel.send(answer if isinstance(answer, bytes) else msgspec.json.encode(answer))
            await channel.send(b"noise")
        writer.close()

    async def work():
        async with await asyncio.start_server(lie, "127.0.0.1", 0) as listening:
            at = RankAt("here", 1, ("127.0.0.1", listening.sockets[0].getsockname()[1]), False)
            try:
                seat = await asyncio.to_thread(joiner.claim, JoinFile("0", ABOUT, {0: at}), "FILE", "here")
            except UserError:
                return
            assert set(seat.keys.publics) == {seat.place.rank}
            assert not Rank(1, tmp_path, 1, known=seat.known).gossip.known

    run(work())
