"""Compare dllm with PyTorch on this machine.

    python -m benchmarks step [--ranks 2] [--rounds 3] [--sizes ptb-small ...]

`step` trains on random tokens by the real train command under mpirun, and by PyTorch's DistributedDataParallel over gloo
(where torch is installed), one after the other and again, one thread a rank, and prints medians, spread and their ratio.
"""

import argparse
import importlib.util
import json
import os
import pathlib
import platform
import statistics
import subprocess
import sys
import tempfile

import numpy as np

from dllm import storage
from dllm.data import shards
from dllm.data.tokenizers import WordTokenizer

from .sizes import SIZES

HERE = pathlib.Path(__file__).parent
SECONDS = 8  # of a measurement, roughly


def random_corpus(folder, vocabulary, tokens):
    """A prepared corpus of uniformly random tokens."""
    folder.mkdir()
    tokenizer = WordTokenizer([f"w{number}" for number in range(vocabulary)])
    shards.save_tokenizer(folder, tokenizer)
    dtype = shards.token_dtype(vocabulary)
    with shards.ShardWriter(folder / "train-00000.h5", dtype) as shard:
        shard.append(np.random.default_rng(1).integers(0, vocabulary, tokens).astype(dtype))
    part = {"name": "train-00000.h5", "start": 0, "stop": tokens, "sha256": storage.sha256(folder / "train-00000.h5")}
    manifest = {
        "format": shards.FORMAT,
        "kind": tokenizer.kind,
        "vocabulary": vocabulary,
        "dtype": dtype.name,
        "tokenizer": shards.tokenizer_hash(tokenizer),
        "splits": {"train": {"tokens": tokens, "bytes": tokens, "shards": [part]}},
    }
    storage.write_json(folder / "manifest.json", manifest)


def run(command):
    """Standard output of a command that must end within ten minutes; its errors are shown where it fails."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    if done.returncode:
        sys.exit(f"{' '.join(map(str, command))} failed:\n{done.stdout}{done.stderr}")
    return done.stdout


def dllm_step(size, ranks, steps, corpus, out):
    """Summary of a run of the train command."""
    settings = {
        "model.embedding": size.hidden,
        "model.hidden": size.hidden,
        "model.layers": size.layers,
        "train.lanes": size.lanes * ranks,
        "train.window": size.window,
        "train.optimizer": "sgd",
        "train.lr": 1.0,
        "train.schedule": "constant",
        "train.warmup": 0,
        "train.clip": 5.0,
        "train.threads": 1,
        "train.max_steps": steps,
        "log.every": 10,
        "log.sample": 0,
    }
    options = [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]
    train = [sys.executable, "-m", "dllm.train", "--data", str(corpus), "--out", str(out), "--progress", "none"]
    run(["mpirun", "-n", str(ranks), *train, *options])
    return json.loads((out / "summary.json").read_text())


def torch_step(name, ranks, steps):
    """Median seconds of a step of DistributedDataParallel."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks)]
    return float(run([*launcher, str(HERE / "torch_step.py"), name, str(steps)]))


def hardware():
    for line in pathlib.Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return f"{line.split(':')[1].strip()}, {os.cpu_count()} cores, Python {platform.python_version()}"
    return platform.processor()


def step(options):
    print(hardware())
    print(f"{options.ranks} ranks, one thread each, {options.rounds} interleaved rounds; median (least - most) GFLOP/s\n")
    print(f"{'size':12}{'dllm':>22}{'PyTorch DDP':>22}{'ratio':>8}{'exposed comm':>14}{'peak MB a rank':>16}")
    peer = importlib.util.find_spec("torch") is not None
    with tempfile.TemporaryDirectory() as work:
        for name in options.sizes:
            size, ours, theirs = SIZES[name], [], []
            total = size.flops * options.ranks
            steps = max(14, 11 + round(SECONDS * options.ranks * 7e10 / total))
            corpus = pathlib.Path(work, name)
            random_corpus(corpus, size.vocabulary, (steps + 1) * size.window * size.lanes * options.ranks)
            for turn in range(options.rounds):
                summary = dllm_step(size, options.ranks, steps, corpus, pathlib.Path(work, f"{name}-{turn}"))
                ours.append(summary["gflops"])
                if peer:
                    theirs.append(total / torch_step(name, options.ranks, steps) / 1e9)
            spread = lambda values: (
                f"{statistics.median(values):.1f} ({min(values):.1f} - {max(values):.1f})" if values else "-"
            )
            ratio = f"{statistics.median(ours) / statistics.median(theirs):.2f}" if peer else "-"
            exposed, peak = summary["exposed_comm_fraction"], max(summary["peak_rss_bytes"]) / 1e6
            print(f"{name:12}{spread(ours):>22}{spread(theirs):>22}{ratio:>8}{exposed:>14.1%}{peak:>16.0f}", flush=True)


def main():
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("step", help="a training step against PyTorch's")
    command.add_argument("--ranks", type=int, default=2)
    command.add_argument("--rounds", type=int, default=3)
    command.add_argument("--sizes", nargs="+", choices=list(SIZES), default=["ptb-small", "ptb-medium", "char"])
    step(parser.parse_args())


if __name__ == "__main__":
    main()
