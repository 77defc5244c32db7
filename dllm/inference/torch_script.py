"""The lines of Python that load a model folder into torch.nn, and compute what its model says: for its README.md."""

from __future__ import annotations

from typing import Any

from ..config import ModelConfig
from ..model import blocks

LOAD = """import torch
from safetensors.torch import load_file

weights = load_file("model.safetensors")"""
DEQUANTISE = """scales = {name: weights.pop(name + ".scale") for name in list(weights) if name + ".scale" in weights}
weights |= {name: weights[name].float() * scale[:, None] for name, scale in scales.items()}"""
TIED = """weights["output.weight"] = weights["embedding.weight"]"""
MODULE = """module = torch.nn.ModuleDict({{{parts}}})
module.load_state_dict(weights, strict=True)"""
MODULES = """module = {{{parts}}}
for name, part in module.items():
    own = {{key.removeprefix(name + "."): value for key, value in weights.items() if key.startswith(name + ".")}}
    part.load_state_dict(own, strict=True)"""
NOT_IN_A_DICT = {"forward", "keys"}  # names that a ModuleDict has for itself
TOKENS = "torch.tensor([[0], [1]])"
SOURCE = "tokens, lengths = torch.tensor([[0], [1]]), torch.tensor([2])  # (time, lanes), (lanes,)"
FRAMES = "frames, lengths = torch.zeros(2, 1, {F}), torch.tensor([2])  # (time, lanes, features), (lanes,)"
LM = """logits = module["output"](module["lstm"]({x})[0])  # (time, lanes, V): of the token that follows"""
BOTH = """x = module["embedding"](tokens)
logits = module["output"](module["forward"](x)[0])  # (time, lanes, V): of the token that follows
logits_before = module["output"](module["backward"](x.flip(0))[0]).flip(0)  # of the one before"""
ENCODE = """packed = torch.nn.utils.rnn.pack_padded_sequence({x}, lengths, enforce_sorted=False)
m, (ends, _) = module["encoder"](packed)
m, there = torch.nn.utils.rnn.pad_packed_sequence(m)[0], torch.arange({longest})[:, None] < lengths"""
POOLS = {
    "max": "m.masked_fill(~there[..., None], -torch.inf).amax(0)",
    "mean": "m.sum(0) / lengths[:, None]",
    "last": "torch.cat([*ends[-{D}:]], 1)",
}
ATTEND = """first = torch.tanh(module["bridge"](torch.cat([*ends[-{D}:]], 1)))[None]
state = first, torch.zeros_like(first)
before = torch.tensor([[{sep}]])  # (time, lanes): <sep> and the target, as far as it is known
h, _ = module["decoder"][0](module["embedding"](before), state)
scores = torch.einsum("tbh,sbh->bts", h, {k}).masked_fill(~there.T[:, None], -torch.inf)
context = torch.einsum("bts,sbm->tbm", scores.softmax(2), m)"""
ABOVE = """h = torch.cat([h, context], 2)
for lstm in module["decoder"][1:]:
    h, _ = lstm(h, state)"""
LOGITS = """logits = module["output"](torch.tanh(module["combine"](torch.cat([h, context], 2))))  # of the next token"""

COPY = """gate = torch.sigmoid(module["gate"](torch.cat([h, context], 2)))  # how much of the softmax there is
sources = torch.nn.functional.one_hot(tokens, {V}).float()  # of which the attention copies
copied = torch.einsum("bts,sbv->tbv", scores.softmax(2), sources)
logits = torch.log(gate * logits.softmax(2) + (1 - gate) * copied)"""


def script(facts: dict[str, Any], sep: int | None) -> str:
    """The lines. facts : a config.json; sep : the token before a target"""
    config, vocabulary = ModelConfig(**facts["model"]), facts["vocabulary"]
    lines = [LOAD, *[DEQUANTISE] * (facts["weights"] == "int8"), *[TIED] * config.tied]
    modules = _modules(config, vocabulary)
    parts = ", ".join(f'"{name}": {module}' for name, module in modules.items())
    lines.append((MODULES if NOT_IN_A_DICT & {*modules} else MODULE).format(parts=parts))
    return "\n".join([*lines, *_use(config, vocabulary, sep)])


def _modules(config: ModelConfig, vocabulary: int) -> dict[str, str]:
    """Name -> what makes the module of torch.nn, in the order in which they are used."""
    E, H, M, found = config.embedding, config.hidden, blocks.memory(config), dict[str, str]()
    if E and not config.features:
        found["embedding"] = f"torch.nn.Embedding({vocabulary}, {E})"
    if config.kind in ("lm", "bilm"):
        for name in ("lstm",) if config.kind == "lm" else ("forward", "backward"):
            found[name] = f"torch.nn.LSTM({E or vocabulary}, {H}, {config.layers})"
    else:
        layers = config.encoder_layers if config.kind == "seq2seq" else config.layers
        both = ", bidirectional=True" * config.bidirectional
        found["encoder"] = f"torch.nn.LSTM({config.features or E}, {H}, {layers}{both})"
    above = [f"torch.nn.LSTM({H + M if layer == 1 else H}, {H})" for layer in range(1, config.layers)]
    for block in reversed(blocks.between(config)):
        if isinstance(block, blocks.Dense):
            found[block.name] = f"torch.nn.Linear({block.inputs}, {block.units}, bias=False)"
        elif block.name == "decoder.0":
            found["decoder"] = f"torch.nn.ModuleList([{', '.join([f'torch.nn.LSTM({E}, {H})', *above])}])"
    found["output"] = f"torch.nn.Linear({blocks.top(config)}, {blocks.outputs(config, vocabulary)})"
    return found


def _use(config: ModelConfig, vocabulary: int, sep: int | None) -> list[str]:
    """What computes logits."""
    embedded = 'module["embedding"](tokens)'
    if config.kind in ("lm", "bilm"):
        x = embedded if config.embedding else f"torch.nn.functional.one_hot(tokens, {vocabulary}).float()"
        return [f"tokens = {TOKENS}  # (time, lanes)", LM.format(x=x) if config.kind == "lm" else BOTH]
    inputs = FRAMES.format(F=config.features) if config.features else SOURCE
    encode = ENCODE.format(x="frames" if config.features else embedded, longest="int(lengths.max())")
    directions = len(blocks.directions(config))
    if config.kind == "seq2seq":
        keys = 'module["keys"](m)' if config.attention == "general" else "m"
        attend = ATTEND.format(D=directions, sep=sep, k=keys)
        copy = [COPY.format(V=vocabulary)] * config.copy
        return [inputs, encode, attend, *[ABOVE] * (config.layers > 1), LOGITS, *copy]
    pooled = POOLS[config.pool].format(D=directions) if config.kind == "classifier" else "m"
    top = f'torch.tanh(module["projection"]({pooled}))' if config.projection else pooled
    what = {
        "tagger": "(time, lanes, labels): on the first token of a word", "classifier": "(lanes, labels)",
        "ctc": "(time, lanes, labels + 1): the last one says nothing",
    }  # fmt: skip
    return [inputs, encode, f'logits = module["output"]({top})  # {what[config.kind]}']
