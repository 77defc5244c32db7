"""What transformers reads of a model folder beside the weights: its keys of config.json, modeling_dllm.py, and tokenizer.json
in the form of the `tokenizers` library, which gives the same numbers as dllm.

They are the same with these exceptions, which `differences` tells of a tokenizer:

    word            dllm ends a text that does not end with a line by <eos>; here a text is taken as a prompt is, without it
    char, word      without <unk>, what is not in the vocabulary is an exception of the library's
    bpe             dllm cuts texts of more than BLOCK characters behind a line, where a pre-token could have gone on
    pairs           <sep> and <end> must have a spelling here; transformers is told not to look for it in texts, others are not

A batch needs a token for padding. It has the number behind the vocabulary, and the model never says it.
"""

from __future__ import annotations

import json
import pathlib
import sys
from collections.abc import Mapping
from typing import Any

from ..config import ModelConfig
from ..data import tokenizers
from ..data.pretokens import BLOCK, letters
from ..data.tokenizer import Tokenizer
from ..data.tokenizers import END_OF_LINE, UNKNOWN, UnitTokenizer

TOKENIZER, MODELING = "tokenizer.json", "modeling_dllm.py"
FILES = (TOKENIZER, "tokenizer_config.json", "generation_config.json", MODELING)  # that a folder may have for transformers
SEP, END, PAD = "<|sep|>", "<|end|>", "<|pad|>"
Json = dict[str, Any]


def is_causal(model: ModelConfig, weights: str) -> bool:
    """Whether transformers loads a model: one of text, whose weights are no int8."""
    return model.kind == "lm" and weights != "int8"


def is_text(tokenizer: Tokenizer) -> bool:
    """Whether a tokenizer has the library's form."""
    return tokenizer.kind in ("byte", "char", "word", "bpe")


def files(model: ModelConfig, tokenizer: Tokenizer, weights: str) -> dict[str, bytes]:
    """File name -> bytes of what a model folder holds for transformers."""
    found, causal = dict[str, Json](), is_causal(model, weights)
    if is_text(tokenizer):
        found[TOKENIZER] = tokenizers_form(tokenizer, model.kind == "lm")
        found["tokenizer_config.json"] = _tokenizer_config(tokenizer)
    if causal:
        never = [token for token in (tokenizer.unknown, tokenizer.sep) if token is not None]
        ends = {} if tokenizer.end is None else {"eos_token_id": tokenizer.end}
        found["generation_config.json"] = {
            "pad_token_id": tokenizer.size,
            **ends,
            **({"suppress_tokens": never} if never else {}),
        }
    written = {name: f"{json.dumps(value, indent=1, ensure_ascii=False)}\n".encode() for name, value in found.items()}
    return written | ({MODELING: pathlib.Path(__file__).with_name(MODELING).read_bytes()} if causal else {})


def keys(model: ModelConfig, tokenizer: Tokenizer, weights: str) -> Json:
    """What config.json says to transformers; {} where it does not load such a model."""
    if not is_causal(model, weights):
        return {}
    classes = {"AutoConfig": "DllmConfig", "AutoModelForCausalLM": "DllmForCausalLM"}
    return {
        "model_type": "dllm-lstm", "architectures": [classes["AutoModelForCausalLM"]],
        "auto_map": {auto: f"{pathlib.Path(MODELING).stem}.{name}" for auto, name in classes.items()},
        "vocab_size": tokenizer.size, "embedding_size": model.embedding, "hidden_size": model.hidden,
        "num_hidden_layers": model.layers, "tie_word_embeddings": model.tied,
        "dtype": "float32",  # of products, as in dllm; bfloat16 that is stored is read as such
    } | ({} if tokenizer.end is None else {"eos_token_id": tokenizer.end})  # fmt: skip


def spellings(tokenizer: Tokenizer) -> tuple[str, str, str]:
    """What <sep>, <end> and padding are called: as nothing in the vocabulary is."""
    taken, found = _model(tokenizer)["vocab"], list[str]()
    for name in (SEP, END, PAD):
        while name in taken:
            name = f"<{name}>"
        found.append(name)
    return found[0], found[1], found[2]


def differences(tokenizer: Tokenizer) -> list[str]:
    """Sentences: where the library gives other numbers than dllm."""
    found = list[str]()
    if tokenizer.kind == "word" and not tokenizer.pairs:
        found.append("A text that does not end with a line gets no `<eos>` behind it, which dllm puts there in a corpus.")
        found.append("A pipeline of transformers 5 puts the first new word right behind the prompt: end that with a space.")
    if isinstance(tokenizer, UnitTokenizer) and tokenizer.unknown is None:
        found.append(f"A {tokenizer.unit} that is not in the vocabulary raises an exception.")
    if tokenizer.kind == "bpe":
        found.append(f"dllm cuts texts of more than {BLOCK:,} characters behind a line, and numbers there may differ.")
    if tokenizer.pairs:
        sep, end, _ = (f"`{name}`" for name in spellings(tokenizer))
        found.append(f"The `tokenizers` library alone takes {sep} and {end} in a text for tokens; transformers does not.")
    return found


def tokenizers_form(tokenizer: Tokenizer, framed: bool = True) -> Json:
    """tokenizer.json of the `tokenizers` library.

    framed : of pairs, a text alone is a source that asks for its target: <end> source <sep>. Else it is only the source
    """
    sep, end, _ = spellings(tokenizer)
    numbers = {sep: tokenizer.sep, end: tokenizer.end} if tokenizer.pairs else {}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {
        "version": "1.0", "truncation": None, "padding": None,
        "added_tokens": [{"id": number, "content": name, **flags} for name, number in numbers.items()],
        **_steps(tokenizer),
        "post_processor": _frame(sep, end, numbers, framed) if tokenizer.pairs else None,
        "model": _model(tokenizer),
    }  # fmt: skip


def read_tokenizers_form(value: Mapping[str, Any]) -> Json:
    """What dllm's own tokenizer.json would say, of one that `tokenizers_form` gave and transformers may have saved again.

    Raises ValueError where it is none. The vocabulary is not checked: `tokenizers.load` does that.
    """
    try:
        model, kind = value["model"], _kind(value)
        own: Json = {"kind": kind}
        if kind in ("char", "word"):
            own["units"] = sorted(model["vocab"], key=model["vocab"].__getitem__)
            if [model["vocab"][unit] for unit in own["units"]] != [*range(len(own["units"]))]:
                raise KeyError("a number that is missing")
        elif kind == "bpe":
            own["model"] = {"model": model}
        if (value["post_processor"] or {}).get("special_tokens"):
            own["pairs"] = True
        return own
    except (LookupError, TypeError, AttributeError):
        raise ValueError("it is no tokenizer that dllm wrote for transformers") from None


def _kind(value: Mapping[str, Any]) -> str:
    """The kind of the tokenizer that has such steps. Raises KeyError where there is none."""
    same = ("normalizer", "pre_tokenizer", "decoder")
    bare = (tokenizers.ByteTokenizer(), *(cls([UNKNOWN]) for cls in (tokenizers.CharTokenizer, tokenizers.WordTokenizer)))
    known = [(one.kind, _steps(one), _model(one)["type"]) for one in bare] + [("bpe", _byte_level(True), "BPE")]
    found = {json.dumps([[steps[name] for name in same], model]): kind for kind, steps, model in known}
    return found[json.dumps([[value[name] for name in same], value["model"]["type"]])]


def _model(tokenizer: Tokenizer) -> Json:
    """Its vocabulary, and what is merged."""
    if isinstance(tokenizer, UnitTokenizer):
        return {"type": "WordLevel", "vocab": tokenizer.numbers, "unk_token": UNKNOWN}
    blank = {
        "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None, "end_of_word_suffix": None,
        "fuse_unk": False, "byte_fallback": False, "ignore_merges": False,
    }  # fmt: skip
    if tokenizer.kind == "bpe":
        own: Json = tokenizer.vocabulary()["model"]["model"]
        return blank | own
    return blank | {"vocab": letters() if tokenizer.kind == "byte" else {}, "merges": []}


def _steps(tokenizer: Tokenizer) -> Json:
    """How a text is cut, and tokens become one again."""
    if tokenizer.kind == "char":
        return {"normalizer": None, "pre_tokenizer": _split(r"[\s\S]", "Isolated"), "decoder": {"type": "Fuse"}}
    if tokenizer.kind == "word":
        blank = "".join(f"\\x{{{point:x}}}" for point in range(sys.maxunicode + 1) if chr(point).isspace())
        steps = [
            _replace({"Regex": rf"\A{END_OF_LINE}\z"}, "\n"),
            {"type": "WordPiece", "prefix": " ", "cleanup": False},  # a space before each but the first
            {"type": "Fuse"},
            _replace({"String": " \n"}, "\n"),
            _replace({"String": "\n "}, "\n"),
        ]
        return {
            "normalizer": _replace({"String": "\n"}, f" {END_OF_LINE} "),
            "pre_tokenizer": _split(f"[{blank}]+", "Removed"),  # Python's white space: the library has less of it
            "decoder": {"type": "Sequence", "decoders": steps},
        }
    return _byte_level(tokenizer.kind == "bpe")


def _byte_level(regex: bool) -> Json:
    """Letters for bytes. regex : words are not merged with each other"""
    step = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": regex}
    return {"normalizer": None, "pre_tokenizer": step, "decoder": step | {"add_prefix_space": True, "use_regex": True}}


def _split(pattern: str, behavior: str) -> Json:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": behavior, "invert": False}


def _replace(pattern: Json, content: str) -> Json:
    return {"type": "Replace", "pattern": pattern, "content": content}


def _frame(sep: str, end: str, numbers: Mapping[str, int | None], framed: bool) -> Json:
    """What is put around a source, and around a source and its target."""
    tokens = {name: {"SpecialToken": {"id": name, "type_id": 0}} for name in numbers}
    source, target = ({"Sequence": {"id": name, "type_id": 0}} for name in "AB")
    return {
        "type": "TemplateProcessing",
        "single": [tokens[end], source, tokens[sep]] if framed else [source],
        "pair": [tokens[end], source, tokens[sep], target, tokens[end]],
        "special_tokens": {name: {"id": name, "ids": [number], "tokens": [name]} for name, number in numbers.items()},
    }


def _tokenizer_config(tokenizer: Tokenizer) -> Json:
    sep, end, pad = spellings(tokenizer)
    return {
        "tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, "padding_side": "left",
        "model_input_names": ["input_ids", "attention_mask"],
        "split_special_tokens": True,  # in a text they are text
        "pad_token": pad,
        **({"sep_token": sep, "eos_token": end} if tokenizer.pairs else {}),
        **({} if tokenizer.unknown is None else {"unk_token": UNKNOWN}),
    }  # fmt: skip
