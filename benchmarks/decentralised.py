"""Averaging methods side by side: what a model is worth after as many steps or seconds, and what was sent for it."""

import argparse
import collections
import concurrent.futures
import sys
from functools import partial

import numpy as np

from dllm.launching import mpirun

from . import cost, hosts
from .results import Measured, Table
from .runs import PEERS, last_json, metrics, on_ranks, run, train
from .sizes import NETWORK

MODEL = {
    "model.embedding": 64, "model.hidden": 192, "model.layers": 1, "train.lanes": 16, "train.window": 32, "train.clip": 5.0,
    "train.optimizer": "sgd", "train.lr": 1.0, "train.momentum": 0.9, "train.schedule": "cosine", "train.warmup": 50,
    "train.threads": 1, "log.sample": 0, "checkpoint.every_minutes": 0.0,
}  # fmt: skip
CURVE = 20  # points of a curve
PLAIN = {"train.momentum": 0.0, "train.lr": 10.0}  # about what momentum 0.9 makes of lr 1
RELAYSUM = {"method": "relaysum", "topology": "tree", "train.lr": 2.5}  # steps count 1 / (1 + mean delay): models come late
DILOCO = {"method": "diloco", "period": 50, "train.lr": 0.2}  # momentum 0.9 outside makes a step count 7 times
CONTESTANTS = {  # where steps count for more or less than allreduce's, with a rate that makes up for it
    "allreduce": {},
    "dpsgd exponential": {"method": "dpsgd", "topology": "exponential"},
    "dpsgd ring": {"method": "dpsgd", "topology": "ring"},
    "dpsgd-atc exponential": {"method": "dpsgd-atc", "topology": "exponential"},
    "dpsgd-atc one-peer": {"method": "dpsgd-atc", "topology": "one-peer-exponential"},
    "sgp exponential": {"method": "sgp", "topology": "exponential"},
    "gradient-tracking": {"method": "gradient-tracking", "topology": "exponential"},
    "exact-diffusion ring": {"method": "exact-diffusion", "topology": "ring"},
    "qg-momentum": {"method": "qg-momentum", "topology": "exponential", **PLAIN, "train.lr": 5.0},
    "relaysum tree": RELAYSUM,
    "local-sgd, 10 steps": {"method": "local-sgd", "period": 10},
    "diloco, 50 steps": DILOCO,
    "diloco, later": {**DILOCO, "from": 24 / 88},  # its paper starts from a model that has seen 24,000 of 88,000 steps
    "choco sign ring": {"method": "choco", "topology": "ring", "compression": "sign", "consensus": 0.5},
    "choco top-k ring": {"method": "choco", "topology": "ring", "compression": "top-k", "fraction": 0.05, "consensus": 0.1},
    "async-gossip": {"method": "async-gossip", "topology": "exponential", "period": 20},
    "powersgd 4": {"compression": "powersgd", "rank": 4},
    "sign": {"compression": "sign", **PLAIN},
    "top-k 1 %": {"compression": "top-k", "fraction": 0.01},
    "qsgd": {"compression": "qsgd"},
    "bf16": {"compression": "bf16"},
}  # fmt: skip


UNEVEN = {  # exact where texts differ, and D-PSGD on the same graphs
    "allreduce": {},
    "dpsgd ring": {"method": "dpsgd", "topology": "ring"},
    "gradient-tracking ring": {"method": "gradient-tracking", "topology": "ring"},
    "exact-diffusion ring": {"method": "exact-diffusion", "topology": "ring"},
    "dpsgd tree": {"method": "dpsgd", "topology": "tree"},
    "relaysum tree": RELAYSUM,
}


def decentralised(options: argparse.Namespace) -> Measured:
    """Averaging methods on tinyshakespeare by characters: validation loss after equal steps, and bytes that a rank sends."""
    return _compare(options, "tinyshakespeare", _corpus(options), CONTESTANTS)


def uneven(options: argparse.Namespace) -> Measured:
    """Methods for texts that differ: tinyshakespeare by characters, every speaker's lines on one rank."""
    return _compare(options, "tinyshakespeare split by speaker", _by_speaker(options), UNEVEN)


def _compare(options, text, corpus, contestants):
    steps = options.steps or (60 if options.quick else 6000)
    steps += -steps % CURVE
    table = Table(
        f"Averaging methods, {text}, {steps} steps, {options.ranks} ranks",
        [("method", 24), ("loss", 9), ("to allreduce", 14), ("ranks' own", 12), ("apart", 9), ("KB a step", 12)],
    )
    data, curves = {}, {}
    common = {**MODEL, "train.max_steps": steps, "train.eval_every": steps // CURVE, "log.every": steps // CURVE}
    for name, settings in contestants.items():
        out, start = options.work / name.replace(" ", "-"), ["--data", corpus]
        settings = {key if "." in key else f"averaging.{key}": value for key, value in settings.items()}
        if before := round(settings.pop("averaging.from", 0) * steps):  # by allreduce
            train(options.ranks, out, *start, "--max-steps", before, settings=common)
            train(options.ranks, out, "--resume", out, settings=settings)
        else:
            train(options.ranks, out, *start, settings={**common, **settings})
        found = data[name] = _summary(metrics(out))
        curves[name] = list(zip(found["megabytes"], found["losses"], strict=True))
        first = data["allreduce"]["losses"][-1]
        own, apart = found["own_loss"], found["consensus_distance"]
        table.row(
            name, f"{found['losses'][-1]:.4f}", f"{found['losses'][-1] / first - 1:+.2%}", f"{own:.4f}" if own else "-",
            f"{apart:.3f}" if own else "-", f"{1e3 * found['megabytes'][-1] / steps:,.1f}",
        )  # fmt: skip
    return table, data, partial(_draw, curves, "megabytes that a rank has sent")


LARGER = {
    **MODEL, "model.embedding": NETWORK.hidden, "model.hidden": NETWORK.hidden, "train.lanes": hosts.COUNT * NETWORK.lanes,
    "train.window": NETWORK.window, "train.warmup": 10, "train.schedule": "constant", "log.every": 5, "resilience.deadline": 0,
}  # fmt: skip
ON_NETWORK = {  # settings of averaging, how a step sends what it sends, and how many times if not once
    "allreduce": ({}, "allreduce"),
    "powersgd 4": ({"compression": "powersgd", "rank": 4}, "allreduce", 2),
    "top-k 1 %": ({"compression": "top-k", "fraction": 0.01}, "allgather"),
    "sign": ({"compression": "sign", **PLAIN}, "allgather"),
    "dpsgd exponential": ({"method": "dpsgd", "topology": "exponential"}, "neighbours"),
    "dpsgd-atc one-peer": ({"method": "dpsgd-atc", "topology": "one-peer-exponential"}, "neighbours"),
    "choco sign ring": ({"method": "choco", "topology": "ring", "compression": "sign"}, "neighbours"),
    "local-sgd, 10 steps": ({"method": "local-sgd", "period": 10}, "allreduce"),
    "diloco, 50 steps": ({"method": "diloco", "period": 50}, "allreduce"),
}


def network(options: argparse.Namespace) -> Measured:
    """Averaging methods on four hosts with links of 1 Gbit/s, 100 Mbit/s: time and bytes of a step, loss over time; as root.

    What sends less than allreduce gets twice as many steps, to see when it comes to the loss where allreduce ends. On the link
    is all that crosses it, also where evaluations average the ranks' models.
    """
    if reason := hosts.missing():
        sys.exit(reason)
    corpus, steps = _corpus(options, 0.02), options.steps or (40 if options.quick else 100)
    steps += -steps % LARGER["log.every"]
    table = Table(
        f"Averaging methods on four hosts, tinyshakespeare, {steps} steps",
        [("Mbit/s", 8), ("method", 22), ("ms a step", 12), ("KB a step", 12), ("on the link", 13), ("loss", 9),
         ("in equal time", 15), ("s to allreduce's", 18), ("times faster", 14), *((f"{n} ranks, ms", 16) for n in cost.SCALES)],
    )  # fmt: skip
    data, curves = {}, {}
    with hosts.Hosts(options.work) as four:
        for rate in (1000, 100):
            four.limit(rate)
            found = {name: _on_hosts(options, four, corpus, name, rate, steps) for name in ON_NETWORK}
            peer = _torch_on_hosts(four, 10 if options.quick else 40) if "torch" in options.peers else None
            data[rate] = {"methods": found, "PyTorch DDP gloo": peer, **_evaluate(found, steps)}
            for name, one in found.items():
                curves[f"{name}, {rate} Mbit/s"] = list(zip(one["seconds"], one["losses"], strict=True))
                to_goal = one["to_goal"] and found["allreduce"]["to_goal"] / one["to_goal"]
                table.row(
                    rate, name, f"{1e3 * one['step']:.1f}", f"{one['kilobytes']:,.1f}", f"{one['on_link']:,.1f}",
                    f"{one['in_equal_steps']:.3f}", f"{one['in_equal_time']:.3f}", f"{one['to_goal']:.1f}" if to_goal else "-",
                    f"{to_goal:.1f} x" if to_goal else "-", *(f"{1e3 * one['predicted'][n]:,.1f}" for n in cost.SCALES),
                )  # fmt: skip
            empty = [""] * (5 + len(cost.SCALES))
            if peer:
                table.row(rate, "PyTorch DDP gloo", f"{1e3 * peer['mean']:.1f}", "", *empty)
            errors = data[rate]["errors"]
            table.row(rate, "the model errs by", f"{np.median(errors):.1%}", f"max {max(errors):.1%}", *empty)
    return table, data, partial(_draw, curves, "seconds")


def _evaluate(found, steps):
    """Adds to what runs gave: losses in equal steps and time, seconds to allreduce's loss, predictions. Returns the model."""
    model = cost.fit([(max(one["exposed"], 1e-4), *_traffic(one, hosts.COUNT)) for one in found.values()])
    shortest, goal = min(one["seconds"][-1] for one in found.values()), found["allreduce"]["losses"][-1]
    for one in found.values():
        one["in_equal_steps"] = one["losses"][one["steps"].index(steps)]
        one["in_equal_time"] = float(np.interp(shortest, one["seconds"], one["losses"]))
        one["to_goal"] = next((t for t, loss in zip(one["seconds"], one["losses"], strict=True) if loss <= goal), None)
        computing = one["step"] - one["exposed"]
        one["predicted"] = {n: computing + float(np.dot(model, _traffic(one, n))) for n in (hosts.COUNT, *cost.SCALES)}
    errors = [abs(one["predicted"][hosts.COUNT] / one["step"] - 1) for one in found.values()]
    return {"seconds a message, a byte": model, "errors": errors}


def _on_hosts(options, four, corpus, name, rate, steps):
    """What a run over the hosts gave, a step: seconds, kilobytes counted, kilobytes on a link; and losses over seconds."""
    settings, kind, *times = ON_NETWORK[name]
    steps *= 2 if {"compression", "period"} & set(settings) else 1
    out = options.work / f"{name.replace(' ', '-')}-{rate}"
    settings = {key if "." in key else f"averaging.{key}": value for key, value in settings.items()}
    settings = {**LARGER, "train.max_steps": steps, "train.eval_every": LARGER["log.every"], **settings}
    words = [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]
    command = mpirun.command(hosts.COUNT, hosts.COUNT, dict.fromkeys(four.names, 1), "PATH")
    before = four.sent()
    program = [sys.executable, "-m", "dllm.train", "--data", corpus, "--out", out, "--progress", "none", *words]
    run([*four.on(1), *command, *program], {**mpirun.OPENMPI, **four.environment()})
    link = np.mean(np.subtract(four.sent(), before)) / 1e3 / steps
    lines = metrics(out)
    found = _summary(lines)
    times = [(line["tokens_per_second"], line["exposed_comm_fraction"]) for line in lines if "split" not in line]
    tokens = LARGER["train.lanes"] * LARGER["train.window"]
    seconds = [tokens / speed for speed, _ in times]
    return found | {
        "kind": kind, "times": (times or [1])[0], "topology": settings.get("averaging.topology"),
        "period": settings.get("averaging.period", 1),
        "step": float(np.mean(seconds[1:])),
        "exposed": float(np.mean([s * part for s, (_, part) in zip(seconds, times, strict=True)][1:])),
        "kilobytes": 1e3 * found["megabytes"][-1] / steps, "on_link": float(link),
        "seconds": [LARGER["log.every"] * sum(seconds[: step // LARGER["log.every"]]) for step in found["steps"]],
    }  # fmt: skip


def _torch_on_hosts(four, steps):
    """{"mean", ...}: seconds of a step of DistributedDataParallel over the hosts."""
    peer = [sys.executable, PEERS / "torch_step.py", "network", steps, "fp32"]
    common = {"WORLD_SIZE": hosts.COUNT, "MASTER_ADDR": four.names[0], "MASTER_PORT": 29500, "GLOO_SOCKET_IFNAME": "e0"}
    place = lambda rank: {**common, "RANK": rank}
    with concurrent.futures.ThreadPoolExecutor(hosts.COUNT) as pool:
        jobs = [pool.submit(run, [*four.on(rank + 1), *peer], place(rank)) for rank in range(hosts.COUNT)]
        first, *_ = [job.result() for job in jobs]
        return last_json(first)


def _traffic(one, ranks):
    """(messages, bytes) of a step on so many ranks, of a method that was measured on the hosts."""
    degree = lambda ranks: cost.degree(one["topology"], ranks) if one["kind"] == "neighbours" else 0
    traffic = lambda size, ranks, period: cost.traffic(one["kind"], size, ranks, degree(ranks), period, one["times"])
    size = 1e3 * one["kilobytes"] * one["period"] / traffic(1, hosts.COUNT, 1)[1]
    return traffic(size, ranks, one["period"])


def _texts(options, held_out=0.1):
    """Paths of tinyshakespeare's (train, valid) text: the last part for validation, a tenth as is usual there."""
    if options.data is None:
        sys.exit("say where the text is: --data FOLDER, with tinyshakespeare/ in it")
    whole = (options.data / "tinyshakespeare" / "input.txt").read_text()
    cut = round(len(whole) * (1 - held_out))
    paths = options.work / "train.txt", options.work / "valid.txt"
    for path, text in zip(paths, (whole[:cut], whole[cut:]), strict=True):
        path.write_text(text)
    return paths


def _corpus(options, *held_out):
    """tinyshakespeare by characters."""
    train_text, valid_text = _texts(options, *held_out)
    out = options.work / "corpus"
    words = ["--train", train_text, "--valid", valid_text, "--tokenizer", "char", "--out", out]
    run([sys.executable, "-m", "dllm.prepare", *words])
    return out


def _by_speaker(options):
    """The same in private folders of the ranks, of about equal size: all that somebody says is one rank's."""
    train_text, valid_text = _texts(options)
    spoken, folder = collections.defaultdict(list), options.work / "speakers"
    for speech in train_text.read_text().split("\n\n"):
        spoken[speech.partition("\n")[0]].append(speech + "\n\n")
    folder.mkdir()
    paths = [folder / f"{number}.txt" for number in range(len(spoken))]
    for path, speeches in zip(paths, spoken.values(), strict=True):
        path.write_text("".join(speeches))
    out = options.work / "speakers{rank}"
    words = ["--train", *paths, "--valid", valid_text, "--deal", "files", "--tokenizer", "char", "--out", out]
    run(on_ranks(options.ranks, "dllm.prepare", *words))
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


def _draw(curves, label, axes):
    for number, (name, points) in enumerate(curves.items()):
        axes.plot(*zip(*points, strict=True), "-:"[number // 10 % 2], label=name)
    axes.set_xscale("log")
    axes.set_xlabel(label)
    axes.set_ylabel("validation loss, nats a character")
