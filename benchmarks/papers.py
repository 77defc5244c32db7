"""The language model of PowerSGD's and CHOCO-SGD's tables, by their recipe, as far as this machine goes."""

import argparse
import sys

from dllm.data.corpus import Corpus

from .results import Measured, Table
from .runs import metrics, run, train

RANKS = 4  # fewer than their 16: a ring needs more than 2
MODEL = {
    "model.embedding": 650, "model.hidden": 650, "model.layers": 3, "model.tied": "true", "model.biases": 2,
    "model.forget_bias": 0.0, "model.dropout": 0.4, "train.window": 30, "train.lanes": 5 * RANKS, "train.clip": 0.4,
    "train.clip_by": "own", "train.optimizer": "sgd", "train.lr": 2 * 1.25 * RANKS, "train.schedule": "cosine",
    "train.precision": "bf16", "train.threads": 1, "resilience.deadline": 0, "log.sample": 0, "checkpoint.every_minutes": 0.0,
}  # fmt: skip
CONTESTANTS = {  # in the order of their tables
    "SGD": {},
    "PowerSGD 1": {"averaging.compression": "powersgd", "averaging.rank": 1},
    "PowerSGD 2": {"averaging.compression": "powersgd", "averaging.rank": 2},
    "PowerSGD 4": {"averaging.compression": "powersgd", "averaging.rank": 4},
    "sign-CHOCO": {
        "averaging.method": "choco", "averaging.compression": "sign", "averaging.topology": "ring", "averaging.consensus": 0.5,
    },
    "signum": {"averaging.compression": "signum", "train.lr": 5e-4},
}  # fmt: skip


def papers(options: argparse.Namespace) -> Measured:
    """The 3-layer, 650-wide model of PowerSGD's and CHOCO-SGD's papers on WikiText-2: perplexity after equal steps.

    Vogels, Karimireddy, Jaggi 2019, "PowerSGD: practical low-rank gradient compression"; Koloskova, Lin, Stich, Jaggi 2020,
    "Decentralized deep learning with arbitrary communication compression". Their perplexity is the mean of exp(loss) over
    batches. Products are in bfloat16, text is in lower case. The rate is theirs for so many workers, 1.25 for each, twice as
    theirs adds every gradient twice; it is warmed up and falls by a cosine, over far fewer steps than their 40 epochs.
    """
    if options.data is None:
        sys.exit("say where the text is: --data FOLDER, with wikitext-2/ in it")
    steps = options.steps or (4 if options.quick else 600)
    interval = max(1, steps // 30)
    steps += -steps % interval  # bytes are told at its multiples
    corpus = _corpus(options)
    epoch = Corpus(corpus).split("train")["tokens"] / (MODEL["train.lanes"] * MODEL["train.window"])
    table = Table(
        f"WikiText-2 in lower case, {RANKS} ranks, {steps} steps, which is {steps / epoch:.2f} epochs",
        [("method", 12), ("perplexity", 12), ("exp of the loss", 17), ("MiB a step", 12)],
    )
    data = {}
    for name, settings in CONTESTANTS.items():
        out = options.work / name.replace(" ", "-")
        common = {**MODEL, "train.max_steps": steps, "train.warmup": steps // 10, "log.every": interval}
        train(RANKS, out, "--data", corpus, settings={**common, "train.eval_every": steps, **settings})
        lines = metrics(out)
        last = next(line for line in reversed(lines) if "split" in line)
        sent = sum(line["bytes_sent"] for line in lines if "split" not in line)
        data[name] = {
            "perplexity": last["window_perplexity"], "loss": last["loss"], "bytes_a_step": sent / steps,
            "train": [(line["step"], line["loss"]) for line in lines if "split" not in line],
        }  # fmt: skip
        table.row(name, f"{last['window_perplexity']:,.1f}", f"{last['perplexity']:,.1f}", f"{sent / steps / 2**20:.3f}")
    return table, data, lambda axes: _draw(data, axes)


def _corpus(options):
    """WikiText-2 in lower case by words: 28,912 of them, where the papers' way to split text gives 28,869."""
    out, paths = options.work / "corpus", []
    for split in ("train", "valid"):
        path = options.work / f"{split}.txt"
        path.write_text((options.data / "wikitext-2" / f"{split}.txt").read_text().lower())
        paths += [f"--{split}", path]
    run([sys.executable, "-m", "dllm.prepare", *paths, "--tokenizer", "word", "--out", out])
    return out


def _draw(data, axes):
    for name, found in data.items():
        axes.plot(*zip(*found["train"], strict=True), label=name)
    axes.set_xlabel("step")
    axes.set_ylabel("training loss, nats a word")
