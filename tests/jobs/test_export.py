"""Model folders: PyTorch loads them and they load PyTorch's, smaller weights, averages; generate and evaluate use them."""

import json
import re
import shutil

import numpy as np
import pytest
from helpers.launch import mpirun, train_arguments
from helpers.model_folders import TOKENIZER, commands, logits, make
from helpers.numerics import EVERY_KIND, V, relative
from helpers.run_files import arrays, checkpoints

from dllm import import_
from dllm.data.corpus import Corpus
from dllm.data.tokenizer_files import save_tokenizer
from dllm.inference.loaded_model import LoadedModel
from dllm.model import torch_weights
from dllm.model.layout import Layout

BIASES = pytest.mark.parametrize("biases", [1, 2])
TEXT = np.random.default_rng(7).integers(0, V, 20)


def in_pytorch(torch, folder, monkeypatch):
    """What the script of the model card computes for TEXT (T,V)."""
    monkeypatch.chdir(folder)
    script = re.search("```python\n(.*?)```", (folder / "README.md").read_text(), re.S)[1]
    assert len(list(filter(None, script.splitlines()))) <= 12
    given = script.replace("torch.tensor([[0], [1]])", f"torch.tensor({TEXT[:, None].tolist()})")
    assert given != script
    names = {}
    exec(given, names)
    return names["logits"][:, 0].detach().numpy()


@pytest.mark.parametrize("stored", torch_weights.KINDS)
@BIASES
@EVERY_KIND
def test_the_card_s_script_gives_the_same_logits_in_pytorch(kind, biases, stored, tmp_path, monkeypatch):
    torch = pytest.importorskip("torch")
    model = make(tmp_path / "model", kind, stored, biases=biases)
    ours = logits(LoadedModel.open(tmp_path / "model").model(1), TEXT)
    assert relative(ours, in_pytorch(torch, tmp_path / "model", monkeypatch)) <= 1e-5
    assert relative(ours, logits(model, TEXT)) <= {"fp32": 0, "bf16": 2e-2, "int8": 5e-2}[stored]


def pytorch_module(torch, names, one_hot, tied, layers, **options):
    """A module as PyTorch's word_language_model has it, and its logits (T,V) of TEXT."""
    torch.manual_seed(3)
    embedding, recurrent, output = names
    parts = {} if one_hot else {embedding: torch.nn.Embedding(V, 6 if tied else 5)}
    parts[recurrent] = torch.nn.LSTM(V if one_hot else 6 if tied else 5, 6, layers, **options)
    parts[output] = torch.nn.Linear(6, V, **options)
    module = torch.nn.ModuleDict(parts)
    if tied:
        module[output].weight = module[embedding].weight
    tokens = torch.tensor(TEXT)[:, None]
    x = torch.nn.functional.one_hot(tokens, V).float() if one_hot else module[embedding](tokens)
    return module, module[output](module[recurrent](x)[0])[:, 0].detach().numpy()


def imported(tmp_path, state, capsys):
    """(exit code, standard error) of an import of a state dict into tmp_path / "model"."""
    from safetensors.torch import save_file

    save_file({name: tensor.detach().clone() for name, tensor in state.items()}, tmp_path / "module.safetensors")
    save_tokenizer(tmp_path, TOKENIZER)
    places = tmp_path / "module.safetensors", tmp_path / "tokenizer.json", tmp_path / "model"
    module, tokenizer, model = map(str, places)
    code = import_.main([module, "--tokenizer", tokenizer, "--out", model])
    return code, capsys.readouterr().err


@pytest.mark.parametrize(
    ("names", "prefix", "one_hot", "tied", "options"),
    [
        (("embedding", "lstm", "output"), "", False, False, {}),
        (("encoder", "rnn", "decoder"), "", False, True, {}),
        (("encoder", "rnn", "decoder"), "model.module.", False, False, {"bias": False}),
        (("embedding", "lstm", "output"), "module.", True, False, {}),
    ],
)
@pytest.mark.parametrize("layers", [1, 3])
def test_a_pytorch_model_gives_the_same_logits_here(names, prefix, one_hot, tied, options, layers, tmp_path, capsys):
    torch = pytest.importorskip("torch")
    module, expected = pytorch_module(torch, names, one_hot, tied, layers, **options)
    state = {prefix + name: tensor for name, tensor in module.state_dict().items()}
    assert imported(tmp_path, state, capsys) == (0, "")
    opened = LoadedModel.open(tmp_path / "model")
    assert (opened.config.tied, opened.config.biases) == (tied, 1 if options else 2)
    assert relative(logits(opened.model(1), TEXT), expected) <= 1e-5


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
def test_other_precisions_are_imported(dtype, tmp_path, capsys):
    torch = pytest.importorskip("torch")
    module, _ = pytorch_module(torch, ("encoder", "rnn", "decoder"), False, False, 1)
    state = {name: tensor.to(getattr(torch, dtype)) for name, tensor in module.state_dict().items()}
    assert imported(tmp_path, state, capsys) == (0, "")
    found = LoadedModel.open(tmp_path / "model").tensors()
    np.testing.assert_array_equal(found["output.weight"], state["decoder.weight"].float().numpy())


def refused(torch, what):
    """A state dict that cannot be imported."""
    names = "embedding", "lstm", "output"
    lstm = {"bidirectional": {"bidirectional": True}, "projection": {"proj_size": 3}}.get(what, {})
    state = dict(pytorch_module(torch, names, False, False, 2)[0].state_dict())
    if lstm:
        state |= {f"lstm.{name}": tensor for name, tensor in torch.nn.LSTM(5, 6, 2, **lstm).state_dict().items()}
    if what in ("GRU", "RNN"):
        kept = {name: tensor for name, tensor in state.items() if not name.startswith("lstm.")}
        state = kept | {f"rnn.{name}": tensor for name, tensor in getattr(torch.nn, what)(5, 6).state_dict().items()}
    changes = {
        "no output": lambda: (state.pop("output.weight"), state.pop("embedding.weight")),
        "not tied": lambda: state.pop("output.weight"),
        "a layer missing": lambda: [state.pop(name) for name in list(state) if name.startswith("lstm.weight_ih_l1")],
        "vocabulary": lambda: state.update({name: state[name][:-1] for name in state if name[:3] in ("emb", "out")}),
        "half a vocabulary": lambda: state.update({"embedding.weight": state["embedding.weight"][:-1]}),
        "stranger": lambda: state.update({"attention.weight": torch.zeros(3, 3)}),
        "scalar": lambda: state.update({"embedding.weight": torch.tensor(1.0)}),
        "integers": lambda: state.update({"output.bias": torch.zeros(V, dtype=torch.int64)}),
        "a scale of floats": lambda: state.update({"embedding.weight.scale": torch.ones(V)}),
        "too few scales": lambda: state.update({"embedding.weight": integers, "embedding.weight.scale": torch.ones(3)}),
        "not a number": lambda: state["output.bias"].fill_(float("nan")),
    }
    integers = torch.zeros(V, 5, dtype=torch.int8)
    changes.get(what, lambda: None)()
    return state


@pytest.mark.parametrize(
    ("what", "says"),
    [
        ("bidirectional", "a bidirectional LSTM sees what comes next"),
        ("projection", "projections"),
        ("GRU", "holds a GRU"),
        ("RNN", "holds a plain RNN"),
        ("no output", "has no output.weight"),
        ("not tied", "an embedding of 5 cannot serve where H is 6"),
        ("a layer missing", "has no lstm.weight_ih_l1"),
        ("vocabulary", f"has a vocabulary of {V - 1}, .* one of {V}"),
        ("half a vocabulary", "embedding.weight is .* by the other tensors"),
        ("stranger", "'attention.weight', which is of no embedding"),
        ("scalar", r"embedding.weight is \[\], not a matrix"),
        ("integers", "'output.bias' is of I64"),
        ("a scale of floats", "'embedding.weight.scale', which is of no"),
        ("too few scales", "'embedding.weight.scale', which is of no"),
        ("not a number", "'output.bias' has values that are not finite"),
    ],
)
def test_what_is_no_such_model_is_refused_in_one_line(what, says, tmp_path, capsys):
    torch = pytest.importorskip("torch")
    code, text = imported(tmp_path, refused(torch, what), capsys)
    assert code == 2
    assert re.fullmatch(f"dllm: .*{says}.*\n", text)
    assert not (tmp_path / "model").exists()


def test_int8_is_half_a_step_from_the_weights_and_rows_of_zeros_stay_zero():
    rng = np.random.default_rng(5)
    x = (rng.standard_normal((50, 300)) * 10.0 ** rng.integers(-30, 30, (50, 1))).astype(np.float32)
    x[7] = 0
    q, s = torch_weights.quantise(x)
    assert (np.abs(x - s[:, None] * q.astype(np.float64)) <= 0.5001 * s[:, None]).all()
    assert (np.delete(np.abs(q).max(axis=1), 7) == 127).all()
    assert not q[7].any()


def test_bfloat16_is_the_nearest():
    x = np.random.default_rng(6).standard_normal((40, 25)).astype(np.float32)
    x[0, :2] = 1 + 2**-8, 1 + 3 * 2**-8  # ties go to even
    rounded = torch_weights.decode({"x": ("BF16", torch_weights.encode({"x": x}, "bf16")["x"])})["x"]
    assert rounded[0, :2].tolist() == [1, 1 + 2**-6]
    _, exponent = np.frexp(x)
    assert (np.abs(x - rounded) <= np.ldexp(0.5, exponent - 8)).all()


@pytest.fixture(scope="module")
def done(tiny, tmp_path_factory):
    """A folder with a corpus, a run of 120 steps with three checkpoints and models of it; and how the commands ended."""
    folder = tmp_path_factory.mktemp("export")
    shutil.copytree(tiny, folder / "tiny")
    settings = "model.hidden=192", "model.embedding=96", "train.window=32", "train.lr=0.004", "checkpoint.every_steps=40"
    mpirun(0, *train_arguments("tiny", "run", *settings, extra=("--max-steps", 120)), cwd=folder, check=True)
    lines = [
        *(f"export run --out {kind} --weights {kind} --split test" for kind in torch_weights.KINDS),
        "export run --out average --average 3 --checkpoint last",
        "import fp32/model.safetensors --tokenizer run --out imported",
        "export imported --out again --data tiny",
        "export imported --out small --weights int8",
        *(f"evaluate {model} --data tiny" for model in ("run", *torch_weights.KINDS)),
        *(f"generate {model} --tokens 60 --seed 5" for model in ("run", "fp32", "imported")),
        "export run --out lost --data lost",
        "export run --out fp32",
        "export run --out four --average 4",
        "export fp32 --out four --average 2",
        "export run --out tiny/manifest.json/x",
        "evaluate fp32",
        "evaluate fp32 --data tiny --split exam",
        "import run/config.toml --tokenizer tiny --out new",
        "import fp32/model.safetensors --tokenizer run/config.toml --out new",
    ]
    return folder, dict(zip(lines, commands(folder / "out", *lines, cwd=folder), strict=True))


def test_int8_takes_at_most_three_tenths_and_costs_at_most_a_hundredth(done):
    folder, ends = done
    size = {kind: sum(path.stat().st_size for path in (folder / kind).iterdir()) for kind in torch_weights.KINDS}
    assert size["int8"] <= 0.3 * size["fp32"]
    assert size["bf16"] <= 0.52 * size["fp32"]
    perplexity = {kind: json.loads(ends[f"evaluate {kind} --data tiny"][1].splitlines()[-1])["perplexity"] for kind in size}
    assert perplexity["fp32"] < 15  # it has learnt something
    assert perplexity["fp32"] < perplexity["int8"] * 1.01
    assert perplexity["int8"] < perplexity["fp32"] * 1.01
    assert perplexity["bf16"] == pytest.approx(perplexity["fp32"], rel=2e-3)
    assert perplexity["int8"] != perplexity["fp32"]


def test_export_prints_and_writes_down_the_perplexity_that_evaluate_finds(done):
    folder, ends = done
    before = json.loads(ends["evaluate run --data tiny"][1].splitlines()[-1])
    for kind in torch_weights.KINDS:
        code, text = ends[f"export run --out {kind} --weights {kind} --split test"]
        assert code == 0
        after = json.loads(ends[f"evaluate {kind} --data tiny"][1].splitlines()[-1])
        assert f"{before['perplexity']:.4f} before, {after['perplexity']:.4f} after" in text
        facts = json.loads((folder / kind / "config.json").read_text())
        (measured,) = facts["training"]["measured"]
        assert measured["before"] == pytest.approx(before["perplexity"], rel=1e-12)
        assert measured["after"] == pytest.approx(after["perplexity"], rel=1e-12)
        assert facts["training"]["tokens"] == 120 * 8 * 32
        card = (folder / kind / "README.md").read_text()
        assert f"{after['perplexity']:.4g} ({before['perplexity']:.4g} as trained)" in card
        assert measured["corpus"] in card
        assert "hidden = 192" in card
        assert str(folder) not in card + json.dumps(facts)  # nothing of this machine


def test_generate_and_evaluate_give_the_same_of_a_run_and_of_its_model(done):
    _, ends = done
    texts = {ends[f"generate {model} --tokens 60 --seed 5"] for model in ("run", "fp32", "imported")}
    assert len(texts) == 1
    assert texts.pop()[0] == 0
    numbers = {ends[f"evaluate {model} --data tiny"][1].splitlines()[-1] for model in ("run", "fp32")}
    assert len(numbers) == 1


def test_export_import_export_gives_the_same_bytes(done):
    folder, ends = done
    first = (folder / "fp32" / "model.safetensors").read_bytes()
    assert (folder / "imported" / "model.safetensors").read_bytes() == first
    assert (folder / "again" / "model.safetensors").read_bytes() == first
    assert (folder / "small" / "model.safetensors").read_bytes() == (folder / "int8" / "model.safetensors").read_bytes()
    code, text = ends["export imported --out small --weights int8"]
    assert code == 0
    assert "perplexity is not measured: imported does not say where its corpus is" in text


def test_an_average_is_the_mean_of_the_parameters(done):
    folder, _ = done
    steps = checkpoints(folder / "run")[-3:]
    assert steps == [40, 80, 120]
    mean = np.mean([arrays(folder / "run", step)[0]["theta"].astype(np.float64) for step in steps], axis=0)
    opened = LoadedModel.open(folder / "average")
    layout = Layout(opened.config, opened.tokenizer.size, np.float32)
    np.testing.assert_array_equal(layout.pack(opened.vector), mean.astype(np.float32))


@pytest.mark.parametrize(
    ("command", "says"),
    [
        ("export run --out lost --data lost", "there is no prepared corpus at lost"),
        ("export run --out fp32", "--out fp32 exists"),
        ("export run --out four --average 4", "run has 3 checkpoints; train keeps more with --set checkpoint.keep=4"),
        ("export fp32 --out four --average 2", "fp32 is a model folder, it has no checkpoints"),
        ("export run --out tiny/manifest.json/x", "cannot write to --out .*tiny/manifest.json/x: Not a directory"),
        ("evaluate fp32", "fp32 does not say where its corpus is: give one by --data DIR"),
        ("evaluate fp32 --data tiny --split exam", "tiny has no split 'exam'"),
        ("import run/config.toml --tokenizer tiny --out new", "run/config.toml is no whole safetensors file"),
        ("import fp32/model.safetensors --tokenizer run/config.toml --out new", "run/config.toml is not valid JSON"),
    ],
)
def test_bad_input_is_refused_in_one_line(done, command, says):
    folder, ends = done
    code, text = ends[command]
    assert code == 2
    assert re.fullmatch(f"(perplexity .*\n)?dllm: .*{says}.*\n", text)
    assert not any((folder / name).exists() for name in ("lost", "four", "new"))


def test_where_the_corpus_is_gone_it_is_said_and_the_model_is_made(done, tmp_path):
    folder, _ = done
    shutil.copytree(folder / "run", tmp_path / "run")
    config = tmp_path / "run" / "config.toml"
    config.write_text(config.read_text().replace(str(folder / "tiny"), "/nowhere/private"))
    (code, text), (generated, _) = commands(
        tmp_path / "out", "export run --out model", "generate model --tokens 5", cwd=tmp_path
    )  # fmt: skip
    assert (code, generated) == (0, 0)
    assert "dllm: perplexity is not measured: there is no prepared corpus at /nowhere/private;" in text
    written = "".join((tmp_path / "model" / name).read_text() for name in ("README.md", "config.json"))
    assert f'"corpus": "{Corpus(folder / "tiny").hash}"' in written
    assert "nowhere" not in written


def test_export_is_not_for_several_ranks(done):
    folder, _ = done
    end = mpirun(2, "-m", "dllm.export", "run", "--out", "two", cwd=folder)
    assert end.returncode == 2
    assert end.stderr.count("export is the work of one process: start it without mpirun") == 1
