"""Training steps of presets seq2seq, tagger and classifier, beside PyTorch on the same batches; what of a step is attention."""

from __future__ import annotations

import argparse
import functools
import pathlib
import sys
import time
from collections.abc import Callable
from typing import Any
from unittest import mock

import numpy as np

from dllm import config
from dllm.comm.averaging import Gradient
from dllm.data.corpus import Corpus
from dllm.data.lane_kinds import read_lanes
from dllm.model import attention
from dllm.model.kinds import make_model
from dllm.model.layout import Layout
from dllm.runs.state import State
from dllm.training.optim import make_optimizer

from .results import Measured, Table, bars, middle, ratio, spread
from .runs import PEERS, installed, last_json, metrics, run, train

EVERY = 20  # steps that are measured at a time
TEXTS = {  # preset: its folder below --data, its files there, and the options that name them
    "seq2seq": ("tatoeba-deu-eng", "--vocab-size 8000 --pairs {0}/train.deu {0}/train.eng"),
    "tagger": ("ud-ewt", "--vocab-size 4096 --tags {0}/train.conllu --tag-column 4"),
    "classifier": ("movie-reviews", "--vocab-size 8000 --class pos={0}/pos.txt --class neg={0}/neg.txt"),
}


def kinds(options: argparse.Namespace) -> Measured:
    """Presets seq2seq, tagger and classifier against PyTorch DDP on the same batches, in turns; attention's part of a step."""
    if options.data is None:
        sys.exit(f"say where the texts are: --data FOLDER, with {', '.join(folder for folder, _ in TEXTS.values())} in it")
    columns = [("preset fp32", 14), ("tokens/s", 30), ("PyTorch DDP", 30), ("ratio", 9), ("attention", 12)]
    table, data, groups = Table(f"Tokens read a second, {options.ranks} ranks", columns), {}, {}
    steps = EVERY * (3 if options.quick else 10)
    with_torch = installed("torch") and "torch" in options.peers
    for preset, (folder, words) in TEXTS.items():
        corpus, found = options.work / folder, {"dllm": [], "torch": []}
        prepare = [sys.executable, "-m", "dllm.prepare", "--tokenizer", "bpe", "--out", corpus]
        run([*prepare, *(word.format(options.data / folder) for word in words.split())])
        for turn in range(options.rounds):
            found["dllm"].append(by_dllm(preset, corpus, options.work / f"{preset}-{turn}", options.ranks, steps))
            if with_torch:
                found["torch"].append(by_torch(preset, corpus, options.ranks, steps))
        found["attention"] = [attention_share(corpus, preset, steps // 2)] if preset == "seq2seq" else []
        ours, theirs, share = found.values()
        table.row(
            preset, spread(ours), spread(theirs) if theirs else "-", ratio(ours, theirs) if theirs else "-",
            f"{share[0]:.1%}" if share else "-",
        )  # fmt: skip
        data[preset] = found
        groups[preset] = {"dllm": middle(ours)} | ({"PyTorch DDP": middle(theirs)} if theirs else {})
    return table, data, functools.partial(bars, "tokens/s", groups)


def by_dllm(preset: str, corpus: pathlib.Path, out: pathlib.Path, ranks: int, steps: int) -> float | None:
    """Tokens a second, the median over every EVERY steps but the first."""
    settings = {
        "train.precision": "fp32",
        "train.threads": 1,
        "train.max_steps": steps,
        "train.eval_every": 1 << 30,
        "log.every": EVERY,
    }
    train(ranks, out, "--preset", preset, "--data", corpus, settings=settings)
    return middle([line["tokens_per_second"] for line in metrics(out) if "split" not in line][1:])


def by_torch(preset: str, corpus: pathlib.Path, ranks: int, steps: int) -> float | None:
    """The same of the peer."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", ranks, PEERS / "torch_kinds.py"]
    environment = {"PYTHONPATH": pathlib.Path(__file__).parents[1], "OMP_NUM_THREADS": 1}
    return middle(last_json(run([*command, preset, corpus, "--steps", steps], environment))["tokens_per_second"][1:])


def attention_share(corpus: pathlib.Path, preset: str, steps: int) -> float:
    """The part of the steps of one of two ranks, by one thread in this process, that the kernels of attention take."""
    settings, spent = config.resolve(preset), dict.fromkeys(("attention", "steps"), 0.0)
    half = settings.train.lanes // 2
    lanes = read_lanes(
        Corpus(corpus), "train", range(half), settings.train.lanes, settings.train.window, kind=settings.model.kind
    )
    lanes.arrange(1, 0)
    layout = Layout(settings.model, lanes.corpus.vocabulary, np.float32)
    model = make_model(layout, settings.train.window, half, theta=np.zeros(layout.size, np.float32))
    model.initialise(1)
    optimizer, nothing = make_optimizer(settings.train, layout.table), np.zeros((0, half, settings.model.hidden), np.float32)
    state = State(model.theta, [np.zeros_like(model.theta) for _ in range(optimizer.moments)], nothing, nothing, np.zeros(half))

    def timed(name: str, function: Callable[..., Any]) -> Callable[..., None]:
        def call(*arguments: Any) -> None:
            start = time.perf_counter()
            function(*arguments)
            spent[name] += time.perf_counter() - start

        return call

    def step(place: int) -> None:
        batch = batches[place]
        model.forward(batch, nothing, nothing, 1 / max(1, (batch.targets >= 0).sum()), (1, place, lanes.numbers))
        model.backward()
        optimizer.step(state, Gradient([(0, model.gradient)]), settings.train.lr)
        model.bind(model.theta)
        if layout.table is not None:
            model.gradient[layout.table.start :] = 0

    batches = [lanes.window(place, settings.train.window) for place in range(steps)]
    parts = {name: timed("attention", getattr(attention, name)) for name in ("attend", "attend_backward")}
    with mock.patch.multiple(attention, **parts):
        step(0)  # which compiles
        spent["attention"] = 0.0
        for place in range(1, steps):
            timed("steps", step)(place)
    return spent["attention"] / spent["steps"]
