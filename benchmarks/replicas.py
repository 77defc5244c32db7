"""What copies on disks that hosts do not share take: shards that come to them, and checkpoints while training goes on.

As a program, on each rank, it spreads listed files: python -m benchmarks.replicas LIST FOLDER COPIES
"""

import argparse
import json
import pathlib
import sys
import time
from functools import partial

import numpy as np

from dllm.files import storage
from dllm.launching import mpirun

from . import hosts
from .results import Measured, Table, bars, middle, spread
from .runs import last_json, random_corpus, run
from .sizes import SIZES

RATE = 1000  # Mbit/s, of each link
SHARDS = 16
LIST = "files.json"  # name -> [sha256, bytes], for all ranks
SIZE = SIZES["ptb-medium"]
EVERY = 10  # steps between checkpoints, about half a minute on two cores
SETTINGS = {
    "model.embedding": SIZE.hidden, "model.hidden": SIZE.hidden, "model.layers": SIZE.layers,
    "train.lanes": hosts.COUNT * SIZE.lanes, "train.window": SIZE.window, "train.optimizer": "sgd", "train.lr": 1.0,
    "train.schedule": "constant", "train.warmup": 0, "train.clip": 5.0, "train.threads": 1, "log.every": EVERY, "log.sample": 0,
    "resilience.deadline": 0, "checkpoint.every_minutes": 0.0, "checkpoint.every_steps": EVERY,
}  # fmt: skip


def replicas(options: argparse.Namespace) -> Measured:
    """Four hosts with a disk each and links of 1 Gbit/s: shards from one to all, a run with copies and without; as root."""
    if reason := hosts.missing():
        sys.exit(reason)
    table = Table(
        f"Copies on four hosts, links of {RATE} Mbit/s",
        [("what", 34), ("without", 26), ("with", 26), ("times", 9)],
    )
    folder = options.work / "hosts"
    folder.mkdir()
    with hosts.Hosts(folder, disks=True) as four:
        four.limit(RATE)
        spreading = [_spread(options, four) for _ in range(options.rounds)]
        needed, taken = ([found[name] for found in spreading] for name in ("needed", "seconds"))
        table.row("shards: s that bytes need, taken", spread(needed, 2), spread(taken, 2), _times(needed, taken))
        runs = {0: [], 2: []}
        corpus, steps = options.work / "corpus", options.steps or (2 * EVERY if options.quick else 4 * EVERY)
        random_corpus(corpus, SIZE.vocabulary, (steps + 1) * SIZE.window * SIZE.lanes * hosts.COUNT)
        for turn in range(options.rounds):
            for copies in (0, 2)[:: 1 if turn % 2 else -1]:
                runs[copies].append(_train(four, corpus, f"run-{turn}-{copies}", copies, steps))
        for what in ("step", "run"):
            without, copied = ([found[what] for found in runs[copies]] for copies in (0, 2))
            table.row(f"ptb-medium: s a {what}", spread(without, 2), spread(copied, 2), _times(without, copied))
    groups = {"shards": {"needed": middle(needed), "taken": middle(taken)}}
    groups |= {f"s a {what}": {str(n): middle([found[what] for found in runs[n]]) for n in runs} for what in ("step", "run")}
    return table, {"shards": spreading, "runs": runs}, partial(bars, "seconds", groups)


def _times(one, other):
    return f"{middle(other) / middle(one):.3f}"


def _on_all(four, *program):
    """Standard output of a program on a rank of each host."""
    words = mpirun.command(hosts.COUNT, hosts.COUNT, dict.fromkeys(four.names, 1), "PATH")
    return run([*four.on(1), *words, sys.executable, "-m", *program], {**mpirun.OPENMPI, **four.environment()})


def _spread(options, four):
    """What it took to bring shards of one host to all: seconds, bytes over the busiest link, the seconds that these need."""
    for number in range(1, hosts.COUNT + 1):
        four.wipe(number)
    place, size, listed = four.disk(1) / "shards", int(1e7 if options.quick else 1e9) // SHARDS, {}
    place.mkdir()
    random = np.random.default_rng(1)
    for number in range(SHARDS):
        name = f"train-{number:05d}.h5"
        (place / name).write_bytes(random.bytes(size))
        listed[name] = storage.sha256(place / name), size
    (options.work / LIST).write_text(json.dumps(listed))
    before = four.sent()
    found = last_json(_on_all(four, "benchmarks.replicas", options.work / LIST, four.path / "shards", 2))
    found["on the links"] = np.subtract(four.sent(), before).tolist()
    return found | {"needed": 8 * found["busiest"] / (RATE * 1e6)}


def _train(four, corpus, name, copies, steps):
    """Seconds of a step, after the first ones, and of the whole run."""
    settings = {**SETTINGS, "train.max_steps": steps, "storage.copies": copies}
    words = [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]
    _on_all(four, "dllm.train", "--data", corpus, "--out", four.path / name, "--progress", "none", *words)
    place = four.disk(1) / name
    lines = [json.loads(line) for line in (place / "metrics.jsonl").read_text().splitlines()]
    speeds = [line["tokens_per_second"] for line in lines if "split" not in line][1:]
    tokens = hosts.COUNT * SIZE.lanes * SIZE.window
    seconds = json.loads((place / "summary.json").read_text())["wall_seconds"]
    return {"step": float(np.mean([tokens / speed for speed in speeds])), "run": seconds}


def main(listed, folder, copies):
    """What a rank does: only the first has the files. It prints seconds, and bytes over the busiest link."""
    from mpi4py import MPI

    from dllm.comm.replicas import Domains, File, plan
    from dllm.comm.transfers import replicate

    comm, folder = MPI.COMM_WORLD, pathlib.Path(folder)
    listed = json.loads(pathlib.Path(listed).read_text())
    files = [File(name, sha256, size) for name, (sha256, size) in listed.items()]
    folder.mkdir(exist_ok=True)
    domains = Domains.find(comm, folder)
    wants = [{file.name for file in files if rank in domains.holders(file.name, int(copies))} for rank in range(comm.size)]
    have = [set(listed), *(set() for _ in range(1, comm.size))]
    moves, _ = plan(files, have, wants)
    sent, come = np.zeros((2, comm.size), int)
    for move in moves:
        sent[move.source] += move.file.most
        come[move.target] += move.file.most
    comm.Barrier()
    begin = time.monotonic()
    gone = replicate(comm, domains, folder, files, have[comm.rank], wants[comm.rank], lambda text: None)
    comm.Barrier()
    seconds = time.monotonic() - begin
    if gone or not all((folder / name).exists() for name in wants[comm.rank]):
        sys.exit("not all files have come")
    if comm.rank == 0:
        print(json.dumps({"seconds": seconds, "busiest": int(max(*sent, *come)), "bytes": int(sum(sent))}))


if __name__ == "__main__":
    main(*sys.argv[1:])
