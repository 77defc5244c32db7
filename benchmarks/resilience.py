"""What it costs that ranks may die and that checkpoints are written, and how long it takes to go on after a death."""

import argparse
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import tempfile
import time
from functools import partial

from dllm.launching.mpirun import OPENMPI, flavour

from .results import Measured, Table, bars, middle, spread
from .runs import LIMIT, Steps, random_corpus
from .sizes import SIZES

ALWAYS = 1e-9  # minutes between checkpoints: a new one begins as soon as the one before is whole
RANK = re.compile(rb"(?:OMPI_COMM_WORLD_RANK|PMI_RANK)=(\d+)")


def resilience(options: argparse.Namespace) -> Measured:
    """Throughput where ranks may die (Open MPI), and while checkpoints are written all the time, against neither."""
    table = Table(
        f"The cost of resilience, {options.ranks} ranks",
        [("size", 14), ("plain GFLOP/s", 24), ("ranks may die", 24), ("costs", 8), ("always saving", 24), ("that costs", 12),
         ("a checkpoint's stall", 24), ("of a step", 11)],
    )  # fmt: skip
    modes = {"plain": {}, "saving": {"checkpoint__every_minutes": ALWAYS, "checkpoint__keep": 1}}
    if flavour() == "openmpi":
        modes["survivable"] = {"survive": True}
        os.environ.update({name: value for name, value in OPENMPI.items() if name not in os.environ})
    data, groups = {}, {}
    for name in options.sizes:
        steps = Steps(options.work, name, SIZES[name], options.ranks, options.seconds)
        found = {mode: [] for mode in modes} | {"stall": [], "step": []}
        for turn in range(options.rounds):
            for mode in list(modes)[:: 1 if turn % 2 else -1]:
                summary = steps.dllm(**modes[mode])
                found[mode].append(summary["gflops"])
                if mode == "saving" and summary["checkpoints"]:
                    found["stall"].append(1e3 * summary["checkpoint_seconds"] / summary["checkpoints"])
                    found["step"].append(steps.size.flops * options.ranks / summary["gflops"] / 1e6)
        loss = lambda mode, found=found: f"{1 - middle(found[mode]) / middle(found['plain']):.1%}" if found.get(mode) else "-"
        share = f"{middle(found['stall']) / middle(found['step']):.1%}" if found["stall"] else "-"
        table.row(
            name, spread(found["plain"]), spread(found.get("survivable", [])), loss("survivable"), spread(found["saving"]),
            loss("saving"), f"{spread(found['stall'])} ms", share,
        )  # fmt: skip
        data[name], groups[name] = found, {mode: middle(found[mode]) for mode in modes}
    return table, data, partial(bars, "GFLOP/s", groups)


def recovery(options: argparse.Namespace) -> Measured:
    """Seconds from the death of a rank, in memory (Open MPI), and of all ranks, by the launcher, to the next step."""
    table, data = Table("From a death to the next step, 4 ranks", [("what", 26), ("seconds", 28)]), {}
    corpus = options.work / "corpus"
    random_corpus(corpus, 1000, 2_000_000)
    plans = {"a rank, in memory": [1]} if flavour() == "openmpi" else {}
    for what, victims in {**plans, "all ranks, by relaunch": range(4)}.items():
        data[what] = [_seconds_to_go_on(corpus, options.work / f"{what}-{turn}", victims) for turn in range(3 * options.rounds)]
        table.row(what, spread(data[what], 2))
    return table, data, partial(bars, "seconds", {what: {"median": middle(values)} for what, values in data.items()})


def _seconds_to_go_on(corpus, run, victims):
    settings = "model.hidden=200", "model.embedding=200", "train.lanes=40", "log.every=1", "checkpoint.every_steps=20"
    words = [word for setting in (*settings, "log.sample=0") for word in ("--set", setting)]
    command = [sys.executable, "-m", "dllm.launch", "-n", 4, "--run", run, "--", "--data", corpus, "--progress", "none", *words]
    with tempfile.TemporaryFile() as log:
        job = subprocess.Popen(list(map(str, command)), stderr=log, stdout=log)
        try:
            _until(lambda: _steps(run) > 30, job)
            before, begin = _steps(run), time.monotonic()
            for rank, pid in _ranks(run).items():
                if rank in victims:
                    os.kill(pid, signal.SIGKILL)
            _until(lambda: _steps(run) > before, job)
            return time.monotonic() - begin
        finally:
            for _ in range(2):
                job.send_signal(signal.SIGTERM)
            job.wait(60)


def _steps(run):
    """The newest step in a run's metrics."""
    try:
        return json.loads(pathlib.Path(run, "metrics.jsonl").read_text().splitlines()[-1])["step"]
    except (OSError, IndexError, ValueError):
        return 0


def _ranks(run):
    """rank -> process, of those that train `run`."""
    found = {}
    for folder in pathlib.Path("/proc").iterdir():
        try:
            words, variables = (folder / "cmdline").read_bytes(), (folder / "environ").read_bytes()
        except OSError:
            continue
        match = RANK.search(variables)
        if match and b"dllm.train" in words and str(run).encode() in words:
            found[int(match[1])] = int(folder.name)
    return found


def _until(condition, job):
    end = time.monotonic() + LIMIT / 10
    while not condition():
        if job.poll() is not None or time.monotonic() > end:
            sys.exit("the job did not go on")
        time.sleep(0.005)
