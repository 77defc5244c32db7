"""What a run, a corpus or a model is, from what, how far, how good and how large: dllm info PATH."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Iterator

from .. import cli
from ..config import ModelConfig
from ..data.checked_tokens import LONGEST_LIST
from ..data.lane_kinds import PRESETS
from ..errors import DONE, printable
from ..inference import model_card
from ..model import blocks
from ..remote.locate import local_copy
from ..training.curves import SCORES
from .facts import Facts, as_json, look

EPILOG = """
examples
  dllm info RUN                          how far it is, how good, whether its job is alive, and what to type next
  dllm info CORPUS
  dllm info ipfs://CID                   a model or a run that somebody has published; it is fetched and checked first
  dllm info RUN --json | jq .best        for scripts

It reads what is on this disk, changes none of it, and needs no MPI. Of a run it compares sizes, not hashes. In a run's
folder it makes a file for a moment, where it may: its time is the clock of the disk.
"""


def main(argv: list[str] | None = None) -> int:
    """The command. Returns its exit code."""
    return cli.run(info, argv, product=True)


def info(argv: list[str]) -> int:
    """Print what is known of a folder. Raises UserError."""
    parser = cli.Parser("tools.info", __doc__, EPILOG)
    parser.add_argument("path", metavar="PATH", help="folder of a run, a corpus or a model; or ipfs://CID, swarm://REFERENCE")
    parser.add_argument("--json", action="store_true", help="one JSON object")
    options = parser.parse_args(argv)
    facts = look(options.path, local_copy(options.path))
    facts["next"] = next_command(facts)
    if options.json:
        print(json.dumps(as_json(facts)))
        return DONE
    for name, text in {"run": _run, "corpus": _corpus, "model": _model}[facts["kind"]](facts):
        print(printable(f"{name:12}{text}"))
    print(printable(f"{'next':12}{facts['next']}"))
    return DONE


def next_command(facts: Facts) -> str:
    """What to type next."""
    path = shlex.quote(facts["path"])
    if facts["kind"] == "corpus":
        preset = PRESETS.get(facts["content"])
        return f"mpirun -n 4 python -m dllm.train --data {path}" + (f" --preset {preset}" if preset else "")
    if facts["kind"] == "run":
        if facts["state"] == "running":
            return f"tail -f {shlex.quote(facts['path'] + '/metrics.jsonl')}"
        if not facts["checkpoints"]:
            return f"mpirun -n 4 python -m dllm.train --config {shlex.quote(facts['path'] + '/config.toml')} --out NEW"
        if facts["state"] != "done":
            return f"mpirun -n {facts['ranks']} python -m dllm.train --resume {path}"
    return model_card.command(ModelConfig(**facts["model"]).kind, path, facts["pairs"], facts["sound"])


def _run(facts: Facts) -> Iterator[tuple[str, str]]:
    yield "run", facts["path"]
    changed = ", ".join(f"{name} = {json.dumps(value)}" for name, value in facts["changed"].items())
    yield "recipe", f"nearest preset {facts['preset']}" + (f", but {changed}" if changed else "")
    yield "corpus", facts["corpus"] + (", private: each rank has its own" if facts["private"] else "")
    for text in facts["texts"][:-1]:
        yield "before", _text(text)
    if facts["begun_from"]:
        yield "begun from", facts["begun_from"]
    yield from _of_model(facts)
    step, steps = f"step {facts['step']:,}", f" of {facts['steps']:,}" if facts["steps"] else ""
    epoch = f", epoch {facts['epoch']:.2f} of {facts['epochs']}"
    epoch += f", {facts['texts'][-1]['tokens']:,} {facts['units']['predicted']} seen" if facts["texts"] else ""
    yield "progress", f"{facts['state']}, {step}{steps}{epoch}{_signs(facts)}"
    yield "best", _best(facts["best"])
    speed = facts["tokens_per_second"]
    if speed:
        yield "speed", f"{speed:,.0f} {facts['units']['read']}/s" + (f" on {facts['ranks']} ranks" if facts["ranks"] else "")
    steps = ", ".join(f"{step:,}" for step in facts["checkpoints"])
    yield "checkpoints", f"of step {steps}" if steps else "none"
    for problem in facts["problems"]:
        yield "problem", problem
    yield "on disk", _bytes(facts["disk_bytes"])


def _text(text: Facts) -> str:
    """A corpus that a model was trained on before its last one."""
    return f"{text['tokens']:,} tokens of the corpus {text['corpus'] or 'that is unknown or private'}"


def _signs(facts: Facts) -> str:
    silent = facts["alive"]
    if facts["state"] == "done" or silent is None:
        return ""
    return f"; the last sign of life of job {(facts['owner'] or '?').rpartition('.')[2]:.12} is {silent:,.0f} s old"


def _best(found: Facts | None) -> str:
    if found is None:
        return "not evaluated yet"
    said = [f"{words} {form.format(found[name])}" for name, (words, form) in SCORES.items() if name in found]
    said.append(f"loss {found['loss']:.4f}")
    said += [f"at step {found['step']:,}"] if "step" in found else []
    return f"validation {', '.join(said)}"


def _of_model(facts: Facts) -> Iterator[tuple[str, str]]:
    yield "tokenizer", f"{facts['tokenizer']}{', pairs' if facts['pairs'] else ''}, vocabulary {facts['vocabulary']:,}"
    size = f": {facts['parameters']:,} parameters" if facts["parameters"] else ""
    yield "model", f"{blocks.describe(ModelConfig(**facts['model']))}{size}"


def _corpus(facts: Facts) -> Iterator[tuple[str, str]]:
    yield "corpus", facts["path"]
    yield "tokenizer", f"{facts['tokenizer']}{', pairs' if facts['pairs'] else ''}, vocabulary {facts['vocabulary']:,}"
    if facts["labels"]:
        count = f"{len(facts['labels'])} {'letters' if facts['content'] == 'transcripts' else 'labels'}"
        yield facts["content"], f"{count}: {', '.join(facts['labels'])}"[:LONGEST_LIST]
    if facts["private_counts"]:
        yield "vocabulary", f"of private counts, epsilon {facts['private_counts']['epsilon']}"
    token, text = ("frames", "recordings") if facts["features"] else ("tokens", "text")
    for name, split in facts["splits"].items():
        pairs = "".join(f"{split[unit]:,} {unit}, " for unit in ("pairs", "records") if unit in split)
        shards = f"{split['shards']} shard{'s' * (split['shards'] != 1)}"
        lost = len(split["not_on_this_disk"])
        where = f", {lost} of them not on this disk" if lost else ""
        yield name, f"{pairs}{split['tokens']:,} {token}, {_bytes(split['bytes'])} of {text}, {shards}{where}"
    yield "hash", facts["hash"]
    yield "on disk", _bytes(facts["disk_bytes"])


def _model(facts: Facts) -> Iterator[tuple[str, str]]:
    yield "model", facts["path"]
    training = facts["training"]
    if training is None:
        yield "from", f"{facts['imported']}, imported"
    else:
        averaged = f", mean of {training['averaged']} checkpoints" if training["averaged"] > 1 else ""
        seen = "" if training["tokens"] is None else f", {training['tokens']:,} tokens seen"
        yield "from", f"step {training['step']:,} of a run{averaged}{seen}"
        yield "corpus", "the embedded one" if facts["embedded"] else training["corpus"] or "unknown or private"
        for text in training["earlier"]:
            yield "before", _text(text)
        for measured in training["measured"]:
            yield "measured", f"perplexity {measured['after']:.4g} on its {measured['split']} split"
    yield from _of_model(facts)
    yield "weights", f"{facts['weights']}, the sha256 holds"
    yield "on disk", _bytes(facts["disk_bytes"])


def _bytes(count: int) -> str:
    return f"{count / 1e6:,.1f} MB" if count >= 1e5 else f"{count / 1e3:,.1f} kB"


if __name__ == "__main__":
    sys.exit(main())
