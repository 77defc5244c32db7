"""Small model folders and state dicts for tests, and commands run one after another in one process."""

from dataclasses import replace

import numpy as np

from dllm.config import Config, ModelConfig
from dllm.data.sound_tokenizers import MelTokenizer
from dllm.data.tokenizers import CharTokenizer
from dllm.files import safetensors
from dllm.inference import model_folder
from dllm.model import blocks, torch_weights
from dllm.model.kinds import make_model
from dllm.model.layout import Layout
from helpers.numerics import V, build, configured, reference
from helpers.several_commands import run_several

TOKENIZER = CharTokenizer(list("abcdefghijk\n")[-V:])


def make(out, kind="untied", stored="fp32", tokenizer=TOKENIZER, **changes):
    """A model folder with random parameters. Returns its LanguageModel, of one lane."""
    config = configured(kind, **changes)
    model = build(config, lanes=1, dtype=np.float32, training=False)
    data = safetensors.pack(torch_weights.encode(torch_weights.read_vector(model.layout, model.theta), stored))
    facts = model_folder.describe(Config(model=config), tokenizer, stored, data) | {"imported": "nothing"}
    model_folder.write(out, data, tokenizer, facts)
    return model


def logits(model, tokens):
    """(T,V), float64, of the tokens that follow each of `tokens` (T,), from a state of zeros."""
    return reference(model, tokens[:, None])[0][:, 0]


def commands(folder, *lines, cwd):
    """(exit code, what it wrote) of commands, as one types them after `dllm`, in one process."""
    parts = [line.split() for line in lines]
    words = [[f"dllm.{'import_' if name == 'import' else name}", *rest] for name, *rest in parts]
    return [(*end.codes, end.text) for end in run_several(folder, 0, words, cwd=cwd, timeout=200)]


def make_kind(out, shape, stored="fp32", labels=("A", "B", "C")):
    """The same of any kind, of a model of 11 characters, or of <sep> and <end> too. Returns its Model, of one lane."""
    config = ModelConfig(**{"embedding": 4, "hidden": 16} | shape)
    tokenizer = MelTokenizer(bands=config.features) if config.features else CharTokenizer(list("abcdefghijk"))
    tokenizer.pairs = config.kind == "seq2seq"
    if config.kind in blocks.LABELLED:
        tokenizer.labels, config = tuple(labels), replace(config, labels=len(labels))
    layout = Layout(config, tokenizer.size, np.float32)
    theta = np.zeros(layout.size, np.float32)
    layout.load(theta, 0, np.random.default_rng(5).uniform(-0.6, 0.6, layout.parameters).astype(np.float32))
    data = safetensors.pack(torch_weights.encode(torch_weights.read_vector(layout, theta), stored))
    facts = model_folder.describe(Config(model=config), tokenizer, stored, data) | {"imported": "nothing"}
    model_folder.write(out, data, tokenizer, facts)
    return make_model(layout, 16, 1, theta=theta, training=False)
