"""Starting what is measured: dllm's own commands under mpirun, and its peers, each a process of its own."""

import importlib.util
import json
import os
import pathlib
import subprocess
import sys
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from dllm.data import shards
from dllm.data.tokenizer_files import save_tokenizer, tokenizer_hash
from dllm.data.tokenizers import WordTokenizer
from dllm.files import storage

from .sizes import Size

PEERS = pathlib.Path(__file__).parent / "peers"
LIMIT = 4 * 3600  # seconds, of any one run


def installed(package: str) -> bool:
    """Whether a package can be imported."""
    return importlib.util.find_spec(package) is not None


def run(command: Sequence[object], environment: dict[str, object] | None = None) -> str:
    """Standard output of a command; its errors are shown where it fails."""
    environment = {**os.environ, **{name: str(value) for name, value in (environment or {}).items()}}
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=LIMIT, env=environment)
    if done.returncode:
        sys.exit(f"{' '.join(map(str, command))} failed:\n{done.stdout}{done.stderr}")
    return done.stdout


def last_json(text: str) -> Any:
    """What the last line of a text says as JSON."""
    return json.loads(text.strip().splitlines()[-1])


def on_ranks(ranks: int, *arguments: object, survive: bool = False) -> list[object]:
    """The words that start Python on some ranks; survive: so that ranks may die, under Open MPI."""
    return ["mpirun", *(["--with-ft", "ulfm"] if survive else []), "-n", ranks, sys.executable, "-m", *arguments]


def random_corpus(folder: pathlib.Path, vocabulary: int, tokens: int) -> None:
    """A prepared corpus of uniformly random tokens."""
    folder.mkdir(parents=True)
    tokenizer = WordTokenizer([f"w{number}" for number in range(vocabulary)])
    save_tokenizer(folder, tokenizer)
    dtype = shards.token_dtype(vocabulary)
    with shards.ShardWriter(folder / "train-00000.h5", dtype) as shard:
        shard.append(np.random.default_rng(1).integers(0, vocabulary, tokens).astype(dtype))
    part = {"name": "train-00000.h5", "start": 0, "stop": tokens, "sha256": storage.sha256(folder / "train-00000.h5")}
    manifest = {
        "format": shards.FORMAT,
        "kind": tokenizer.kind,
        "vocabulary": vocabulary,
        "dtype": dtype.name,
        "tokenizer": tokenizer_hash(tokenizer),
        "splits": {"train": {"tokens": tokens, "bytes": tokens, "shards": [part]}},
    }
    storage.write_json(folder / "manifest.json", manifest)


def train(
    ranks: int,
    out: pathlib.Path,
    *arguments: object,
    settings: Iterable[tuple[str, object]] | dict[str, object] = (),
    survive: bool = False,
) -> dict[str, Any]:
    """summary.json of a run of the train command, a new one unless it goes on with --resume."""
    options = [word for key, value in dict(settings).items() for word in ("--set", f"{key}={value}")]
    where = [] if "--resume" in arguments else ["--out", out]
    run([*on_ranks(ranks, "dllm.train", *where, "--progress", "none", survive=survive), *arguments, *options])
    return json.loads((out / "summary.json").read_text())


def metrics(out: pathlib.Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl of a run."""
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


class Steps:
    """Training steps of a size on random tokens, by dllm and by its peers. The corpus is made once, below `work`."""

    def __init__(self, work: pathlib.Path, name: str, size: Size, ranks: int, seconds: float) -> None:
        self.name, self.size, self.ranks = name, size, ranks
        self.count = max(14, 11 + round(seconds * 9e10 / size.flops))
        self.work, self.corpus, self.turn = work, work / f"{name}-{ranks}", 0
        random_corpus(self.corpus, size.vocabulary, (self.count + 1) * size.window * size.lanes * ranks)

    def dllm(self, precision: str = "fp32", survive: bool = False, **settings: object) -> dict[str, Any]:
        """summary.json of a run. settings: section__key=value"""
        size, self.turn = self.size, self.turn + 1
        settings = {
            "model.embedding": size.hidden, "model.hidden": size.hidden, "model.layers": size.layers,
            "train.lanes": size.lanes * self.ranks, "train.window": size.window,
            "train.optimizer": "sgd", "train.lr": 1.0, "train.schedule": "constant", "train.warmup": 0, "train.clip": 5.0,
            "train.threads": 1, "train.precision": precision, "train.max_steps": self.count,
            "log.every": 10, "log.sample": 0, "checkpoint.every_minutes": 0.0,
            **{key.replace("__", "."): value for key, value in settings.items()},
        }  # fmt: skip
        out = self.work / f"{self.corpus.name}-run-{self.turn}"
        return train(self.ranks, out, "--data", self.corpus, settings=settings, survive=survive)

    def torch(self, precision: str = "fp32") -> dict[str, float]:
        """{"seconds", "peak_rss_bytes"} of a step of DistributedDataParallel."""
        launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", self.ranks]
        return last_json(run([*launcher, PEERS / "torch_step.py", self.name, self.count, precision]))

    def one_process(self, peer: str) -> dict[str, float]:
        """{"seconds"} of a step of Keras or JAX: one process, a thread for each rank, as many tokens as one rank has."""
        return last_json(run([sys.executable, PEERS / f"{peer}_step.py", self.name, max(6, self.count // 2), self.ranks]))
