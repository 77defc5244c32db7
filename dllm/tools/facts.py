"""What can be said of the folder of a run, a corpus or a model by looking at it: quickly, without MPI, changing none of it."""

from __future__ import annotations

import math
import os
import pathlib
from collections.abc import Iterable
from typing import Any

from .. import config
from ..data.corpus import Corpus
from ..data.tokenizer_files import load_tokenizer
from ..errors import UserError, reason
from ..files import storage
from ..inference import model_folder
from ..inference.evaluation import perplexity
from ..model import blocks
from ..runs import checkpoint, marks, ownership
from ..runs.run_folder import read_settings
from ..training.curves import SCORES, Line, is_number, is_step, read_lines

Facts = dict[str, Any]  # name -> number, text, list or Facts, as JSON has them
OF_A_RUN_ALONE = (  # beginnings of settings that no recipe is known by
    "data.", "log.", "storage.", "resilience.", "checkpoint.", "train.max_steps", "train.init_from",
)  # fmt: skip
ALIVE = 30.0  # seconds since a sign of life within which a job is taken for alive: it gives one every 5
TEXT = "the embedded corpus"


def look(path: str | os.PathLike[str], folder: pathlib.Path) -> Facts:
    """What is known of a folder, which the user calls `path`. Raises UserError where it is none of dllm, or damaged."""
    try:
        if (folder / "config.toml").exists():
            return of_run(path, folder)
        if model_folder.is_model_folder(folder):
            return of_model(path, folder)
        if (folder / "manifest.json").exists():
            return of_corpus(path, folder)
    except OSError as error:
        raise UserError(f"cannot read {error.filename or path}: {reason(error)}") from None
    raise UserError(f"{path} is not the folder of a run, a model or a corpus")


def of_corpus(path: str | os.PathLike[str], folder: pathlib.Path) -> Facts:
    """Of a corpus. Raises UserError."""
    corpus = Corpus(folder)
    manifest, splits = corpus.manifest, {}
    for name, entry in manifest["splits"].items():
        lost = [part["name"] for part in entry["shards"] if not (folder / part["name"]).is_file()]
        splits[name] = {key: entry[key] for key in ("tokens", "bytes", "pairs", "records", "longest") if key in entry}
        splits[name] |= {"shards": len(entry["shards"]), "not_on_this_disk": lost}
    return {
        "kind": "corpus", "path": str(path), "hash": corpus.hash, "tokenizer": manifest["kind"],
        "content": corpus.content, "labels": corpus.labels, "features": corpus.features,
        "pairs": corpus.tokenizer.pairs, "vocabulary": corpus.vocabulary, "tokenizer_hash": corpus.tokenizer_hash,
        "private_counts": manifest.get("counts"), "splits": splits, "disk_bytes": _size(folder),
    }  # fmt: skip


def of_model(path: str | os.PathLike[str], folder: pathlib.Path) -> Facts:
    """Of a model folder, whose weights are compared with their hash. Raises UserError."""
    found = model_folder.read(folder)
    facts = found.facts
    return {
        "kind": "model", "path": str(path), "model": facts["model"], "parameters": facts["parameters"],
        "weights": facts["weights"], "tokenizer": found.tokenizer.kind, "pairs": found.tokenizer.pairs,
        "sound": found.tokenizer.rate > 0,
        "vocabulary": facts["vocabulary"], "tokenizer_hash": facts["tokenizer"], "embedded": facts["embedded"],
        "training": facts.get("training"), "imported": facts.get("imported"), "disk_bytes": _size(folder),
    }  # fmt: skip


def of_run(path: str | os.PathLike[str], folder: pathlib.Path) -> Facts:
    """Of a run. Raises UserError where its settings, its tokenizer or its metrics cannot be read."""
    settings, tokenizer = read_settings(folder), load_tokenizer(folder)
    silent = _seconds_silent(folder)
    lines, (found, wrong) = read_lines(folder / "metrics.jsonl"), checkpoint.available(folder)
    newest = found[0].manifest if found else {}
    summary = _summary(folder)
    preset, changed = nearest_preset(settings)
    train = [line for line in lines if "split" not in line]
    texts = [{"corpus": text.corpus or None, "tokens": text.tokens} for text in found[0].texts] if found else []
    return {
        "kind": "run", "path": str(path), "corpus": settings.data.path or TEXT, "private": settings.data.private,
        "preset": preset, "changed": changed, "begun_from": settings.train.init_from or None, "texts": texts,
        "tokenizer": tokenizer.kind, "sound": tokenizer.rate > 0,
        "pairs": tokenizer.pairs, "vocabulary": tokenizer.size, "model": config.as_dict(settings)["model"],
        "parameters": newest.get("parameters", summary.get("parameters")),
        "state": _state(folder, silent), "alive": silent, "owner": ownership.owner(folder),
        **_progress(settings, train, newest), "units": blocks.units(settings.model)._asdict(),
        "best": best(lines, newest, blocks.units(settings.model).text), "last_loss": train[-1]["loss"] if train else None,
        "tokens_per_second": _speed(summary, train), "ranks": newest.get("ranks", summary.get("ranks")),
        "wall_seconds": summary.get("wall_seconds"), "skipped": newest.get("scalars", {}).get("skipped"),
        "checkpoints": [one.step for one in reversed(found)], "problems": [*wrong, *_lost(found)],
        "disk_bytes": _size(folder), "settings": config.flat(settings),
    }  # fmt: skip


def nearest_preset(settings: config.Config) -> tuple[str, Facts]:
    """The preset that a Config differs least from, and in what: "section.key" -> value. A run does not say which it was."""
    ours, least = config.flat(settings), None
    for name in config.preset_names():
        theirs = config.flat(config.resolve(name))
        changed = {key: value for key, value in ours.items() if value != theirs[key] and not key.startswith(OF_A_RUN_ALONE)}
        if least is None or len(changed) < len(least[1]):
            least = name, changed
    return least or ("", {})


def best(lines: Iterable[Line], newest: Facts, text: bool = True) -> Facts | None:
    """The best evaluation of a run on its validation split: loss, step, and what it has of SCORES; None: there was none.

    text : whether a loss has a perplexity
    newest : manifest of the newest checkpoint. What it counts as the best may be later than an older, lower loss on another
    corpus; it may count none yet.
    """
    found = [line for line in lines if line.get("split") == "valid" and math.isfinite(line["loss"])]
    scalars = newest.get("scalars", {})
    known, step = scalars.get("best_loss", math.inf), scalars.get("step", 0)
    counted = [line for line in found if line["loss"] == known or line["step"] >= step]
    line = min(counted, key=lambda one: one["loss"], default=None)
    if line is None:
        return ({"loss": known} | ({"perplexity": perplexity(known)} if text else {})) if math.isfinite(known) else None
    measured = {"loss": line["loss"], "step": line["step"]} | ({"perplexity": perplexity(line["loss"])} if text else {})
    return {name: line[name] for name in SCORES if is_number(line.get(name))} | measured


def _summary(folder: pathlib.Path) -> Facts:
    """What of summary.json is of use here, and is what it should be; {} before a run's end."""
    if not (folder / "summary.json").exists():
        return {}
    told = storage.read_json(folder / "summary.json", ("ranks",))
    whole = {name: told[name] for name in ("parameters", "ranks") if is_step(told.get(name))}
    return whole | {name: told[name] for name in ("tokens_per_second", "wall_seconds") if is_number(told.get(name))}


def _progress(settings: config.Config, train: list[Line], newest: Facts) -> Facts:
    """How far a run is: "step" and "epoch" of its last sign, of "steps" and "epochs" as its settings are."""
    points = [(0, 0.0), *((line["step"], line["epoch"]) for line in train if _is_epoch(line.get("epoch")))]
    (step, epoch), steps = points[-1], settings.train.max_steps or None
    if before := next((point for point in reversed(points) if point[0] < step and point[1] < epoch), None):
        windows = (step - before[0]) / (epoch - before[1])  # of an epoch
        by_epochs = step + round(max(0.0, settings.train.epochs - epoch) * windows)
        steps = min(steps or by_epochs, by_epochs)
    scalars = newest.get("scalars", {"step": 0, "epoch": 0})
    step, epoch = max(scalars["step"], step), max(scalars["epoch"], epoch)
    return {"step": step, "steps": steps, "epoch": epoch, "epochs": settings.train.epochs}


def _is_epoch(value: Any) -> bool:
    return is_number(value) and 0 <= value <= 2**31


def _state(folder: pathlib.Path, silent: float | None) -> str:
    """done, running, stopped or new (no job has written to it), as far as can be told from here."""
    if marks.is_done(folder):
        return "done"
    if silent is None:
        return "new"
    return "running" if silent < ALIVE else "stopped"


def _seconds_silent(folder: pathlib.Path) -> float | None:
    """Since the job that owns the run last gave a sign of life, by the clock of the disk where that can be asked: by a file
    that is made there for a moment.
    """
    silent = ownership.Pulse(folder).silent()
    return None if silent is None else round(silent, 1)


def _speed(summary: Facts, train: list[Line]) -> float | None:
    speeds = sorted(line["tokens_per_second"] for line in train if is_number(line.get("tokens_per_second")))
    return summary.get("tokens_per_second") or (speeds[len(speeds) // 2] if speeds else None)


def _lost(found: list[checkpoint.Checkpoint]) -> Iterable[str]:
    """A line for each checkpoint of which files are not here, or have not the size that they should have."""
    for one in found:
        for (_, path), (least, most) in zip(one.parts(), one.sizes(), strict=True):
            if not path.is_file():
                yield f"{path} is not on this disk"
            elif not least <= path.stat().st_size <= most:
                yield f"{path} is damaged: it has {path.stat().st_size:,} bytes"


def _size(folder: pathlib.Path) -> int:
    """Bytes of all files of a folder; one that is removed meanwhile counts nothing."""
    total = 0
    for place, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.lstat(os.path.join(place, name)).st_size
            except OSError:
                continue
    return total


def as_json(value: Any) -> Any:
    """The same where JSON can say it: a number that is none becomes null."""
    if isinstance(value, dict):
        return {name: as_json(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [as_json(one) for one in value]
    return None if isinstance(value, float) and not abs(value) < math.inf else value
