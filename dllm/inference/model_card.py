"""The README.md of a model folder, made of its config.json: where the model comes from, and how PyTorch loads it."""

from __future__ import annotations

import re
import shlex
from typing import Any

import tomli_w

from ..data.tokenizers import Tokenizer
from ..errors import printable

CARD = """---
license: other  # yours to choose: the text that a model was trained on may have a say in it
library_name: pytorch
tags: [lstm, language-model, dllm]
---

# {name}

{kind}, {parameters:,} parameters, weights in {weights}. Made by dllm {version}.

{origin}

## Use

    python -m dllm.generate {folder} {question}
    mpirun -n 2 python -m dllm.evaluate {folder} --data DIR

In PyTorch, without dllm:

```python
{script}
```

`tokens` are numbers of tokenizer.json, of kind {tokenizer}.

## Licence

To be filled in by whoever publishes this model.
{recipe}"""

HEAD = """import json, torch
from safetensors.torch import load_file

model = json.load(open("config.json"))["model"]
V, E, H, L = {V}, model["embedding"], model["hidden"], model["layers"]
weights = load_file("model.safetensors")"""
DEQUANTISE = """scales = {name: weights.pop(name + ".scale") for name in list(weights) if name + ".scale" in weights}
weights |= {name: weights[name].float() * scale[:, None] for name, scale in scales.items()}"""
TIED = """weights["output.weight"] = weights["embedding.weight"]"""
TAIL = """module = torch.nn.ModuleDict({{{embedding}"lstm": torch.nn.LSTM({D}, H, L), "output": torch.nn.Linear(H, V)}})
module.load_state_dict(weights, strict=True)
tokens = torch.tensor([[0], [1]])  # (time, lanes)
logits = module["output"](module["lstm"]({x})[0])  # (time, lanes, V): of the token that follows"""


def script(facts: dict[str, Any]) -> str:
    """The lines of Python that load the folder into torch.nn."""
    model = facts["model"]
    one_hot = not model["embedding"]
    lines = [HEAD.format(V=facts["vocabulary"])]
    lines += [DEQUANTISE] * (facts["weights"] == "int8") + [TIED] * model["tied"]
    return "\n".join([
        *lines,
        TAIL.format(
            embedding="" if one_hot else '"embedding": torch.nn.Embedding(V, E), ',
            D="V" if one_hot else "E",
            x="torch.nn.functional.one_hot(tokens, V).float()" if one_hot else 'module["embedding"](tokens)',
        ),
    ])  # fmt: skip


def question(tokenizer: Tokenizer) -> str:
    """The option of dllm.generate for a model of that tokenizer."""
    return '--source "..."' if tokenizer.pairs else '--prompt "..."'


def label(name: str) -> str:
    """A name as Markdown that shows it and does nothing else: no HTML, no link, no new line, no cell of a table."""
    if re.fullmatch(r"(?!www\.)[A-Za-z0-9][A-Za-z0-9 ._-]*", name):
        return name
    return f"`{printable(name).replace('`', chr(39)).replace('|', '/'):.300}`"


def text(name: str, facts: dict[str, Any], tokenizer: Tokenizer, version: str) -> str:
    """The model card of `facts`, a config.json."""
    model = facts["model"]
    inputs = f"embedding of {model['embedding']}" if model["embedding"] else "one-hot inputs"
    kind = f"LSTM language model: {inputs}{', tied to the output' * model['tied']}, {model['layers']} x {model['hidden']}"
    training = facts.get("training")
    recipe = "" if training is None else f"\n## Recipe\n\n{_recipe(training['recipe'])}\n"
    return CARD.format(
        name=label(name), folder=shlex.quote(printable(name)), kind=kind + f", vocabulary of {facts['vocabulary']:,}",
        parameters=facts["parameters"], version=version,
        weights=facts["weights"], origin=_imported(facts) if training is None else _trained(training), recipe=recipe,
        tokenizer=tokenizer.kind, question=question(tokenizer), script=script(facts),
    )  # fmt: skip


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
