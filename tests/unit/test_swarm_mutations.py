"""dllm/remote/swarm.py: thousands of answers of a node that are damaged at random are loaded, or refused in one line."""

import random
import tracemalloc

from helpers.bee_server import join, split

from dllm.errors import UserError
from dllm.remote import swarm

BYTES = random.Random(7).randbytes(8000)


def mutated(rng, data):
    """The data with a few bytes changed, cut, doubled or put in."""
    data = bytearray(data)
    for _ in range(rng.choice([1, 1, 1, 2, 4])):
        at, kind = rng.randrange(len(data) + 1), rng.randrange(5)
        if kind == 0 and at < len(data):
            data[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            del data[at : at + rng.choice([1, 2, 8, 32, 100])]
        elif kind == 2:
            data[at:at] = rng.choice([b"\0", b'"', b"{", b"}", b"9", b"..", b"/", b"\xff", b"[" * 1000, rng.randbytes(8)])
        elif kind == 3:
            data[at : at + 8] = rng.choice([bytes(8), b"\xff" * 8, rng.randbytes(8)])
        else:
            data[at:at] = data[at : at + 40]
    return bytes(data)


class Mutant(swarm.Bee):
    """A node whose every answer is made of a store, without a network: thousands of them in seconds."""

    def __init__(self, store):
        super().__init__("http://127.0.0.1:1", 1.0)
        self.store = store

    def _get(self, path, most):
        kind, address = path.split("/")[1:]
        try:
            data = self.store[bytes.fromhex(address)]
            data = data if kind == "chunks" else join(bytes.fromhex(address), self.store)
        except KeyError:
            raise UserError("404") from None
        return data[: max(most, swarm.LARGEST_ANSWER)]


def test_thousands_of_mutations_are_loaded_or_refused():
    """Of an index under its new address, so that its own checks have to see it, and of chunks under their old addresses."""
    rng, store, loaded, lines = random.Random(5), {}, 0, []
    names = {f"part/{k}": split(BYTES[: 1000 * k], store) for k in range(1, 9)}
    entries = {name: swarm.Entry(address.hex(), 1000 * int(name[5:])) for name, address in names.items()}
    good = swarm.encode(entries)
    for n in range(3000):
        if n == 2700:
            tracemalloc.start()  # the slower part
        changed = dict(store)
        if n % 2:
            root = split(mutated(rng, good), changed)
        else:
            root = split(good, changed)
            victim = rng.choice(list(changed))
            changed[victim] = mutated(rng, changed[victim])
        try:
            folder = swarm.Files(Mutant(changed), root.hex())
            for name in folder.names:
                data = folder.read(name, 1 << 16)
                assert len(data) <= 1 << 16
                assert n % 2 or data == BYTES[: entries[name].size]
            loaded += 1
        except UserError as error:
            lines.append(str(error))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 16 << 20
    assert loaded + len(lines) == 3000
    assert loaded > 10
    assert len(lines) > 1000
    assert not [line for line in lines if "\n" in line or len(line) > 500]
