"""The README.md of a model folder, made of its config.json: where the model comes from, and how PyTorch loads it."""

from __future__ import annotations

import re
import shlex
from typing import Any

import tomli_w

from ..config import ModelConfig
from ..data.tokenizers import Tokenizer
from ..errors import printable
from ..model import blocks
from . import torch_script

CARD = """---
license: other  # yours to choose: the text that a model was trained on may have a say in it
library_name: pytorch
tags: [lstm, {tag}, dllm]
---

# {name}

{kind}, {parameters:,} parameters, weights in {weights}. Made by dllm {version}.

{origin}

## Use

    {command}
    mpirun -n 2 python -m dllm.evaluate {folder} --data DIR

In PyTorch, without dllm:

```python
{script}
```

{numbers}

## Licence

To be filled in by whoever publishes this model.
{recipe}"""

WHAT = {
    "lm": "LSTM language model", "bilm": "LSTM language models of both directions", "tagger": "LSTM tagger",
    "seq2seq": "LSTM encoder and decoder with attention", "classifier": "LSTM classifier", "ctc": "LSTM speech recogniser",
}  # fmt: skip
TAGS = {"seq2seq": "translation", "tagger": "token-classification", "classifier": "text-classification"}
TAGS |= {"lm": "language-model", "bilm": "language-model", "ctc": "automatic-speech-recognition"}
USES = {
    "tagger": "tools.predict {} FILE", "classifier": "tools.predict {} FILE", "ctc": "tools.predict {} FILE.wav",
    "bilm": "train --preset tagger --init-from {} --data DIR",
}  # fmt: skip


def command(kind: str, folder: str, pairs: bool, sound: bool = False) -> str:
    """What makes use of a model of a kind. folder : as a shell reads it; sound : it is one of recordings"""
    asked = "--out sound.wav" if sound else "--source '...'" if pairs else "--prompt '...'"
    use = USES.get(kind, f"generate {{}} {asked}")
    return "python -m dllm." + (f"{use}.wav" if sound and use.endswith(" FILE") else use).format(folder)


def label(name: str) -> str:
    """A name as Markdown that shows it and does nothing else: no HTML, no link, no new line, no cell of a table."""
    if re.fullmatch(r"(?!www\.)[A-Za-z0-9][A-Za-z0-9 ._-]*", name):
        return name
    return f"`{printable(name).replace('`', chr(39)).replace('|', '/'):.300}`"


def text(name: str, facts: dict[str, Any], tokenizer: Tokenizer, version: str) -> str:
    """The model card of `facts`, a config.json."""
    model = ModelConfig(**facts["model"])
    kind = f"{WHAT[model.kind]}: {blocks.describe(model).removeprefix(model.kind + ': ')}"
    training = facts.get("training")
    recipe = "" if training is None else f"\n## Recipe\n\n{_recipe(training['recipe'])}\n"
    return CARD.format(
        name=label(name), tag=TAGS[model.kind], kind=kind + f", vocabulary of {facts['vocabulary']:,}",
        parameters=facts["parameters"], version=version,
        weights=facts["weights"], origin=_imported(facts) if training is None else _trained(training), recipe=recipe,
        command=command(model.kind, shlex.quote(printable(name)), tokenizer.pairs, tokenizer.rate > 0),
        folder=shlex.quote(printable(name)),
        numbers=_numbers(model, tokenizer), script=torch_script.script(facts, tokenizer.sep),
    )  # fmt: skip


def _numbers(model: ModelConfig, tokenizer: Tokenizer) -> str:
    """What stands for what in the script."""
    read = f"`tokens` are numbers of tokenizer.json, of kind {tokenizer.kind}."
    if model.features:
        read = "`frames` are log-mel spectra, as tokenizer.json says."
    return read + " Labels are in the order of its `labels`." * (model.kind in blocks.LABELLED)


def _imported(facts: dict[str, Any]) -> str:
    return f"Imported from a state dict of PyTorch, {label(facts['imported'])}."


def _trained(training: dict[str, Any]) -> str:
    """A table of what is known of the training."""
    averaged, corpus, tokens = training["averaged"], training["corpus"], training["tokens"]
    rows = {
        "steps": f"{training['step']:,}" + (f", mean of the last {averaged} checkpoints" if averaged > 1 else ""),
        "tokens seen": "unknown" if tokens is None else f"{tokens:,}",
        "corpus, sha256 of its manifest": f"`{corpus}`" if corpus else "unknown",
    }
    for number, entry in enumerate(training.get("earlier", []), 1):
        name, count = f"`{entry['corpus']}`" if entry["corpus"] else "unknown", entry["tokens"]
        rows[f"trained before on corpus {number}"] = name + (f", {count:,} of the tokens" if count else "")
    for entry in training["measured"]:
        what = f"perplexity on its {label(entry['split'])} split, {entry['tokens']:,} tokens"
        rows[what] = f"{entry['after']:.4g} ({entry['before']:.4g} as trained)"
    return "\n".join(["| | |", "| --- | --- |", *(f"| {name} | {value} |" for name, value in rows.items())])


def _recipe(sections: dict[str, Any]) -> str:
    """The settings of a run as TOML, in a block of code."""
    lines = tomli_w.dumps(sections).split("\n")  # strings have no lines of their own there, so none begins with ```
    return "\n".join(["```toml", *map(printable, lines[:-1]), "```"])
