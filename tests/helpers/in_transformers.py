"""What transformers makes of model folders: run by the tests with PYTHONPATH at an environment, without dllm.

python in_transformers.py JOBS.json: a list of arguments of `look`; JOBS.found gets what was found.
"""

import contextlib
import hashlib
import io
import json
import os
import pathlib
import re
import sys
import warnings
from copy import deepcopy

import torch
import transformers
from huggingface_hub import ModelCard
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline


def main(jobs):
    transformers.logging.set_verbosity_error()
    torch.set_grad_enabled(False)
    torch.set_num_threads(1)
    return [look(**job) for job in jobs]


def look(folder, texts, tokens, prompts, new, saved):
    """Of one folder. texts : to be encoded; tokens : of which there are logits; prompts : two, to go on from by `new` tokens"""
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    found = {"ids": [numbers(tokenizer, text) for text in texts], "size": len(tokenizer), "pad": tokenizer.pad_token_id}
    found["card"] = ModelCard.load(pathlib.Path(folder, "README.md")).data.to_dict()
    if tokens is None:
        return found
    with warnings.catch_warnings(record=True) as complaints:
        model, loading = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, output_loading_info=True)
    found |= {"complaints": [str(one.message) for one in complaints], "loading": {k: list(v) for k, v in loading.items() if v}}
    found["logits"] = model(torch.tensor([tokens])).logits[0].tolist()
    found |= generated(model, tokenizer, prompts, new)
    found["loss"] = float(model(torch.tensor([tokens]), labels=torch.tensor([tokens])).loss)
    found["falls"] = falls(model, tokens)
    found["padded"] = padded(model, tokens)
    model.save_pretrained(saved)
    tokenizer.save_pretrained(saved)
    again = AutoModelForCausalLM.from_pretrained(saved, trust_remote_code=True)
    found["same"] = hashed(again) == hashed(model)
    reloaded = AutoTokenizer.from_pretrained(saved, trust_remote_code=True)
    found["ids_again"] = [numbers(reloaded, text) for text in texts]
    found["printed"] = card_printed(folder)
    return found


def numbers(tokenizer, text):
    try:
        return tokenizer(text, add_special_tokens=False)["input_ids"]
    except Exception as error:
        return str(error)


def hashed(model):
    """Of all values, to the bit."""
    return {name: hashlib.sha256(value.numpy().tobytes()).hexdigest() for name, value in model.state_dict().items()}


def generated(model, tokenizer, prompts, new):
    """Greedily with the state as a cache, in a batch with pads, by whole passes; what a beam search says of its own result."""
    greedy = {"max_new_tokens": new, "do_sample": False}
    alone = [model.generate(**tokenizer(prompt, return_tensors="pt"), **greedy)[0].tolist() for prompt in prompts]
    lengths = [len(tokenizer(prompt)["input_ids"]) for prompt in prompts]
    batch = tokenizer(prompts, return_tensors="pt", padding=True)
    width = batch["input_ids"].shape[1]
    together = model.generate(**batch, **greedy)[:, width:].tolist()
    torch.manual_seed(1)
    drawn = model.generate(**batch, max_new_tokens=new, do_sample=True, top_p=0.9, num_return_sequences=2)
    beams = model.generate(
        **tokenizer(prompts[0], return_tensors="pt"), max_new_tokens=new, min_new_tokens=new, do_sample=False, num_beams=4,
        length_penalty=0.0, return_dict_in_generate=True, output_scores=True,
    )  # fmt: skip
    text = pipeline("text-generation", model=model, tokenizer=tokenizer)(prompts[0], **greedy)[0]["generated_text"]
    return {
        "greedy": [row[length:] for row, length in zip(alone, lengths, strict=True)], "together": together,
        "drawn": drawn[:, width:].tolist(), "pipeline": text,
        "decoded": [tokenizer.decode(alone[0][start:], skip_special_tokens=True) for start in (0, lengths[0])],
        "beam": beams.sequences[0].tolist(), "prompt": lengths[0], "score": float(beams.sequences_scores[0]),
    }  # fmt: skip


def falls(model, tokens):
    """Whether steps of gradient descent on labels make the loss of a copy smaller."""
    copy, losses = deepcopy(model), []
    with torch.enable_grad():
        optimizer = torch.optim.SGD(copy.parameters(), lr=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            loss = copy(torch.tensor([tokens]), labels=torch.tensor([tokens])).loss
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
    return losses == sorted(losses, reverse=True) and losses[0] > losses[-1]


def padded(model, tokens):
    """The greatest difference that pads on either side make to logits."""
    short, worst = tokens[: len(tokens) // 2], 0.0
    alone, pads = model(torch.tensor([short])).logits[0], [model.config.vocab_size] * (len(tokens) - len(short))
    whole, ones = model(torch.tensor([tokens])).logits[0], [1] * len(short)
    for left in (False, True):
        row, mask = (pads + short, [0] * len(pads) + ones) if left else (short + pads, ones + [0] * len(pads))
        logits = model(torch.tensor([row, tokens]), attention_mask=torch.tensor([mask, [1] * len(tokens)])).logits
        mine = logits[0, len(pads) :] if left else logits[0, : len(short)]
        worst = max(worst, float((mine - alone).abs().max()), float((logits[1] - whole).abs().max()))
    return worst


def card_printed(folder):
    """What the lines of the card print, run as they stand in the folder."""
    script = next(
        block for block in re.findall("```python\n(.*?)```", pathlib.Path(folder, "README.md").read_text(), re.S)
        if "from transformers" in block
    )  # fmt: skip
    with contextlib.chdir(folder), contextlib.redirect_stdout(io.StringIO()) as out:
        names = {}
        exec(script, names)
    return {"text": out.getvalue(), "inputs": names["inputs"]["input_ids"][0].tolist(), "pair": names.get("pair")}


if __name__ == "__main__":
    found = main(json.loads(pathlib.Path(sys.argv[1]).read_text()))
    pathlib.Path(sys.argv[1]).with_suffix(".found").write_text(
        json.dumps({"version": transformers.__version__, "found": found})
    )
    os._exit(0)  # nothing is left to be done, and torch takes its time
