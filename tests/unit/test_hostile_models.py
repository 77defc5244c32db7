"""Model folders that are damaged, that lie or are made to harm: refused in one line, exit code 2, before much is read."""

import hashlib
import json
import os
import re
import tomllib

import numpy as np
import pytest
from helpers.model_folders import commands, make
from helpers.several_commands import run_several

from dllm.data.tokenizers import BPETokenizer
from dllm.errors import UserError
from dllm.files import safetensors
from dllm.inference.loaded_model import LoadedModel
from dllm.model import torch_weights


def says(**facts):
    """Let config.json say something else; a fact with a dot lies in `model`."""

    def change(folder):
        path = folder / "config.json"
        known = json.loads(path.read_text())
        for name, value in facts.items():
            (known["model"] if name in known["model"] else known)[name] = value
        path.write_text(json.dumps(known))

    return change


TRAINING = {
    "step": 10, "averaged": 1, "tokens": None, "corpus": None, "measured": [], "recipe": {"log": {"prompt": "a"}},
}  # fmt: skip


def trained(**changes):
    """Let config.json say that the model was trained, and how."""

    def change(folder):
        path = folder / "config.json"
        known = json.loads(path.read_text())
        del known["imported"]
        path.write_text(json.dumps(known | {"training": TRAINING | changes}))

    return change


def sealed(folder, data):
    """Other weights, with the sha256 that they have."""
    (folder / "model.safetensors").write_bytes(data)
    says(sha256=hashlib.sha256(data).hexdigest())(folder)


def holds(**changes):
    """Let the weights be others: name (dots as __) -> function of the array, None without it."""

    def change(folder):
        stored = safetensors.read(folder / "model.safetensors")
        arrays = {name: array.copy() for name, (_, array) in stored.items()}
        for name, function in changes.items():
            name = name.replace("__", ".")
            arrays[name] = np.ascontiguousarray(function(arrays.pop(name, None)))
        sealed(folder, safetensors.pack({name: array for name, array in arrays.items() if array.dtype != object}))

    return change


def without(*names):
    return holds(**dict.fromkeys(names, lambda array: np.array(None)))


def huge(array):
    return np.copysign(np.float32(3e38), array)


def at(value):
    def put(array):
        array.flat[3] = value
        return array

    return put


def bytes_of(function):
    return lambda folder: sealed(folder, function((folder / "model.safetensors").read_bytes()))


def header(**changes):
    """Another header: tensors' names (dots as __) -> what is changed of their entries."""

    def change(data):
        size = int.from_bytes(data[:8], "little")
        entries = json.loads(data[8 : 8 + size])
        for name, entry in changes.items():
            entries[name.replace("__", ".")] |= entry
        text = json.dumps(entries).encode()
        return len(text).to_bytes(8, "little") + text + data[8 + size :]

    return bytes_of(change)


def file(name, text):
    return lambda folder: (folder / name).write_text(text)


def removed(name):
    return lambda folder: (folder / name).unlink()


def instead(name, function):
    def change(folder):
        (folder / name).unlink()
        function(folder / name)

    return change


def sparse(folder):
    """A terabyte that takes no space, with a shape that would hold it."""
    says(hidden=1 << 18, layers=1, embedding=4)(folder)
    H = 1 << 18
    size = 4 * (11 * 4 + 4 * H * 4 + 4 * H * H + 8 * H + 11 * H + 11)
    os.truncate(folder / "model.safetensors", size + 5000)


def flipped(folder):
    data = bytearray((folder / "model.safetensors").read_bytes())
    data[-5] ^= 1
    (folder / "model.safetensors").write_bytes(data)


def gap():
    """A byte-pair encoding of two tokens, one of which has a number far beyond."""
    value = {"kind": "bpe", "model": json.loads(BPETokenizer._blank().to_str())}
    value["model"]["model"]["vocab"] = {"a": 0, "b": 4_000_000_000}
    return json.dumps(value)


DEEP = "[" * 200_000
ATTACKS = {  # what is wrong: (what is done to a folder, what is said of it)
    "no config": (removed("config.json"), "cannot read .*config.json: No such file"),
    "no weights": (removed("model.safetensors"), "cannot read .*model.safetensors: No such file"),
    "no tokenizer": (removed("dllm_tokenizer.json"), "/tokenizer.json has no 'kind'"),
    "no tokenizer at all": (
        lambda folder: [(folder / name).unlink() for name in ("dllm_tokenizer.json", "tokenizer.json")],
        "cannot read .*/tokenizer.json: No such file",
    ),
    "saved by transformers": (
        lambda folder: (folder / "config.json").write_text('{"format": 1, "transformers_version": "5"}'),
        "was saved by transformers: dllm import .*safetensors --tokenizer .* --out MODEL makes a model folder of it",
    ),
    "a pipe for a config": (instead("config.json", os.mkfifo), "config.json: it is not a file"),
    "a pipe for weights": (instead("model.safetensors", os.mkfifo), "model.safetensors: it is not a file"),
    "a device for weights": (
        instead("model.safetensors", lambda path: path.symlink_to("/dev/zero")),
        "model.safetensors: it is not a file",
    ),
    "a pipe for a tokenizer": (instead("dllm_tokenizer.json", os.mkfifo), "tokenizer.json: it is not a file"),
    "config not JSON": (file("config.json", "{"), "config.json is not valid JSON"),
    "config not UTF-8": (lambda folder: (folder / "config.json").write_bytes(b'"\xff"'), "config.json is not valid JSON"),
    "config too deep": (file("config.json", DEEP), "config.json is not valid JSON"),
    "config a list": (file("config.json", "[1]"), "config.json has no 'format'"),
    "a huge number": (file("config.json", "9" * 10_000), "config.json is not valid JSON"),
    "another format": (says(format=2), "format is 2, this version of dllm reads 1"),
    "unknown weights": (says(weights="fp8"), "weights are 'fp8'"),
    "weights a list": (says(weights=[["fp32"]]), "weights are "),
    "no shape": (says(model=[1]), "model does not have embedding"),
    "more than a shape": (says(model={"embedding": 1, "hiden\nrm -rf": 2}), "model does not have embedding"),
    "wider": (says(hidden=7), r"is F32\[24, 4\] there, F32\[28, 4\] by its config.json"),
    "wider by far": (says(hidden=2**31 - 1), "the weights of its config.json take"),
    "beyond numbers": (says(hidden=10**300), r"model\.hidden = 1000.*"),
    "a shape of text": (says(hidden="6" * 5000), r"model\.hidden = '666.*"),
    "not one layer": (says(layers=0), r"model\.layers = 0: it must be at least 1"),
    "endless layers": (says(layers=2**31 - 1), r"model\.layers = 2147483647: it must be at most 1000"),
    "infinite": (says(window=float("inf")), "train.window = inf"),
    "tied": (says(tied=True), "model.tied needs"),
    "one-hot": (says(embedding=0), r"is F32\[24, 4\] there, F32\[24, 11\] by its config.json"),
    "one bias": (says(biases=1), "is not zero, but by its config.json the model has one bias"),
    "another vocabulary": (says(vocabulary=12), "tokenizer.json is not the one of its config.json"),
    "true for a format": (says(format=True), "format is True, not a whole number"),
    "a format with a point": (says(format=1.0), "format is 1.0, not a whole number"),
    "a vocabulary with a point": (says(vocabulary=11.0), "vocabulary is 11.0, not a whole number"),
    "true for parameters": (says(parameters=True), "parameters is True, not a whole number"),
    "no number of parameters": (says(parameters=float("nan")), "parameters is nan, not a whole number"),
    "other parameters": (says(parameters=5), r"parameters are 5, a model of its shape has \d+"),
    "an endless window": (says(window=2**31 - 1), r"window = 2147483647 and lanes = \d+: a model folder has at most 1,048,576"),
    "endless lanes": (says(lanes=2**31 - 1), r"lanes = 2147483647: a model folder has .* and 67,108,864 in those of all lanes"),
    "much of both": (says(window=1 << 20, lanes=65), "lanes = 65: a model folder has at most"),
    "true for a window": (says(window=True), "train.window = True: it takes a whole number"),
    "a window with a point": (says(window=8.0), "train.window = 8.0: it takes a whole number"),
    "a negative window": (says(window=-8), "train.window = -8: it must be at least 1"),
    "one for tied": (says(tied=1), "model.tied = 1: it takes true or false"),
    "biases with a point": (says(biases=2.0), "model.biases = 2.0: it takes a whole number"),
    "one for embedded": (says(embedded=1), "does not say where the model comes from, .*Expected `bool`, got `int`"),
    "no origin at all": (says(imported=None), "does not say where .*either training or imported"),
    "two origins": (says(training=TRAINING), "does not say where .*either training or imported"),
    "an origin that is a list": (says(imported=["x"]), "does not say where .*Expected `str"),
    "a long origin": (says(imported="x" * 10_000), "does not say where .*length <= 255"),
    "steps with a point": (trained(step=1.5), "does not say where .*training.step"),
    "too many steps": (trained(step=10**30), "does not say where .*training.step"),
    "a corpus of HTML": (trained(corpus="<script>"), "does not say where .*training.corpus"),
    "a recipe with headings": (trained(recipe={"a\n# b": {}}), "does not say where .*training.recipe"),
    "a deep recipe": (trained(recipe={"a": {"b": {"c": 1}}}), "does not say where .*training.recipe"),
    "half a character": (says(imported="\ud800"), "config.json is not valid JSON"),
    "two megabytes": (lambda folder: (folder / "config.json").write_text(" " * (2 << 20)), "config.json is too large"),
    "escapes": (says(weights="\x1b[2J" * 1000), r"weights are '\\x1b\[2J.*\.\.\.; there are fp32"),
    "no hash": (says(sha256=None), "model.safetensors is damaged"),
    "another tokenizer": (says(tokenizer="0" * 64), "tokenizer.json is not the one of its config.json"),
    "no origin": (says(imported=None, training={"step": "x"}), "does not say where the model comes from"),
    "stored otherwise": (says(weights="bf16"), r"is F32\[11, 4\] there, BF16\[11, 4\] by its config.json"),
    "a flipped bit": (flipped, "model.safetensors is damaged"),
    "cut": (bytes_of(lambda data: data[:-1]), "no whole safetensors file"),
    "cut to nothing": (bytes_of(lambda data: b""), "has 0 bytes"),
    "longer": (bytes_of(lambda data: data + b"x"), "no whole safetensors file"),
    "an endless header": (bytes_of(lambda data: b"\xff" * 8 + data[8:]), "no whole safetensors file: header too large"),
    "a deep header": (
        bytes_of(lambda data: (100_000).to_bytes(8, "little") + b'{"a":' + b"[" * 99_995 + data[8:]),
        "no whole safetensors file",
    ),
    "shapes swapped": (
        header(lstm__weight_hh_l0={"shape": [6, 24]}),
        r"'lstm.weight_hh_l0' is F32\[6, 24\] there, F32\[24, 6\]",
    ),
    "a shape beyond numbers": (header(output__bias={"shape": [2**63, 2**63]}), "no whole safetensors file"),
    "a type that lies": (header(output__bias={"dtype": "I32"}), "'output.bias' is of I32"),
    "bytes shared": (header(output__bias={"data_offsets": [0, 44]}), "no whole safetensors file"),
    "no output": (without("output__bias"), "'output.bias' is not there, F32"),
    "a stranger": (holds(**{"../x\n": lambda array: np.zeros(1, np.float32)}), r"'\.\./x\\n' is F32\[1\] there, not by"),
    "not a number": (holds(embedding__weight=at(np.nan)), "'embedding.weight' has values that are not finite"),
    "infinity": (holds(output__bias=at(np.inf)), "'output.bias' has values that are not finite"),
    "far too large": (holds(output__weight=huge, output__bias=huge), "numbers are not finite"),
    "a terabyte": (sparse, "this machine's memory has"),
    "no tokenizer of ours": (file("dllm_tokenizer.json", '{"kind": "os"}'), "holds no tokenizer that this version knows"),
    "a tokenizer too deep": (file("dllm_tokenizer.json", DEEP), "tokenizer.json is not valid JSON"),
    "numbers for words": (file("dllm_tokenizer.json", '{"kind": "word", "units": [1, 2]}'), "holds no tokenizer"),
    "no text for words": (
        file("dllm_tokenizer.json", '{"kind": "word", "units": ["\\ud800"]}'),
        "tokenizer.json is not valid JSON",
    ),
    "a token beyond": (file("dllm_tokenizer.json", gap()), "holds no tokenizer"),
    "no tokens": (file("dllm_tokenizer.json", '{"kind": "word", "units": []}'), "tokenizer.json is not the one"),
}


@pytest.fixture(scope="module")
def ends(tmp_path_factory):
    """case -> (folder, exit code, what was written) of `generate` on every hostile folder, in one process."""
    world = tmp_path_factory.mktemp("hostile")
    for number, (attack, _) in enumerate(ATTACKS.values()):
        make(world / f"model{number}", biases=2)
        attack(world / f"model{number}")
    lines = (f"generate model{number} --tokens 2" for number in range(len(ATTACKS)))
    done = commands(world / "out", *lines, cwd=world)
    return {case: (world / f"model{number}", *end) for number, (case, end) in enumerate(zip(ATTACKS, done, strict=True))}


@pytest.mark.parametrize("case", ATTACKS)
def test_it_is_refused_in_one_line_with_exit_code_2(ends, case):
    folder, code, text = ends[case]
    assert code == 2, text
    assert re.fullmatch(f"dllm: .*{ATTACKS[case][1]}.*\n", text), text
    assert len(text) < 500
    assert folder.name in text or case == "far too large"  # which shows when it is used


def test_what_was_not_attacked_is_read(tmp_path):
    for kind in torch_weights.KINDS:
        make(tmp_path / kind, stored=kind)
        assert LoadedModel.open(tmp_path / kind).config.hidden == 6
    (tmp_path / "link").symlink_to(tmp_path / "int8")
    assert LoadedModel.open(tmp_path / "link").name == "int8"


HOSTILE = "a|b`<script>alert(1)</script>\n# x [y](http://z) ![](http://z)\u202e\x1b[2J"
CARD_TRAINING = {
    "measured": [{"split": HOSTILE, "tokens": 1, "before": 1, "after": 2.5, "corpus": "0" * 64}],
    "recipe": {"log": {"prompt": "```\n# x\n\u202e\x1b[31m<script>"}, "data": {"path": "\u2028```"}},
}


def outside_of_code(card):
    """The lines of a card without its blocks and spans of code."""
    return re.sub("`[^`\n]*`", "", re.sub(r"^```.*?^```$|^    .*?$", "", card, flags=re.M | re.S))


def test_names_do_nothing_in_a_card_and_on_a_screen(tmp_path):
    """Export and evaluate of hostile names: of the folder, of a split, of settings, of an imported file."""
    folder = tmp_path / "a\x1b[31m\n# h <b>`x`|\u202e"
    make(folder)
    weights = tmp_path / "\x1b[1m`<b>|.safetensors"
    weights.write_bytes((folder / "model.safetensors").read_bytes())
    trained(**CARD_TRAINING)(folder)
    words = [
        ["dllm.export", folder, "--out", tmp_path / "out`<b>\x1b\n;rm -rf"],
        ["dllm.generate", folder, "--tokens", "2", "--prompt", "cd"],
        ["dllm.generate", f"{folder}x"],
        ["dllm.import_", weights, "--tokenizer", folder, "--out", tmp_path / "imported"],
    ]
    ends = run_several(tmp_path / "ends", 0, words, cwd=tmp_path, timeout=100)
    assert [end.codes for end in ends] == [{0}, {0}, {2}, {0}]
    for end in (ends[0], *ends[2:]):
        assert all(line.isprintable() for line in end.text.split("\n")), end.text
    for name in ("out`<b>\x1b\n;rm -rf", "imported"):
        card = (tmp_path / name / "README.md").read_text()
        assert all(line.isprintable() for line in card.split("\n"))
        plain = outside_of_code(card)
        assert not re.search(r"<|\[.*\]\(|^# [^\n`]*x", plain, flags=re.M), plain
        assert [line for line in plain.split("\n") if line.startswith("#")][1:] == ["## Use", "## Licence"] + ["## Recipe"] * (
            name != "imported"
        )
    assert (
        "    python -m dllm.generate 'out`<b>\\u001b\\u000a;rm -rf' --prompt"
        in (tmp_path / words[0][3] / "README.md").read_text()
    )
    recipe = re.search(r"^```toml\n(.*?)^```$", (tmp_path / words[0][3] / "README.md").read_text(), flags=re.M | re.S)[1]
    assert tomllib.loads(recipe) == CARD_TRAINING["recipe"]
    assert LoadedModel.open(tmp_path / words[0][3]).facts["training"]["measured"][0]["split"] == HOSTILE
    assert LoadedModel.open(folder).name == "a\\u001b[31m\\u000a# h <b>`x`|\\u202e"


def test_export_carries_nothing_on_that_no_config_has(tmp_path):
    make(tmp_path / "model")
    trained(more={"x": ["y"] * 1000})(tmp_path / "model")
    says(stranger=1)(tmp_path / "model")
    facts = LoadedModel.open(tmp_path / "model").facts
    assert "stranger" not in facts
    assert facts["training"] == TRAINING | {"earlier": []}


def test_windows_beyond_memory_are_refused_before_they_are_there(tmp_path):
    """A model folder within its limits, and a run of a width that no machine has memory for."""
    make(tmp_path / "model")
    model = LoadedModel.open(tmp_path / "model")
    for window, lanes in ((1 << 34, 64), (64, 1 << 34), (2**31 - 1, 2**31 - 1)):
        with pytest.raises(
            UserError, match=r"^windows of [\d,]+ tokens in [\d,]+ lanes take [\d,]+ MB; this machine's memory has"
        ):
            model.model(window, lanes)
    assert model.model(64, 32).window == 64


def test_a_scale_that_makes_infinities_is_refused(tmp_path):
    make(tmp_path / "model", stored="int8")
    holds(output__weight__scale=at(3e38))(tmp_path / "model")
    with pytest.raises(UserError, match=r"'output.weight' has values that are not finite"):
        LoadedModel.open(tmp_path / "model")
