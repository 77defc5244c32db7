"""Averaging methods side by side: what a model is worth after as many steps, and what was sent for it."""

import json
import sys
from functools import partial

from .results import Table
from .runs import run, train

MODEL = {
    "model.embedding": 64, "model.hidden": 192, "model.layers": 1, "train.lanes": 64, "train.window": 32, "train.clip": 5.0,
    "train.optimizer": "sgd", "train.lr": 1.0, "train.momentum": 0.9, "train.schedule": "cosine", "train.warmup": 50,
    "train.threads": 1, "log.every": 20, "log.sample": 0, "checkpoint.every_minutes": 0.0,
}  # fmt: skip
PLAIN = {"train.momentum": 0.0, "train.lr": 10.0}  # about what momentum 0.9 makes of lr 1
CONTESTANTS = {
    "allreduce": {},
    "dpsgd exponential": {"method": "dpsgd", "topology": "exponential"},
    "dpsgd ring": {"method": "dpsgd", "topology": "ring"},
    "dpsgd-atc exponential": {"method": "dpsgd-atc", "topology": "exponential"},
    "dpsgd-atc one-peer": {"method": "dpsgd-atc", "topology": "one-peer-exponential"},
    "sgp exponential": {"method": "sgp", "topology": "exponential"},
    "gradient-tracking": {"method": "gradient-tracking", "topology": "exponential"},
    "exact-diffusion ring": {"method": "exact-diffusion", "topology": "ring"},
    "qg-momentum": {"method": "qg-momentum", "topology": "exponential", **PLAIN, "train.lr": 1.0},
    "relaysum tree": {"method": "relaysum", "topology": "tree"},
    "local-sgd, 10 steps": {"method": "local-sgd", "period": 10},
    "diloco, 50 steps": {"method": "diloco", "period": 50},
    "choco sign ring": {"method": "choco", "topology": "ring", "compression": "sign", "consensus": 0.5},
    "choco top-k ring": {"method": "choco", "topology": "ring", "compression": "top-k", "fraction": 0.05, "consensus": 0.1},
    "async-gossip": {"method": "async-gossip", "topology": "exponential", "period": 20},
    "powersgd 4": {"compression": "powersgd", "rank": 4},
    "sign": {"compression": "sign", **PLAIN},
    "top-k 1 %": {"compression": "top-k", "fraction": 0.01},
    "qsgd": {"compression": "qsgd"},
    "bf16": {"compression": "bf16"},
}  # fmt: skip


def decentralised(options):
    """Averaging methods on tinyshakespeare by characters: validation loss after equal steps, and bytes that a rank sends."""
    if options.data is None:
        sys.exit("say where the text is: --data FOLDER, with tinyshakespeare/ in it")
    steps = 60 if options.quick else 1000
    table = Table(
        f"Averaging methods, tinyshakespeare, {steps} steps, {options.ranks} ranks",
        [("method", 24), ("loss", 9), ("to allreduce", 14), ("ranks' own", 12), ("apart", 9), ("KB a step", 12)],
    )
    corpus = _corpus(options)
    data, curves = {}, {}
    for name, settings in CONTESTANTS.items():
        out = options.work / name.replace(" ", "-")
        settings = {key if "." in key else f"averaging.{key}": value for key, value in settings.items()}
        common = {**MODEL, "train.max_steps": steps, "train.eval_every": max(1, steps // 20)}
        train(options.ranks, out, "--data", corpus, settings={**common, **settings})
        lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        found = data[name] = _summary(lines)
        curves[name] = list(zip(found["megabytes"], found["losses"], strict=True))
        first = data["allreduce"]["losses"][-1]
        own, apart = found["own_loss"], found["consensus_distance"]
        table.row(
            name, f"{found['losses'][-1]:.4f}", f"{found['losses'][-1] / first - 1:+.2%}", f"{own:.4f}" if own else "-",
            f"{apart:.3f}" if own else "-", f"{1e3 * found['megabytes'][-1] / steps:,.1f}",
        )  # fmt: skip
    return table, data, partial(_draw, curves)


def _corpus(options):
    """tinyshakespeare by characters, the last tenth for validation, as is usual there."""
    whole = (options.data / "tinyshakespeare" / "input.txt").read_text()
    cut, out = len(whole) * 9 // 10, options.work / "corpus"
    for split, text in (("train", whole[:cut]), ("valid", whole[cut:])):
        (options.work / f"{split}.txt").write_text(text)
    splits = [word for split in ("train", "valid") for word in (f"--{split}", options.work / f"{split}.txt")]
    run([sys.executable, "-m", "dllm.prepare", *splits, "--tokenizer", "char", "--out", out])
    return out


def _summary(lines):
    """Validation losses, and the megabytes that a rank had sent until each."""
    sent, found = 0, {"steps": [], "losses": [], "megabytes": [], "own_loss": None, "consensus_distance": None}
    for line in lines:
        if "split" not in line:
            sent += line["bytes_sent"]
        else:
            found["steps"].append(line["step"])
            found["losses"].append(line["loss"])
            found["megabytes"].append(sent / 1e6)
            found |= {key: line[key] for key in ("own_loss", "consensus_distance") if key in line}
    return found


def _draw(curves, axes):
    for number, (name, points) in enumerate(curves.items()):
        axes.plot(*zip(*points, strict=True), "-:"[number // 10 % 2], label=name)
    axes.set_xscale("log")
    axes.set_xlabel("megabytes that a rank has sent")
    axes.set_ylabel("validation loss, nats a character")
