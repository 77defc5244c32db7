"""The README.md of a model folder, made of its config.json: where the model comes from, and how others load it.

What stands between --- is YAML for Hugging Face's pages: https://huggingface.co/docs/hub/model-cards.
"""

from __future__ import annotations

import json
import math
import re
import shlex
from typing import Any

import tomli_w

from ..config import ModelConfig
from ..data.tokenizers import Tokenizer
from ..errors import UserError, printable
from ..exchange import hugging_face
from ..model import blocks
from . import torch_script

CARD = """---
license: other  # yours to choose: the text that a model was trained on may have a say in it
{metadata}
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

{transformers}

## Licence

To be filled in by whoever publishes this model.
{recipe}"""

WHAT = {
    "lm": "LSTM language model", "bilm": "LSTM language models of both directions", "tagger": "LSTM tagger",
    "seq2seq": "LSTM encoder and decoder with attention", "classifier": "LSTM classifier", "ctc": "LSTM speech recogniser",
}  # fmt: skip
TAGS = {"seq2seq": "translation", "tagger": "token-classification", "classifier": "text-classification"}
TAGS |= {"lm": "language-model", "bilm": "language-model", "ctc": "automatic-speech-recognition"}
PIPELINES = {  # of text; what Hugging Face calls what such a model does
    "lm": "text-generation", "seq2seq": "translation", "tagger": "token-classification", "classifier": "text-classification",
}  # fmt: skip
YOURS = "  # language and datasets are yours to say: of its corpus the folder knows the sha256 only"
OF_SOUND = {"classifier": "audio-classification", "ctc": "automatic-speech-recognition"}
TRANSFORMERS = """In transformers, 4.57 or later, without dllm. It runs `modeling_dllm.py` of this folder:

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(".", trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained(".", trust_remote_code=True)
inputs = tokenizer({prompt}, return_tensors="pt"){says}
tokens = model.generate(**inputs, max_new_tokens=40, do_sample={sample})
print(tokenizer.decode({tokens}, skip_special_tokens=True)){pair}
```"""
OF_LEVELS = """transformers, 4.57 or later, runs `modeling_dllm.py` of this folder: the model is loaded by
`AutoModelForCausalLM.from_pretrained(".", trust_remote_code=True)`.
There is no tokenizer for it, since tokens are levels of sound."""
PAIR = """
pair = tokenizer({prompt}, {prompt})["input_ids"]  # {end} source {sep} target {end}"""
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
        name=label(name), kind=kind + f", vocabulary of {facts['vocabulary']:,}",
        metadata=_metadata(name, facts, model, tokenizer),
        parameters=facts["parameters"], version=version,
        weights=facts["weights"], origin=_imported(facts) if training is None else _trained(training), recipe=recipe,
        command=command(model.kind, shlex.quote(printable(name)), tokenizer.pairs, tokenizer.rate > 0),
        folder=shlex.quote(printable(name)),
        numbers=_numbers(model, tokenizer), transformers=_transformers(model, tokenizer, facts["weights"]),
        script=torch_script.script(facts, tokenizer.sep),
    )  # fmt: skip


def _numbers(model: ModelConfig, tokenizer: Tokenizer) -> str:
    """What stands for what in the script."""
    read = f"`tokens` are numbers of dllm_tokenizer.json, of kind {tokenizer.kind}."
    if model.features:
        read = "`frames` are log-mel spectra, as dllm_tokenizer.json says."
    return read + " Labels are in the order of its `labels`." * (model.kind in blocks.LABELLED)


def _metadata(name: str, facts: dict[str, Any], model: ModelConfig, tokenizer: Tokenizer) -> str:
    """What Hugging Face's pages search for, as YAML: names in it are of letters, digits and the like alone."""
    causal = hugging_face.is_causal(model, facts["weights"])
    lines = [f"library_name: {'transformers' if causal else 'pytorch'}", f"tags: [lstm, {TAGS[model.kind]}, dllm]{YOURS}"]
    pipelines = PIPELINES if hugging_face.is_text(tokenizer) else OF_SOUND
    lines += [f"pipeline_tag: {pipelines[model.kind]}"] if model.kind in pipelines else []
    measured = [entry for entry in (facts.get("training") or {}).get("measured", []) if math.isfinite(entry["after"])]
    if measured:
        lines += ["model-index:", f"- name: {_plain(name)}", "  results:"]
    for entry in measured:
        lines += [
            "  - task: {type: text-generation}",
            f"    dataset: {{type: dllm-corpus, name: {_plain(entry['corpus'])}, split: {_plain(entry['split'])}}}",
            f"    metrics: [{{type: perplexity, name: Perplexity, value: {float(entry['after'])!r}}}]",
        ]
    return "\n".join(lines)


def _plain(name: str) -> str:
    """A name in quotes, as YAML."""
    return json.dumps(re.sub(r"[^A-Za-z0-9 ._-]", "_", name)[:100])


def _transformers(model: ModelConfig, tokenizer: Tokenizer, weights: str) -> str:
    """How transformers makes tokens of a text and generates, or why it does not."""
    text = hugging_face.is_text(tokenizer)
    if hugging_face.is_causal(model, weights):
        if not text:
            return OF_LEVELS
        sep, end, _ = hugging_face.spellings(tokenizer)
        prompt, pairs = ascii(_example(tokenizer)), tokenizer.pairs
        lines = TRANSFORMERS.format(
            prompt=prompt, says=f"  # {end} source {sep}" * pairs, sample=not pairs,
            tokens='tokens[0, inputs["input_ids"].shape[1] :]' if pairs else "tokens[0]",
            pair=PAIR.format(prompt=prompt, sep=sep, end=end) if pairs else "",
        )  # fmt: skip
    elif text:
        why = "no weights of int8" if model.kind == "lm" else "no model of this kind"
        lines = f"transformers loads {why}. `AutoTokenizer.from_pretrained` reads the tokenizer."
    else:
        return "transformers does not load this model."
    return "\n\n".join([lines, *[" ".join(hugging_face.differences(tokenizer))] * bool(hugging_face.differences(tokenizer))])


def _example(tokenizer: Tokenizer) -> str:
    """A text that the vocabulary has tokens for."""
    try:
        text = "Once upon a time"
        return text if tokenizer.encode(text.encode(), end=False).size else ""
    except UserError:
        return tokenizer.decode_text(range(min(8, tokenizer.text_size))).decode(errors="replace")


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
