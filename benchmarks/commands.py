"""The measurements: each takes the options of the command line and returns (Table, what was measured, how to draw it)."""

import argparse
import json
import math
import sys
import time
from functools import partial
from statistics import quantiles

from dllm.comm.methods import BETWEEN_NODES
from dllm.kernels.processor import BF16
from dllm.model.precision import products_of

from . import cost
from .results import Measured, Table, bars, middle, ratio, roofline, spread
from .runs import PEERS, Steps, installed, last_json, on_ranks, run, train
from .sizes import SIZES

MIB = 2**20
PRECISIONS = ("fp32", "bf16") if BF16 else ("fp32",)
STREAMS, PROMPT = 64, 50  # of serving; tokens of a prompt, where streams come and go


def ceilings(ranks: int) -> dict[str, float]:
    """GFLOP/s and GB/s that the machine can do with all ranks at it."""
    return last_json(run(on_ranks(ranks, "benchmarks.ceilings"), {"OPENBLAS_NUM_THREADS": "1"}))


def step(options: argparse.Namespace) -> Measured:
    """A training step against PyTorch's, Keras's and JAX's, in fp32 and bf16, and against what the machine can do."""
    columns = [("size", 18), ("dllm GFLOP/s", 24), ("of ceiling", 12), ("PyTorch DDP", 18), ("Keras", 18), ("JAX", 18)]
    columns += [("exposed comm", 14), ("MB a rank", 11), ("PyTorch", 9)]
    table = Table(f"A training step, {options.ranks} ranks", columns)
    data, groups = {}, {}
    for name in options.sizes:
        size = SIZES[name]
        steps, found = Steps(options.work, name, size, options.ranks, options.seconds), {}
        add = lambda key, value: found.setdefault(key, []).append(value)
        total = size.flops * options.ranks / 1e9
        for _ in range(options.rounds):
            limits = ceilings(options.ranks)
            precisions = [precision for precision in ("fp32", "bf16") if precision in limits]
            for precision in precisions:
                add(f"ceiling {precision}", limits[precision])
                summary = steps.dllm(precision)
                add(f"dllm {precision}", summary["gflops"])
                add(f"exposed {precision}", summary["exposed_comm_fraction"])
                add(f"memory {precision}", max(summary["peak_rss_bytes"]) / MIB)
                if "torch" in options.peers and installed("torch"):
                    peer = steps.torch(precision)
                    add(f"torch {precision}", total / peer["seconds"])
                    add(f"torch memory {precision}", peer["peak_rss_bytes"] / MIB)
            for package, peer in (("tensorflow", "keras"), ("jax", "jax")):
                if package in options.peers and installed(package):
                    add(f"{peer} fp32", size.flops / 1e9 / steps.one_process(peer)["seconds"])
        data[name] = found
        for precision in precisions:
            get = lambda key, precision=precision, found=found: found.get(f"{key} {precision}")
            beaten = lambda peer, get=get: f"{middle(get(peer)):.1f}, {ratio(get('dllm'), get(peer))}" if get(peer) else "-"
            table.row(
                f"{name} {precision}", spread(get("dllm")), f"{middle(get('dllm')) / middle(get('ceiling')):.1%}",
                beaten("torch"), beaten("keras"), beaten("jax"), f"{middle(get('exposed')):.1%}",
                f"{middle(get('memory')):.0f}", f"{middle(get('torch memory')):.0f}" if get("torch memory") else "-",
            )  # fmt: skip
            series = {"dllm": "dllm", "PyTorch DDP": "torch", "Keras": "keras", "JAX": "jax", "ceiling": "ceiling"}
            series = {label: get(key) for label, key in series.items() if get(key)}
            groups[f"{name}\n{precision}"] = {key: middle(values) for key, values in series.items()}
    return table, data, partial(bars, "GFLOP/s", groups)


def kernels(options: argparse.Namespace) -> Measured:
    """The matrix products of a step, one by one on one core, against BLAS and against what the innermost loop alone reaches."""
    columns = [("product", 22), ("M x K x N", 20), ("fp32 GFLOP/s", 22), ("of peak", 9), ("BLAS", 22), ("ratio", 9)]
    columns += [("bf16", 22), ("of its peak", 12)] if BF16 else []
    command = [sys.executable, "-m", "benchmarks.products", str(options.seconds), *options.sizes]
    limits, points = ceilings(1), {"dllm fp32": [], "BLAS fp32": [], "dllm bf16": []}
    found = last_json(run(command, {"OPENBLAS_NUM_THREADS": "1"}))
    peaks = found["peak"]
    by = ", ".join(f"{precision} {rate:.0f}" for precision, rate in peaks.items())
    table = Table(f"Matrix products of a training step, one core; peak GFLOP/s of the innermost loop: {by}", columns)
    for row in found["products"]:
        fp32, blas, bf16 = row["fp32"], row["blas"], row["bf16"]
        shape = "{} x {} x {}".format(*row["shape"])
        share = lambda rates, precision: f"{middle(rates) / peaks[precision]:.0%}"
        cells = [spread(fp32), share(fp32, "fp32"), spread(blas), ratio(fp32, blas)]
        cells += [spread(bf16), share(bf16, "bf16")] if bf16 else []
        table.row(f"{row['size']} {row['product']}", shape, *cells)
        for label, rates, intensity in (("dllm fp32", fp32, 0), ("BLAS fp32", blas, 0), ("dllm bf16", bf16, 1)):
            points[label] += [(row["intensity"][intensity], middle(rates))] if rates else []
    return table, {"ceilings": limits, **found}, partial(roofline, limits, points)


def scaling(options: argparse.Namespace) -> Measured:
    """Weak scaling: one rank and several, each with the same lanes, in turns; and what the cost model expects of a cluster."""
    columns = [("size", 18), ("1 rank GFLOP/s", 24), (f"{options.ranks} ranks", 24), ("efficiency", 24), ("exposed comm", 14)]
    columns += [(name, 28) for name in cost.NETWORKS]
    scales = ", ".join(map(str, cost.SCALES))
    title = f"Weak scaling from 1 rank to {options.ranks}; predicted for {scales} ranks, where no communication is hidden"
    table, data, groups = Table(title, columns), {}, {}
    for name in options.sizes:
        size = SIZES[name]
        one, many = (Steps(options.work, name, size, ranks, options.seconds) for ranks in (1, options.ranks))
        found = {precision: {"one": [], "many": [], "exposed": []} for precision in PRECISIONS}
        for _ in range(options.rounds):
            for precision, rates in found.items():
                rates["one"].append(one.dllm(precision)["gflops"])
                summary = many.dllm(precision)
                rates["many"].append(summary["gflops"])
                rates["exposed"].append(summary["exposed_comm_fraction"])
        for precision, rates in found.items():
            gains = [many / one / options.ranks for one, many in zip(rates["one"], rates["many"], strict=True)]
            computing = size.flops * options.ranks / 1e9 / middle(rates["many"]) * (1 - middle(rates["exposed"]))
            predicted = {network: predict(computing, 4 * summary["parameters"], network) for network in cost.NETWORKS}
            cells = [" ".join(f"{share:.2f}" for share in shares.values()) for shares in predicted.values()]
            exposed = f"{middle(rates['exposed']):.1%}"
            table.row(f"{name} {precision}", spread(rates["one"]), spread(rates["many"]), spread(gains, 3), exposed, *cells)
            data[f"{name} {precision}"] = rates | {"efficiency": gains, "computing seconds": computing, "predicted": predicted}
            groups[f"{name}\n{precision}"] = {f"{options.ranks} ranks": middle(gains)} | {
                f"{cost.SCALES[-1]} ranks, {network}": shares[cost.SCALES[-1]] for network, shares in predicted.items()
            }
    return table, data, partial(bars, "efficiency", groups)


def predict(computing: float, size: int, network: str) -> dict[int, float]:
    """ranks -> efficiency of a step whose computing takes so many seconds and whose gradient has `size` bytes."""
    buckets = math.ceil(size / (BETWEEN_NODES * MIB))
    return {ranks: cost.efficiency(computing, size, ranks, cost.NETWORKS[network], buckets) for ranks in cost.SCALES}


def overlap(options: argparse.Namespace) -> Measured:
    """How much of the communication the backward hides, by size of bucket."""
    table = Table(
        f"Exposed communication, {options.ranks} ranks", [("size", 14), ("bucket MB", 12), ("exposed", 22), ("GFLOP/s", 24)]
    )
    data, groups = {}, {}
    for name in options.sizes:
        steps = Steps(options.work, name, SIZES[name], options.ranks, options.seconds)
        groups[name] = {}
        for bucket in (1, 4, 16):
            runs = [steps.dllm(averaging__bucket_mb=bucket) for _ in range(options.rounds)]
            exposed = [100 * summary["exposed_comm_fraction"] for summary in runs]
            speed = [summary["gflops"] for summary in runs]
            table.row(name, bucket, f"{spread(exposed)} %", spread(speed))
            data[f"{name} {bucket}"] = {"exposed_percent": exposed, "gflops": speed}
            groups[name][f"{bucket} MB"] = middle(exposed)
    return table, data, partial(bars, "% of the step that waits", groups)


def startup(options: argparse.Namespace) -> Measured:
    """Seconds from the command to its end for a run of one step, with a warm and a cold cache of kernels."""
    table, data, turns = Table("Start-up", [("what", 34), ("seconds", 24)]), {}, iter(range(1000))
    corpus = Steps(options.work, "char", SIZES["char"], 1, 0).corpus

    def measure(name, ranks, command, cold=False, warm_up=True):
        """Time `command` on some ranks; each run writes to a folder of its own."""
        data[name] = []
        for turn in range(options.rounds + warm_up):
            out, cache = options.work / f"run-{next(turns)}", options.work / f"cache-{next(turns)}"
            begin = time.perf_counter()
            run([*command, "--out", out] if ranks else command, {"XDG_CACHE_HOME": str(cache)} if cold else {})
            data[name] += [time.perf_counter() - begin] if turn >= warm_up else []
        table.row(name, spread(data[name], 2))

    one_step = ["dllm.train", "--data", corpus, "--max-steps", 1, "--progress", "none", "--set", "log.sample=0"]
    measure("import dllm.train", 0, [sys.executable, "-c", "import dllm.train"])
    for ranks in (1, 8):
        measure(f"{ranks} ranks, warm cache", ranks, on_ranks(ranks, *one_step))
    measure("1 rank, cold cache", 1, on_ranks(1, *one_step), cold=True, warm_up=False)
    return table, data, partial(bars, "seconds", {name: {"seconds": middle(values)} for name, values in data.items()})


def memory(options: argparse.Namespace) -> Measured:
    """Peak resident memory of a rank, against PyTorch's."""
    table = Table(
        f"Peak memory a rank, {options.ranks} ranks", [("size", 18), ("dllm MB", 14), ("PyTorch DDP MB", 18), ("ratio", 9)]
    )
    data, groups = {}, {}
    for name in options.sizes:
        steps = Steps(options.work, name, SIZES[name], options.ranks, 0)
        ours = [max(steps.dllm()["peak_rss_bytes"]) / MIB]
        theirs = [steps.torch()["peak_rss_bytes"] / MIB] if installed("torch") else []
        table.row(name, spread(ours, 0), spread(theirs, 0), ratio(ours, theirs))
        data[name] = {"dllm": ours, "torch": theirs}
        groups[name] = {"dllm": middle(ours), "PyTorch DDP": middle(theirs)}
    return table, data, partial(bars, "MiB", groups)


def generation(options: argparse.Namespace) -> Measured:
    """Tokens a second of one stream on one thread, against PyTorch's nn.LSTM token by token in fp32."""
    columns = [("size", 12), ("products", 10), ("dllm tokens/s", 28), ("PyTorch", 26), ("ratio", 9)]
    table, data, groups = Table("Generation of one stream, one thread", columns), {}, {}
    count = 50 if options.quick else 400
    for name in options.sizes:
        found = {contestant: [] for contestant in (*served(), "torch")}
        for _ in range(options.rounds):
            for precision in served():
                ours = [sys.executable, "-m", "benchmarks.generate", name, count, precision]
                found[precision].append(last_json(run(ours, {"OPENBLAS_NUM_THREADS": "1"}))["tokens_per_second"])
            if installed("torch"):
                theirs = [sys.executable, PEERS / "torch_generate.py", name, count]
                found["torch"].append(last_json(run(theirs))["tokens_per_second"])
        for precision in served():
            ours, theirs = found[precision], found["torch"]
            table.row(name, precision, spread(ours), spread(theirs), ratio(ours, theirs))
        data[name] = found
        groups[name] = named({contestant: middle(values) for contestant, values in found.items() if values})
    return table, data, partial(bars, "tokens/s", groups)


def serving(options: argparse.Namespace) -> Measured:
    """Tokens a second of 64 streams and a token's time of one, by the serving engine and by PyTorch's nn.LSTM in fp32."""
    many, one, loaded = f"{STREAMS} streams tokens/s", "1 stream ms", "under load p50, p99 ms"
    columns = [("size, threads", 18), ("products", 10), (many, 31), ("PyTorch", 28), ("ratio", 9)]
    columns += [(one, 24), ("PyTorch ms", 24), ("of it", 9), (loaded, 26)]
    table, data, groups = Table("Serving, without HTTP", columns), {}, {}
    ours = [sys.executable, "-m", "benchmarks.serve"]
    contestants = {precision: (ours, precision) for precision in served()}
    if installed("torch"):
        contestants["torch"] = ([sys.executable, PEERS / "torch_serve.py"],)
    for name in options.sizes:
        for threads in sorted({1, options.ranks}):
            found = {f"{contestant} {streams}": [] for contestant in (*served(), "torch") for streams in (STREAMS, 1)}
            for _ in range(options.rounds):
                for contestant, (command, *precision) in contestants.items():
                    for streams in (STREAMS, 1):
                        arguments = name, streams, options.seconds, threads, *precision
                        measured = last_json(run([*command, *arguments], {"OPENBLAS_NUM_THREADS": "1"}))
                        value = measured["tokens_per_second"] if streams > 1 else 1000 * middle(measured["gaps"])
                        found[f"{contestant} {streams}"].append(value)
                for precision in served():
                    gaps = last_json(run([*ours, name, STREAMS, options.seconds, threads, precision, PROMPT]))["gaps"]
                    for point in (50, 99):
                        found.setdefault(f"{precision} p{point}", []).append(1000 * quantiles(gaps, n=100)[point - 1])
            label = f"{name}, {threads}"
            for precision in served():
                cells = []
                for streams in (STREAMS, 1):
                    mine, theirs = found[f"{precision} {streams}"], found[f"torch {streams}"]
                    digits = 1 if streams > 1 else 2
                    cells += [spread(mine, digits), spread(theirs, digits), ratio(mine, theirs)]
                p50, p99 = (middle(found[f"{precision} p{point}"]) for point in (50, 99))
                table.row(label, precision, *cells, f"{p50:.1f}, {p99:.1f}")
            data[label] = found
            speeds = {contestant: found[f"{contestant} {STREAMS}"] for contestant in contestants}
            groups[label] = named({contestant: middle(values) for contestant, values in speeds.items()})
    return table, data, partial(bars, f"tokens/s, {STREAMS} streams", groups)


def served() -> list[str]:
    """Precisions of a trained model's products that this processor has."""
    return [precision for precision in ("fp32", "bf16", "int8") if products_of(precision, "float32") == precision]


def named(values: dict[str, float]) -> dict[str, float]:
    """The same under the names that a drawing shows."""
    return {"PyTorch" if name == "torch" else f"dllm {name}": value for name, value in values.items()}


def quality(options: argparse.Namespace) -> Measured:
    """Validation loss of bf16 against fp32: a short run on tinyshakespeare and an epoch of wlm-200 on WikiText-2."""
    if options.data is None:
        sys.exit("say where the text is: --data FOLDER, with tinyshakespeare/ and wikitext-2/ in it")
    table = Table(
        f"bf16 against fp32, {options.ranks} ranks", [("run", 34), ("fp32 loss", 14), ("bf16 loss", 14), ("difference", 12)]
    )
    data, groups = {}, {}
    plans = {
        "tinyshakespeare": ("tinyshakespeare", "char", ["--preset", "default"]),
        "wlm-200, WikiText-2, one epoch": ("wikitext-2", "word", ["--preset", "wlm-200", "--set", "train.epochs=1"]),
    }
    for name, (folder, tokenizer, arguments) in plans.items():
        corpus, text = options.work / folder, options.data / folder
        if not (text / "valid.txt").exists():  # the last tenth, as is usual there
            whole, text = (text / "input.txt").read_text(), options.work
            cut = len(whole) * 9 // 10
            (text / "train.txt").write_text(whole[:cut])
            (text / "valid.txt").write_text(whole[cut:])
        splits = [word for split in ("train", "valid") for word in (f"--{split}", text / f"{split}.txt")]
        run([sys.executable, "-m", "dllm.prepare", *splits, "--tokenizer", tokenizer, "--out", corpus])
        found = {}
        for precision in ("fp32", "bf16"):
            out = options.work / f"{folder}-{precision}"
            limit = ["--max-steps", "40"] if options.quick else []
            settings = {"train.precision": precision, "train.threads": 1, "log.sample": 0}
            train(options.ranks, out, "--data", corpus, *arguments, *limit, settings=settings)
            lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
            found[precision] = [line["loss"] for line in lines if "split" in line][-1]
        difference = found["bf16"] / found["fp32"] - 1
        table.row(name, f"{found['fp32']:.4f}", f"{found['bf16']:.4f}", f"{difference:+.2%}")
        data[name], groups[name] = found, found
    return table, data, partial(bars, "validation loss, nats a token", groups)
