"""How a process becomes a rank of a server that is up: it asks at the doors that the join file names (joining.py)."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import hashlib
import os
import random
import re
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import msgspec

from ..comm import messages, runtime
from ..comm.membership import Place
from ..errors import UserError
from ..launching.join_file import About, JoinFile, words_of
from ..remote.http import is_loopback
from ..runs import ownership
from . import sealed
from .joining import PATIENCE, Answer, At, Claim, Elsewhere, Granted, Look, Question, Refused, Seen, agree_on_secret
from .reports import room
from .sealed import STRANGER, DoorKeys, Keys

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from mpi4py import MPI

SALT = 16  # bytes
SCRYPT = {"n": 1 << 15, "r": 8, "p": 1, "maxmem": 64 << 20}  # RFC 7914: 32 MB and a tenth of a second for each try
WAIT = 10.0  # seconds until a death must be known, and whoever gives places must answer
NAP = 0.3  # seconds between tries


@dataclass
class Seat:
    """What a process brings to a server: its place among the ranks, and how it speaks with the others.

    one_host : bool
        Whether all ranks are on this host.
    salt : str
        By which tokens are compared, hexadecimal.
    known : bytes
        What other ranks have said of themselves, for Membership.take.
    about : About or None
        The server, where its dead ranks can be replaced.
    compared : str
        What of the tokens is compared, where all ranks start together.
    """

    place: Place
    keys: Keys
    one_host: bool
    salt: str
    known: bytes = b""
    about: About | None = None
    compared: str = ""


def first_seat(comm: MPI.Comm, tokens: Sequence[str], one_host: bool) -> Seat:
    """Of a rank that starts with all others. Collective. Raises UserError where the ranks do not have the same tokens."""
    salt = messages.broadcast(comm, os.urandom(SALT).hex(), str)
    compared, common = stretched(tokens, bytes.fromhex(salt))
    everyones = messages.allgather(comm, compared, str)
    if odd := [rank for rank, other in enumerate(everyones) if other != everyones[0]]:
        raise UserError.of_all(f"rank 0 and rank {odd[0]} do not have the same tokens: give all ranks the same --token-file")
    keys = Keys(comm.rank)
    publics = messages.allgather(comm, keys.public, str)
    with runtime.together(comm):
        keys.agree(publics, common)
    if runtime.survivable(comm):
        agree_on_secret(comm, keys)
    return Seat(Place(comm.rank, comm.size), keys, one_host, salt, compared=compared)


def stretched(tokens: Sequence[str], salt: bytes) -> tuple[str, bytes]:
    """Of all tokens, by scrypt: what ranks compare to see that all have the same, and a secret that is never sent.

    salt : new for each start, the same on all ranks; who sees what is compared has to spend a tenth of a second for each try
    """
    if not tokens:
        return "none", b""
    listed = hashlib.sha256("\n".join(sorted(tokens)).encode()).digest()
    both = hashlib.scrypt(listed, salt=salt, dklen=64, **SCRYPT)
    return both[:16].hex(), both[32:]


def about(seat: Seat, options: argparse.Namespace, port: int, facts: dict[str, str], threads: int) -> About | None:
    """What the join file says of a server; None: none of its ranks can be replaced. threads : of a rank of this host"""
    if not seat.keys.secret:
        return None
    job = os.environ.get(ownership.JOB, "")
    return About(
        job=job if re.fullmatch("[0-9a-f]{1,64}", job) else "",
        size=seat.place.size,
        entry=room(len(options.model)),
        secret=seat.keys.secret.hex(),
        salt=seat.salt,
        facts=facts,
        words=words_of(options, port),
        threads=threads,
    )


def check_place(file: JoinFile, path: str) -> None:
    """Raise UserError where no place is free, or the server is gone."""
    answer, _ = asyncio.run(_ask(file, Look(), path))
    if not isinstance(answer, Seen):
        raise UserError(f"the server of --join {path} has not said which places are free")


def check_facts(about: About, facts: Mapping[str, str]) -> None:
    """Raise UserError where this process would not be the same as the ranks of the server."""
    for name in {**about.facts, **facts}:
        there, here = about.facts.get(name, "none"), facts.get(name, "none")
        if there != here and name == "tokens":
            raise UserError("the server and this process do not have the same tokens: give the same --token-file")
        if there != here:
            raise UserError(f"the server and this process do not agree on the {name}: it has {there}, here is {here}")


def claim(file: JoinFile, path: str, host: str) -> Seat:
    """The place of a dead rank, which this process has from now on. Raises UserError where there is none.

    host : as the report of this process will have it
    """
    keys = Keys(STRANGER, bytes.fromhex(file.about.secret))
    answer, known = asyncio.run(_ask(file, Claim(file.about.digest(), keys.public, host), path))
    if not isinstance(answer, Granted) or answer.rank >= file.about.size:
        raise UserError(f"the server of --join {path} has not given a place that it has")
    keys.publics = {answer.rank: keys.public}
    keys.rank = answer.rank
    for rank, public in answer.publics.items():
        if rank != answer.rank:
            keys.renew(rank, public)
    one_host = all(is_loopback(at.door[0]) for at in file.ranks.values())
    place = Place(answer.rank, file.about.size, answer.life)
    return Seat(place, keys, one_host, file.about.salt, known, file.about)


async def _ask(file: JoinFile, question: Question, path: str) -> tuple[Seen | Granted, bytes]:
    """What a living rank answers, and what it knows of all where it has granted a place. Raises UserError."""
    doors: dict[int, At] = {rank: at.door for rank, at in file.ranks.items()}
    end = time.monotonic() + WAIT
    while True:
        problem, asked = "", set()
        queue = random.sample([*doors], len(doors))
        while queue:
            rank = queue.pop()
            if (rank, doors[rank]) in asked:
                continue
            asked.add((rank, doors[rank]))
            try:
                async with asyncio.timeout(PATIENCE):
                    answer, known = await _call(file, rank, doors[rank], question)
            except (OSError, EOFError, ValueError):
                continue
            match answer:
                case Seen(places=[_, *_]) | Granted():
                    return answer, known
                case Elsewhere():
                    doors[answer.rank] = answer.door
                    queue.append(answer.rank)  # which is asked next
                    problem = f"rank {answer.rank} of the server, which gives places, does not answer"
                case Refused(full=False):
                    raise UserError(f"the server of --join {path} is ending, or has other settings than that file says")
                case _:
                    problem = "no rank of the server is dead: there is no place to take"
                    break
        if not problem:
            raise UserError(f"no rank that --join {path} names answers: the server has ended; start it anew")
        if time.monotonic() > end:
            raise UserError(problem)
        await asyncio.sleep(NAP)


async def _call(file: JoinFile, rank: int, door: At, question: Question) -> tuple[Answer, bytes]:
    """Raises OSError, EOFError, ValueError."""
    reader, writer = await asyncio.open_connection(*door)
    try:
        keys = DoorKeys(STRANGER, bytes.fromhex(file.about.secret))
        channel = await sealed.call(keys, rank, reader, writer, msgspec.json.encode(question))
        answer: Answer = msgspec.json.decode(await channel.receive(), type=Answer)
        return answer, await channel.receive(file.about.entry * file.about.size) if isinstance(answer, Granted) else b""
    finally:
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()
