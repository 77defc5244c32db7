"""A corpus of one shard and a checkpoint of one rank, small and made without a run, and what reads them back.

As a script, reads seeded mutations of one of them and writes how each ended:
python mutated_files.py KIND FOLDER HASH FIRST LAST.
KIND: shard or rank. HASH: 1 to check the manifest's sha256 first, as every command does, 0 to go straight to HDF5.
"""

import pathlib
import resource
import signal
import sys

import numpy as np

if __name__ == "__main__":
    sys.path.insert(0, str(pathlib.Path(__file__).parents[2]))

from dllm.comm.replicas import Domains
from dllm.config import Config, ModelConfig
from dllm.data import shards
from dllm.data.corpus import Corpus
from dllm.data.tokenizer_files import save_tokenizer, tokenizer_hash
from dllm.data.tokenizers import CharTokenizer
from dllm.errors import UserError
from dllm.files import storage
from dllm.model.layout import Layout
from dllm.runs import checkpoint
from dllm.runs.checkpoint_writer import Saver
from dllm.runs.ownership import Ownership
from dllm.runs.provenance import Text
from dllm.runs.state import State

VOCABULARY, LANES, SECONDS, MEMORY = 256, range(3), 20, 1 << 30
LAYOUT = Layout(ModelConfig(embedding=5, hidden=6, layers=2), VOCABULARY, np.float32)
DAMAGE = ("flip", "overwrite", "truncate", "insert", "duplicate")


class Alone:
    """A communicator of one rank."""

    rank, size = 0, 1


class Shard:
    """A corpus in `folder` whose only shard is `path`, of two chunks."""

    def __init__(self, folder):
        self.path = pathlib.Path(folder, "train-00000.h5")
        self.tokens = np.random.default_rng(1).integers(0, VOCABULARY, 70_000)
        self.arrays = {"tokens": self.tokens.astype(np.uint8)}

    def write(self):
        with shards.ShardWriter(self.path, np.uint8) as shard:
            shard.append(self.tokens)
        tokenizer, size = CharTokenizer([chr(0x4E00 + number) for number in range(VOCABULARY)]), len(self.tokens)
        save_tokenizer(self.path.parent, tokenizer)
        entry = {"name": self.path.name, "start": 0, "stop": size, "sha256": storage.sha256(self.path)}
        manifest = {
            "format": shards.FORMAT, "kind": "char", "vocabulary": VOCABULARY, "dtype": "uint8",
            "tokenizer": tokenizer_hash(tokenizer),
            "splits": {"train": {"tokens": size, "bytes": size, "shards": [entry]}},
        }  # fmt: skip
        storage.write_json(self.path.parent / "manifest.json", manifest)

    def read(self, check):
        """Everything of the file, as dllm reads it. check: with the sha256. Raises UserError."""
        corpus = Corpus(self.path.parent)
        if check:
            corpus.verify("train", 0, len(self.tokens))
        return [corpus.read("train", 0, len(self.tokens))]

    def expected(self):
        return [self.tokens]


class Rank:
    """A run in `folder` whose only checkpoint has one rank's file, `path`."""

    def __init__(self, folder):
        rng = np.random.default_rng(2)
        self.run = pathlib.Path(folder)
        self.path = self.run / "checkpoints/step-00000000/rank-00000-of-00001.h5"
        values = [rng.standard_normal(LAYOUT.parameters).astype(np.float32) for _ in range(3)]
        self.state = self._zeros()
        for vector, value in zip((self.state.theta, *self.state.moments), values, strict=True):
            LAYOUT.load(vector, 0, value)
        for part in (self.state.h, self.state.c, self.state.lane_loss):
            part[...] = rng.standard_normal(part.shape)
        moments = {f"moment.{number}": value for number, value in enumerate(values[1:])}
        state = {"h": self.state.h, "c": self.state.c, "lane_loss": self.state.lane_loss}
        self.arrays = {"theta": values[0], **moments, **state}

    def _zeros(self):
        lanes = [np.zeros((2, len(LANES), 6), np.float32) for _ in range(2)]
        return State(*self._vectors(), *lanes, np.zeros(len(LANES)))

    @staticmethod
    def _vectors():
        theta, *moments = (np.zeros(LAYOUT.size, np.float32) for _ in range(3))
        return theta, moments

    def write(self):
        claim = Ownership.of_this_job(self.run)
        self.run.mkdir(exist_ok=True)
        claim.take()
        facts = checkpoint.facts(LAYOUT, len(LANES), "tokenizer", [Text("")], "")
        saver = Saver(Alone, claim, Domains(0, (0,), ("here",)), LAYOUT, facts, Config(), print)
        saver.save(self.state, False, {})
        assert saver.whole

    def read(self, check):
        """Everything of the file, as dllm reads it. check: with the sha256. Raises UserError."""
        found = checkpoint.intact(self.run)[0] if check else checkpoint.available(self.run)[0][0]
        checkpoint.check_fits(found, LAYOUT, np.float32, 2, len(LANES))
        state = self._zeros()
        checkpoint.load(found, LAYOUT, state, LANES)
        return self._parts(state)

    def expected(self):
        return self._parts(self.state)

    @staticmethod
    def _parts(state):
        return [state.theta, *state.moments, state.h, state.c, state.lane_loss]


KINDS = {"shard": Shard, "rank": Rank}


def mutate(data, seed):
    """(what was done, new bytes): one seeded damage, every second time in the first 4 kB."""
    rng = np.random.default_rng(seed)
    what, new = DAMAGE[seed // 2 % len(DAMAGE)], bytearray(data)
    place, source = (int(rng.integers(min(4096, len(data)) if seed % 2 else len(data))) for _ in range(2))
    length = int(2 ** rng.uniform(0, 10))
    noise = [bytes(length), b"\xff" * length, rng.bytes(length)][rng.integers(3)]
    if what == "flip":
        for _ in range(rng.integers(1, 4)):
            new[place] ^= 1 << int(rng.integers(8))
            place = min(place + int(rng.integers(8)), len(data) - 1)
    elif what == "overwrite":
        new[place : place + length] = noise[: len(data) - place]
    elif what == "truncate":
        del new[place:]
    elif what == "insert":
        new[place:place] = noise
    else:
        copy = data[source : source + length]
        new[place : place + (len(copy) if rng.integers(2) else 0)] = copy
    return what, bytes(new)


def outcome(file, data, seed, check):
    """How reading a mutation ends: right, refused, or what is wrong with that."""
    what, new = mutate(data, seed)
    file.path.write_bytes(new)
    try:
        found = file.read(check)
    except UserError as error:
        text = str(error)
        good = "\n" not in text and str(file.path) in text and text.isprintable() and len(text) < 400
        return "refused" if good else f"wrong message after {what}: {text!r}"
    except BaseException as error:
        return f"{type(error).__name__} after {what}: {error}"
    same = all(np.array_equal(one, other) for one, other in zip(found, file.expected(), strict=True))
    if not same:
        return f"wrong data after {what}"
    return "right" if not check or new == data else f"right although the sha256 is another, after {what}"


def main(kind, folder, check, first, last):
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    used = int(pathlib.Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
    file = KINDS[kind](folder)
    data = file.path.read_bytes()
    for seed in range(int(first), int(last)):
        signal.alarm(SECONDS)  # ends a process that hangs, even in C
        print(seed, outcome(file, data, seed, check == "1"), flush=True)
        signal.alarm(0)
    file.path.write_bytes(data)


if __name__ == "__main__":
    main(*sys.argv[1:])
